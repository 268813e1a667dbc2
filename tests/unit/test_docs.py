"""Documentation can't drift, because errors and routes are checked against the server's own tables."""

import re
from pathlib import Path

import pytest

from guest_agent import wire
from kernel_gateway import errors
from kernel_gateway.api.app import ROUTES
from kernel_gateway.api.base import STATUS, Route

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("code", STATUS)
def test_every_error_is_documented(code: str) -> None:
    """docs/errors.md has a row with the word and its status."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d{3}) \|", (DOCS / "errors.md").read_text(), re.MULTILINE))
    assert rows.get(code) == str(STATUS[code])


def test_no_error_is_documented_that_does_not_exist() -> None:
    """Each row of docs/errors.md with a status is an error of ours."""
    rows = re.findall(r"^\| `(\w+)` \| \d{3} \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert set(rows) == set(STATUS)


def test_every_error_has_a_status() -> None:
    """Each exception's code, and each reason of the agent, is in the one table."""
    codes = {kind.code for kind in errors.CellvmError.__subclasses__()} | wire.FAILURES
    assert codes <= set(STATUS)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_documented(route: Route) -> None:
    """docs/rest.md names each method and path."""
    assert f"`{route.method} {route.path}`" in (DOCS / "rest.md").read_text()
