"""Programs in the manner of real ones have the outcome that Python gives them, in whichever way people run them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from tests import ways
from tests.fakes import Service
from tests.guest.client import Sandbox
from tests.ways import Notebooks, Outcome, Program

PROGRAMS = ways.programs()


@pytest.fixture(scope="module")
def server(real: Service) -> Iterator[Any]:
    """The service, for threads."""
    with requests.Session() as http:
        http.headers["Authorization"] = f"Bearer {real.key}"

        def request(method: str, path: str, **options: Any) -> requests.Response:
            return http.request(method, real.url + path, timeout=60, **options)

        yield SimpleNamespace(url=real.url, request=request, scale=1.0)


@pytest.fixture(scope="module")
async def notebooks(server: Any, real: Service) -> AsyncIterator[Notebooks]:
    found = await asyncio.to_thread(Notebooks, server, real.key)
    yield found
    await asyncio.to_thread(found.close)


@pytest.fixture(scope="module")
async def run(server: Any, real_box: str, notebooks: Notebooks) -> Callable[[Program, str], Any]:
    """What runs a program in a way, once."""
    box = Sandbox(server, (await asyncio.to_thread(server.request, "GET", f"/sandboxes/{real_box}")).json())
    each = {"notebook": notebooks.run} | {name: partial(way, box) for name, way in ways.WAYS.items()}
    known: dict[tuple[str, str], Outcome] = {}

    async def run(program: Program, way: str) -> Outcome:
        key = (program.name, way)
        if key not in known:
            known[key] = await asyncio.to_thread(each[way], program)
        return known[key]

    return run


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Program], Outcome]:
    """What tells the right outcome of a program, which Python gives here."""
    known: dict[str, Outcome] = {}

    def right(program: Program) -> Outcome:
        if program.name not in known:
            known[program.name] = ways.by_python(program, tmp_path_factory.mktemp("right"))
        return known[program.name]

    return right


@pytest.mark.parametrize("way", ["notebook", *ways.WAYS])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
async def test_outcome(run: Any, right: Callable[[Program], Outcome], program: Program, way: str) -> None:
    """What is printed, the last value, the error and the files are those of Python."""
    assert await run(program, way) == right(program)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
async def test_shown(run: Any, program: Program) -> None:
    """A notebook shows what cells over REST show, figures too."""
    assert (await run(program, "notebook")).shown == (await run(program, "cells")).shown
