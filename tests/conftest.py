"""Fixtures of the fast tests: a service over the fake driver, and a check after each test that nothing was left."""

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

from tests.fakes import Service, serving

hypothesis.settings.register_profile("cellvm", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("cellvm")

LONGEST = (
    "test_notebooks.py test_first_start.py test_hostile_guest.py test_lab.py test_reliability.py test_leaks.py "
    "test_bad_input.py test_network.py test_internet.py test_channels.py test_services.py test_driver.py "
    "test_template.py test_e2b.py test_lost_connections.py test_hostile_agent.py test_model.py test_corpus.py"
).split()
"""Files that take half a minute to some minutes."""
FAST = {Path(__file__).parent / name for name in ("unit", "api", "contract")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, because the workers of a run then end at about the same time."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def open_files() -> dict[int, str]:
    """Descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # this descriptor lists the directory
    return found


def children() -> set[int]:
    """Child processes of this process, zombies included."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):  # the thread has ended since
            found |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return found


def temporary(directory: Path) -> list[str]:
    """Leftovers in a data directory: agents' homes and disks of machines."""
    return [str(path) for path in directory.rglob("*") if path.name.startswith(("agent-", "disk-"))]


class Tracebacks(logging.Handler):
    """A collector of records that show a traceback, and of asyncio's complaints about forgotten exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or (record.name == "asyncio" and record.levelno >= logging.ERROR):
            self.found.append(logging.Formatter().format(record))


@pytest.fixture(autouse=True)
def tracebacks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a traceback in the log, or an exception that nobody has looked at."""
    handler = Tracebacks()
    logging.getLogger().addHandler(handler)
    yield
    if not FAST.isdisjoint(request.path.parents):
        gc.collect(1)
    logging.getLogger().removeHandler(handler)
    if not FAST.isdisjoint(request.path.parents) and handler.found:
        pytest.fail("in the log: " + "\n".join(handler.found))


@pytest.fixture(autouse=True)
async def leaks(request: pytest.FixtureRequest, tmp_path: Path, tracebacks: None) -> AsyncIterator[None]:
    """Fail a test that leaves descriptors, processes, tasks or temporary files behind."""
    if FAST.isdisjoint(request.path.parents):
        yield
        return
    files, processes, tasks = open_files(), children(), asyncio.all_tasks()
    yield
    left: dict[str, object] = {}
    for _ in range(50):
        left = {
            "files": {fd: name for fd, name in open_files().items() if files.get(fd) != name},
            "processes": children() - processes,
            "tasks": {repr(task)[:300] for task in asyncio.all_tasks() - tasks - {asyncio.current_task()}},
            "temporary": temporary(tmp_path),
        }
        if not any(left.values()):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"left behind: { {name: what for name, what in left.items() if what} }")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own by a shorter name, because a socket's name below it has 107 bytes at most."""
    name: str = request.node.originalname
    return tmp_path_factory.mktemp(name.removeprefix("test_")[:16])


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A service with four sandboxes at most, and no pool."""
    async with serving(tmp_path) as running:
        yield running


@pytest.fixture
async def pooled(tmp_path: Path) -> AsyncIterator[Service]:
    """A service with four sandboxes at most, and one machine in stock."""
    async with serving(tmp_path, pool_size=1) as running:
        yield running


@pytest.fixture
async def box(service: Service) -> str:
    """A running sandbox of `service`."""
    return await service.create()
