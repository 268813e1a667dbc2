"""Fixtures for tests on real machines. Nothing here is skipped: without QEMU these tests fail."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest.client import Sandbox, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit excludes fixtures, because the first start of a server may have to build templates."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(180, func_only=True))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not hurt it."""
    server = Server(tmp_path_factory.mktemp("server") / "data", pool_size=1, max_sandboxes=5)
    yield server
    server.close()


@pytest.fixture(scope="module")
def box(server: Server) -> Iterator[Sandbox]:
    """A sandbox that the tests of one file share."""
    with server.sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def start_server(server: Server, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts the test's own servers on one data directory. It needs `server`, which builds all templates."""
    with ExitStack() as started:

        def start(*, pool_size: int = 1, max_sandboxes: int = 2, flags: dict[str, object] | None = None) -> Server:
            own = Server(tmp_path / "data", pool_size=pool_size, max_sandboxes=max_sandboxes, flags=flags)
            started.callback(own.close)
            return own

        yield start
