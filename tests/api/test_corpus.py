"""Programs in the manner of real ones have the outcome that Python gives them, in whichever way people run them."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from tests import ways
from tests.api.clients import channels
from tests.fakes import Service
from tests.guest.client import Sandbox
from tests.ways import Notebooks, Outcome, Program

PROGRAMS = ways.programs()
RECORDING = ways.CORPUS / "recorded.jsonl"
TO_RECORD = """
async_generators chained_errors display_report game_of_life geometry_hull gradient_descent julia_gallery logging_report
magics progress_updates shell_tools thread_downloads wav_synth
""".split()
"""Programs with outputs of all kinds, and not too much of them."""
MORE = {
    "displays of other cells": [
        "a = display('a', display_id='x'); b = display('b', display_id=True); display('c', display_id='x')",
        "a.update('new'); print('said'); b.update('new, too')",
        "display('last', display_id='x'); b.update({'text/plain': 'raw'}, raw=True)",
    ],
    "what is cleared": [
        "from IPython.display import clear_output\nprint(1); clear_output(wait=True)",
        "print(1); clear_output(wait=True); print(2); clear_output(wait=True); 1/0",
        "h = display('a', display_id='y'); clear_output(); h.update('b'); print('c')",
        "h.update('not there any more')",
    ],
    "streams in turn": [
        "import sys\nfor n in range(6):\n    print(n, end='', file=(sys.stdout, sys.stderr)[n % 2], flush=True)",
        "for n in range(3):\n    print(n, flush=True); display(n)",
        "print('\\rone\\rtwo\\b\\x1b[1A', end=''); print()",
    ],
}


@pytest.fixture(scope="module")
def server(real: Service) -> Iterator[Any]:
    """The service, for threads."""
    with requests.Session() as http:
        http.headers["Authorization"] = f"Bearer {real.key}"

        def request(method: str, path: str, **options: Any) -> requests.Response:
            return http.request(method, real.url + path, timeout=120, **options)

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


async def test_recorded_messages(real: Service, real_box: str) -> None:
    """The recording that `tests/unit/test_collector.py` reads is what kernels send. BLESS=1 makes it anew."""
    kernel = real.sandboxes.get(real.owner, real_box).kernel_id
    recorded: dict[str, list[list[tuple[str, Any]]]] = {}
    notebooks = {program.name: program.cells for program in PROGRAMS if program.name in TO_RECORD} | MORE
    assert len(notebooks) == len(TO_RECORD) + len(MORE)
    for name, cells in notebooks.items():
        await real.call("POST", f"/api/kernels/{kernel}/restart")
        await real.run(real_box, "sh", "-c", ways.TAKE_FILES)
        async with channels(real, kernel) as client:
            answers = [await client.run(source, stop_on_error=False) for source in cells]
        recorded[name] = [
            [(each.kind, each.content) for each in answer.messages if each.kind in KINDS] for answer in answers
        ]
    if os.environ.get("BLESS"):
        RECORDING.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in recorded.items()))
    known = dict(map(json.loads, RECORDING.read_text().splitlines()))
    assert {name: kinds(cells) for name, cells in recorded.items()} == {
        name: kinds(cells) for name, cells in known.items()
    }


KINDS = "stream display_data update_display_data execute_result clear_output error".split()


def kinds(cells: Any) -> list[Counter[str]]:
    """How many messages of each kind the cells have. Text may come in any number of them."""
    return [Counter(kind for kind, _ in cell if kind != "stream") for cell in cells]
