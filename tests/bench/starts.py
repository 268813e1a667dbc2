"""First starts: how long they take, and whether they all succeed, beside load and after `kill -9`.

    python -m tests.bench.starts [--count N] [--loops N] [--kill] [--template ID]

Each start finds the image in the cache and no snapshot, so it boots, warms and saves its template. With `--kill`, a
start before each is killed at a random moment, and the next one has to go on from there. Raw samples go to
bench-results/starts.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.guest.client import CELLVM, Server, cache_without_snapshots

RESULTS = Path("bench-results/starts.json")
KILLED_WITHIN = 60.0
"""Seconds from a start to the latest moment at which it is killed."""
LONGEST = 7200
"""Seconds after which a busy loop ends by itself."""


@contextmanager
def load(loops: int) -> Iterator[None]:
    """So many processes that do nothing but keep a processor busy."""
    command = ["timeout", str(LONGEST), "sh", "-c", "while :; do :; done"]
    busy = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for process in busy:
            process.terminate()
            process.wait()


def killed(flags: dict[str, object], data: Path, moment: float) -> None:
    """Start a server and kill it after so many seconds."""
    words = [str(word) for flag in flags.items() for word in flag]
    command = [str(CELLVM), "serve", "--port", "0", "--data-dir", str(data), *words]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    server.send_signal(signal.SIGKILL)
    server.wait()


def one(cache: Path, template: str, *, kill: bool) -> dict[str, Any]:
    """One first start: seconds to ready, to the first value, and the log if it failed."""
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    flags: dict[str, object] = {"--cache-dir": cache, "--templates": template}
    sample: dict[str, Any] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        if kill:
            sample["killed_after"] = random.uniform(0, KILLED_WITHIN)
            killed(flags, data, sample["killed_after"])
        began = time.monotonic()
        try:
            server = Server(data, pool_size=1, max_sandboxes=2, flags=flags)
        except AssertionError as error:
            return sample | {"failed": str(error)}
        try:
            sample["ready"] = server.start_time
            with server.sandbox(template) as sandbox:
                assert sandbox.value("6 * 7") == 42
            sample["first_value"] = time.monotonic() - began
        finally:
            server.close()
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--loops", type=int, default=2, help="busy loops for each processor; default: 2")
    parser.add_argument("--kill", action="store_true", help="kill a start before each at a random moment")
    parser.add_argument("--template", default="code_interpreter")
    options = parser.parse_args()
    samples: list[dict[str, Any]] = []
    with cache_without_snapshots() as cache, load(options.loops * (os.cpu_count() or 1)):
        for number in range(options.count):
            samples.append(one(cache, options.template, kill=options.kill))
            print(f"{number + 1}: {json.dumps(samples[-1])[:500]}", flush=True)
    ready = sorted(sample["ready"] for sample in samples if "ready" in sample)
    values = [sample for sample in samples if "first_value" in sample]
    print(f"{len(values)} of {options.count} ready", *(f"{seconds:.0f}" for seconds in ready))
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*known, {**vars(options), "at": time.time(), "samples": samples}], indent=1))


if __name__ == "__main__":
    main()
