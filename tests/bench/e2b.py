"""E2B's newest Python SDK beside plain REST of the same server, in turns, with machines and without isolation.

The program that is measured runs in the SDK's own environment (`tests/e2e/e2b/bench.py`). The server's CPU time and
memory are read while 100 of the SDK's commands run at once. A server of canned answers shows what the SDK itself takes.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.bench.jupyter import cpu
from tests.e2e.test_e2b import HERE, PYTHONS, python_of, variables
from tests.guest.client import Server

PREFIXES: dict[str, dict[str, object]] = {"": {}, "unisolated ": {"--isolation": "unisolated"}}
FLOOR = "floor "
PAIRS = {
    "create, first cell": ("ms", "target <= 1.15 x"),
    "command true": ("ms", "target <= 1.2 x"),
    "upload": ("MB/s", "target >= 0.91 x"),  # 1.1 times as long at most
    "download": ("MB/s", "target >= 0.91 x"),
}
STREAMS = {"command streams at once": "ms", "server CPU for them": "ms", "server memory for them": "MB"}


def measure(add: Callable[[str, float], None]) -> None:
    """Measure on both kinds of server. `add` takes each sample under its name."""
    python = python_of(PYTHONS[0], print)
    for prefix, flags in PREFIXES.items():
        with tempfile.TemporaryDirectory(prefix="cellvm-bench-") as directory:
            flags = {"--templates": "code_interpreter", **flags}
            server = Server(Path(directory) / "data", pool_size=2, max_sandboxes=8, flags=flags)
            try:
                for name, value in samples(server, python):
                    add(f"{prefix}{name}", value)
            finally:
                server.close()
    with floor() as url:
        for name, value in said_by(python, url):
            add(f"{FLOOR}{name}", value)


@contextmanager
def floor() -> Iterator[str]:
    """The address of a server whose answers cost nothing, so that what a client takes is its own time and HTTP's."""
    command = [sys.executable, "-m", "tests.bench.e2b_floor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def samples(server: Server, python: Path) -> Iterator[tuple[str, float]]:
    """What the program measures on a server, and what the server needs for its commands at once."""
    yield from said_by(python, server.url)
    with server.sandbox() as sandbox:
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # forget the peak so far
        before, used = server.memory("VmRSS"), cpu(server.pid)
        yield from said_by(python, server.url, sandbox.id)
        yield "server CPU for them", cpu(server.pid) - used
        yield "server memory for them", (server.memory("VmHWM") - before) / 1e6


def said_by(python: Path, *arguments: str) -> list[tuple[str, float]]:
    """The samples that one run of the program prints."""
    command = [str(python), str(HERE / "bench.py"), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables())
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def table(samples: Mapping[str, list[float]]) -> Iterator[str]:
    """One line for each measurement, with the ratio to REST's where there is one."""
    for prefix in (*PREFIXES, FLOOR):
        for name, (unit, target) in PAIRS.items():
            if f"{prefix}{name}: SDK" in samples:
                sdk, rest = (samples[f"{prefix}{name}: {way}"] for way in ("SDK", "REST"))
                yield (
                    f"{prefix + name:34} {median(sdk):9.1f} {unit:5} n={len(sdk):<3} {target:22}"
                    f" {median(sdk) / median(rest):8.2f} x REST ({median(rest):.1f})"
                )
        for name, unit in STREAMS.items():
            if prefix + name in samples:
                yield f"{prefix + name:34} {median(samples[prefix + name]):9.1f} {unit}"
