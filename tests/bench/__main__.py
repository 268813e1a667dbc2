"""`make bench`: the users' waiting times, measured through the public API on the machine at hand.

Every line has a floor or a peer from the same run: an empty request for latency, the same server without isolation for
running code, a plain loopback HTTP copy for moving bytes. `tests/bench/jupyter.py` measures from a Jupyter client, and
`tests/bench/e2b.py` from E2B's SDK. Raw samples go to `bench-results/<time>.json`.
"""

import argparse
import contextlib
import http.server
import json
import os
import platform
import re
import secrets
import signal
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from tests.bench import e2b, jupyter

MEGABYTE = 1_000_000
TRANSFER = 64 * 1024 * 1024
EXAMPLE = Path(__file__).parents[1] / "guest/documented_example.txt"
PYTHON_TARGETS = {"python3 -c 'import pandas'": "target <= 0.12", "documented example": "target <= 0.35"}
CHANGED = 100 * 1024 * 1024
PANDAS_CELL = "import pandas as pd; pd.DataFrame({'x': range(1000)}).describe()"
GAPS_CELL = """
import threading, time
widest = 0.0
def watch():
    global widest
    last = time.time()
    while True:
        time.sleep(0.001)
        now = time.time()
        widest, last = max(widest, now - last), now
threading.Thread(target=watch, daemon=True).start()
"""
"""A thread that finds the longest time, in seconds, in which it did not run. The host sets the clock that it reads."""


class Bench:
    """A collection of samples. Times are in ms unless the name says otherwise."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], requests.Response], expect: int = 200) -> requests.Response:
        started = time.perf_counter()
        response = call()
        self.add(name, (time.perf_counter() - started) * 1000)
        if response.status_code != expect:
            raise SystemExit(f"{name}: HTTP {response.status_code} {response.text[:500]}")
        return response

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def p50(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def line(self, name: str, unit: str, target: str, floor: str | None) -> str:
        values = sorted(self.samples[name])
        beside = f"{self.p50(name) / self.p50(floor):8.2f} x {floor}" if floor else ""
        return (
            f"{name:34} {self.p50(name):9.1f} {values[0]:9.1f} {values[-1]:9.1f} {unit:5} n={len(values):<3}"
            f" {target:22} {beside}"
        )

    def print(self, *rows: tuple[str, str, str, str | None]) -> None:
        """Print rows of a table; `line` has their fields."""
        for row in rows:
            print(self.line(*row))


class Server:
    """A server of its own, through its command line."""

    def __init__(self, *flags: str) -> None:
        self._data = tempfile.TemporaryDirectory(prefix="cellvm-bench-")
        self.data = Path(self._data.name)
        key = "e2b_" + secrets.token_hex(20)
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kernel_gateway", "serve", "--port", "0", "--data-dir", self._data.name, *flags],
            env={**os.environ, "CELLVM_API_KEY": key, "CELLVM_LOG_LEVEL": "error"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if " is ready at " in line:
                self.url = line.split(" is ready at ")[1].split()[0]
                return
        raise SystemExit("the server did not start")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._data.cleanup()

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.session.get(f"{self.url}/health", timeout=10).json()
        return found

    def await_pool(self, size: int) -> None:
        while (ready := self.health()["pool"][0]["ready"]) < size:
            print(f"\r  filling the pool: {ready}/{size}  ", end="", file=sys.stderr, flush=True)
            time.sleep(0.5)
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)

    def create(self) -> requests.Response:
        return self.session.post(f"{self.url}/sandboxes", json={"templateID": "code_interpreter"}, timeout=60)

    def delete(self, sandbox: str) -> None:
        self.session.delete(f"{self.url}/sandboxes/{sandbox}", timeout=60)

    def execute(self, sandbox: str, code: str) -> requests.Response:
        return self.session.post(f"{self.url}/sandboxes/{sandbox}/execute", json={"code": code}, timeout=120)

    def process_of(self, sandbox: str, command: str) -> requests.Response:
        return self.session.post(f"{self.url}/sandboxes/{sandbox}/processes", json={"cmd": command}, timeout=120)


def measure_cells(bench: Bench, server: Server, prefix: str, rounds: int) -> None:
    """First and later cells and a command, each round in a fresh sandbox."""
    for _ in range(rounds):
        server.await_pool(1)
        sandbox = server.create().json()["sandboxID"]
        bench.time(f"{prefix}first 1+1", lambda s=sandbox: server.execute(s, "1+1"))  # type: ignore[misc]
        for _ in range(5):
            bench.time(f"{prefix}second 1+1", lambda s=sandbox: server.execute(s, "1+1"))  # type: ignore[misc]
            bench.time(f"{prefix}/processes true", lambda s=sandbox: server.process_of(s, "true"))  # type: ignore[misc]
        server.delete(sandbox)


def measure_python(bench: Bench, server: Server, prefix: str, programs: dict[str, str], rounds: int) -> None:
    """Python programs as forks and in the true way, in turns, in one sandbox."""
    sandbox = server.create().json()["sandboxID"]

    def run(program: str, switch: str) -> requests.Response:
        body = {"cmd": "python3", "args": ["-c", program], "envVars": {"CELLVM_INSTANT_PYTHON": switch}}
        return server.session.post(f"{server.url}/sandboxes/{sandbox}/processes", json=body, timeout=300)

    while run("import gc; assert gc.get_freeze_count()", "1").json()["exitCode"]:
        time.sleep(1)  # without a template the first command begins to warm
    for _ in range(rounds):
        for name, program in programs.items():
            for way, switch in (("", "1"), (", true way", "0")):
                bench.time(f"{prefix}{name}{way}", lambda p=program, s=switch: run(p, s))  # type: ignore[misc]
    server.delete(sandbox)


def measure_creates(bench: Bench, server: Server, count: int) -> None:
    """Creates one after the other from a full pool, and the floor beside them."""
    server.await_pool(count)
    for _ in range(count):
        bench.time("empty request (GET /health)", lambda: server.session.get(f"{server.url}/health", timeout=10))
        server.delete(bench.time("create, warm pool", server.create, 201).json()["sandboxID"])


def measure_network(bench: Bench, count: int) -> None:
    """Creates with a network card and without, in turns, each from a full pool."""
    flags = ("--pool-size", str(count), "--templates", "code_interpreter")
    with contextlib.ExitStack() as stack:
        servers = {"with": Server(*flags), "without": Server(*flags, "--network", "off")}
        for server in servers.values():
            stack.callback(server.close)
        for server in servers.values():
            server.await_pool(count)
        for _ in range(count):
            for name, server in servers.items():
                made = bench.time(f"create {name} network", server.create, 201)
                server.delete(made.json()["sandboxID"])
    for with_card, without in zip(
        bench.samples["create with network"], bench.samples["create without network"], strict=True
    ):
        bench.add("create, what the network adds", with_card - without)


def measure_burst(bench: Bench, server: Server, name: str) -> None:
    """The time until the last of eight clients that create at the same moment has its sandbox."""
    with ThreadPoolExecutor(8) as threads:
        started = time.perf_counter()
        answers = list(threads.map(lambda _: server.create(), range(8)))
        bench.add(name, (time.perf_counter() - started) * 1000)
    for answer in answers:
        server.delete(answer.json()["sandboxID"])


def measure_transfers(bench: Bench, server: Server) -> None:
    """64 MiB up and down, and the same over a plain loopback HTTP server."""
    data = secrets.token_bytes(TRANSFER)
    sandbox = server.create().json()["sandboxID"]
    url = f"{server.url}/sandboxes/{sandbox}/files"

    def rate(name: str, started: float) -> None:
        bench.add(name, TRANSFER / MEGABYTE / (time.perf_counter() - started))

    with plain_server() as plain:
        for _ in range(3):
            started = time.perf_counter()
            server.session.post(url, data={"path": "blob"}, files={"file": data}, timeout=300).raise_for_status()
            rate("upload 64 MiB", started)
            started = time.perf_counter()
            if server.session.get(url, params={"path": "blob"}, timeout=300).content != data:
                raise SystemExit("the download differs from the upload")
            rate("download 64 MiB", started)
            started = time.perf_counter()
            requests.post(plain, files={"file": data}, timeout=300).raise_for_status()
            rate("plain HTTP up", started)
            started = time.perf_counter()
            requests.get(plain, timeout=300).raise_for_status()
            rate("plain HTTP down", started)
    server.delete(sandbox)


@contextlib.contextmanager
def plain_server() -> Iterator[str]:
    """A plain HTTP server of the standard library, for the same bytes."""
    body = bytes(TRANSFER)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body)

        def do_POST(self) -> None:
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(self.rfile.read(min(left, 65536)))
            self._answer(b"")

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as plain:
        thread = threading.Thread(target=plain.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{plain.server_address[1]}/"
        plain.shutdown()
        thread.join()


def measure_pauses(bench: Bench, count: int) -> None:
    """Pauses of a sandbox that has changed 100 MiB, resumes up to a first answer, and template restores, in turns."""
    server = Server("--pool-size", "0", "--max-sandboxes", "3", "--templates", "code_interpreter")
    try:
        sandbox = server.create().json()["sandboxID"]
        url = f"{server.url}/sandboxes/{sandbox}"
        server.execute(sandbox, f"import os; blob = os.urandom({CHANGED})").raise_for_status()
        for _ in range(count):
            made = bench.time("template restore", server.create, 201)
            server.delete(made.json()["sandboxID"])
            bench.time("pause, 100 MiB changed", lambda: server.session.post(f"{url}/pause", timeout=60), 204)
            folder = server.data / "paused" / sandbox
            size = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file())
            bench.add("disk of it", size / MEGABYTE)
            started = time.perf_counter()
            bench.time("resume", lambda: server.session.post(f"{url}/resume", timeout=60), 201)
            server.execute(sandbox, "1+1").raise_for_status()
            bench.add("resume to first answer", (time.perf_counter() - started) * 1000)
    finally:
        server.close()


def measure_copies(bench: Bench, count: int) -> None:
    """Forks, snapshots and checkpoints of a sandbox that holds a DataFrame, and template restores, in turns."""
    server = Server("--pool-size", "0", "--max-sandboxes", "3", "--templates", "code_interpreter")
    try:
        parent = server.create().json()["sandboxID"]
        url = f"{server.url}/sandboxes/{parent}"
        server.execute(parent, PANDAS_CELL + "\n" + GAPS_CELL).raise_for_status()

        def post(name: str, path: str, expect: int = 201) -> Any:
            answer = bench.time(name, lambda: server.session.post(url + path, json={}, timeout=60), expect)
            return answer.json() if answer.content else None

        def widest_gap(name: str) -> None:
            cell = server.execute(parent, "found, widest = widest, 0.0\nprint(found)").json()
            bench.add(name, float(cell["stdout"]) * 1000)

        for _ in range(count):
            server.delete(bench.time("template restore beside", server.create, 201).json()["sandboxID"])
            widest_gap("before")
            time.sleep(1)
            widest_gap("widest gap, at rest")
            child = post("fork, to the child's answer", "/fork")[0]["sandbox"]["sandboxID"]
            widest_gap("widest gap, fork")
            server.delete(child)
            snapshot = post("snapshot", "/snapshots")["snapshotID"]
            body = {"templateID": snapshot}
            made = bench.time(
                "start from a snapshot",
                lambda b=body: server.session.post(f"{server.url}/sandboxes", json=b, timeout=60),  # type: ignore[misc]
                201,
            )
            server.delete(made.json()["sandboxID"])
            server.session.delete(f"{server.url}/snapshots/{snapshot}", timeout=60).raise_for_status()
            number = post("checkpoint", "/checkpoints")["number"]
            post("back to a checkpoint", f"/checkpoints/{number}/restore", 204)
            server.session.delete(f"{url}/checkpoints/{number}", timeout=60).raise_for_status()
    finally:
        server.close()


def measure_memory(bench: Bench, server: Server) -> None:
    """The memory of one more sandbox after a pandas cell, from the host kernel's accounting of its machine."""
    made = [server.create().json()["sandboxID"] for _ in range(3)]
    for sandbox in made:
        server.execute(sandbox, PANDAS_CELL)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for pid in children:
        found = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            found[name] = int(value.split()[0]) / 1024
        bench.add("private memory per sandbox", found["Private_Dirty"] + found["Private_Clean"])
        bench.add("PSS per sandbox", found["Pss"])
    for sandbox in made:
        server.delete(sandbox)


def measure_neighbour() -> None:
    """R32: `1 + 1` in one sandbox, alone and while another one keeps all its processors busy."""
    server = Server("--pool-size", "0", "--max-sandboxes", "2", "--templates", "code_interpreter")
    bench = Bench()
    try:
        quiet, noisy = (server.create().json()["sandboxID"] for _ in range(2))
        for name in ("warm-up", "alone", "beside a busy one"):
            if name == "beside a busy one":
                script = "for _ in 1 2; do (while :; do :; done) & done"  # it ends with its sandbox
                body = {"cmd": "bash", "args": ["-c", script]}
                server.session.post(f"{server.url}/sandboxes/{noisy}/processes", json=body, timeout=60)
            for _ in range(60):
                bench.time(name, lambda: server.execute(quiet, "1 + 1"))
        alone, beside = (statistics.quantiles(bench.samples[name], n=20)[-1] for name in ("alone", "beside a busy one"))
        print(f"1 + 1, p95: alone {alone:.1f} ms, beside a busy sandbox {beside:.1f} ms, {beside / alone:.2f} times")
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--creates", type=int, default=20, help="sequential creates (default 20)")
    parts = ("rest", "python", "pauses", "network", "jupyter", "e2b", "neighbour")
    parser.add_argument("--only", choices=parts, help="one part only")
    options = parser.parse_args()
    if options.only == "neighbour":
        measure_neighbour()
        return
    bench = Bench()
    health = measure_rest(bench, options.creates) if options.only in (None, "rest") else None
    if options.only in (None, "python"):
        print("Python …", file=sys.stderr)
        measure_programs(bench)
    if options.only in (None, "pauses"):
        print("pauses …", file=sys.stderr)
        measure_pauses(bench, 10)
        measure_copies(bench, 10)
    if options.only in (None, "network"):
        print("creates with and without a network …", file=sys.stderr)
        measure_network(bench, options.creates)
    if options.only in (None, "jupyter"):
        print("Jupyter …", file=sys.stderr)
        jupyter.measure(bench.add)
    if options.only in (None, "e2b"):
        print("E2B's SDK …", file=sys.stderr)
        e2b.measure(bench.add)
    report(bench, health)


def measure_programs(bench: Bench) -> None:
    """Measure Python programs: on a machine those of the documents, and without isolation what every host can run."""
    example = re.search(r'^code = """(.*?)"""$', EXAMPLE.read_text(), re.MULTILINE | re.DOTALL)
    assert example is not None
    imports = {"python3 -c 'import pandas'": "import pandas", "documented example": example[1].replace("\\\\n", "\\n")}
    for prefix, flags, programs in (
        ("", ("--templates", "code_interpreter"), {"python3 -c pass": "pass", **imports}),
        ("unisolated ", ("--isolation", "unisolated"), {"python3 -c pass": "pass"}),
    ):
        server = Server("--pool-size", "0", *flags)
        try:
            measure_python(bench, server, prefix, programs, 5)
        finally:
            server.close()


def measure_rest(bench: Bench, creates: int) -> dict[str, Any]:
    """Measure sandboxes over REST, and return the server's health."""
    server = Server("--pool-size", str(creates), "--max-sandboxes", "40", "--templates", "code_interpreter")
    health = server.health()
    try:
        print("creates from the pool …", file=sys.stderr)
        measure_creates(bench, server, creates)
    finally:
        server.close()

    server = Server("--pool-size", "0", "--max-sandboxes", "40", "--templates", "code_interpreter")
    try:
        print("creates without a pool …", file=sys.stderr)
        for _ in range(10):
            sandbox = bench.time("create, empty pool", server.create, 201).json()["sandboxID"]
            server.delete(sandbox)
        measure_burst(bench, server, "8 creates at once, empty pool")
        print("files …", file=sys.stderr)
        measure_transfers(bench, server)
        print("memory …", file=sys.stderr)
        measure_memory(bench, server)
    finally:
        server.close()

    server = Server("--pool-size", "8", "--max-sandboxes", "40", "--templates", "code_interpreter")
    try:
        server.await_pool(8)
        measure_burst(bench, server, "8 creates at once, pool of 8")
        print("cells …", file=sys.stderr)
        server.await_pool(8)
        measure_cells(bench, server, "", 6)
    finally:
        server.close()

    server = Server("--isolation", "unisolated", "--pool-size", "2")
    try:
        measure_cells(bench, server, "unisolated ", 3)
    finally:
        server.close()
    return health


def report(bench: Bench, health: dict[str, Any] | None) -> None:
    """Print the table and keep the samples."""
    cpu = next(
        (line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    driver = f"{health['isolation']} on {health['accelerator']}, " if health else ""
    machine = f"{os.cpu_count()} x{cpu}, {driver}Linux {platform.release()}"
    print(f"\n{machine}, load {os.getloadavg()[0]:.1f}")
    if health:
        rest_table(bench)
    for name in [each for each in bench.samples if each.endswith(", true way")]:
        fork = name.removesuffix(", true way")
        print(bench.line(name, "ms", "", None))
        print(bench.line(fork, "ms", PYTHON_TARGETS.get(fork, "target <= 1"), name))
    if "resume" in bench.samples:
        restore = "template restore"
        bench.print(
            (restore, "ms", "", None),
            ("pause, 100 MiB changed", "ms", "target <= 2.5 x", restore),
            ("resume", "ms", "", restore),
            ("resume to first answer", "ms", "target <= 2 x", restore),
            ("disk of it", "MB", "target <= 126", None),
            ("template restore beside", "ms", "", None),
            ("fork, to the child's answer", "ms", "target <= 1.2 x", "template restore beside"),
            ("widest gap, fork", "ms", "target <= 60", "widest gap, at rest"),
            ("snapshot", "ms", "", "template restore beside"),
            ("start from a snapshot", "ms", "target <= 1 x", "template restore beside"),
            ("checkpoint", "ms", "", "template restore beside"),
            ("back to a checkpoint", "ms", "", "template restore beside"),
        )
    if "create with network" in bench.samples:
        for name in ("create with network", "create without network", "create, what the network adds"):
            print(bench.line(name, "ms", "target <= 10" if "adds" in name else "", None))
    for line in (*jupyter.table(bench.samples), *e2b.table(bench.samples)):
        print(line)
    results = Path("bench-results")
    results.mkdir(exist_ok=True)
    path = results / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": machine, "health": health, "samples": bench.samples}, indent=1))
    print(f"\nraw samples: {path}")


def rest_table(bench: Bench) -> None:
    """Print the measurements over REST."""
    print(f"{'':34} {'p50':>9} {'min':>9} {'max':>9}")
    floor = "empty request (GET /health)"
    bench.print(
        (floor, "ms", "", None),
        ("create, warm pool", "ms", "target <= 25", floor),
        ("create, empty pool", "ms", "target <= 400", floor),
        ("8 creates at once, pool of 8", "ms", "", "create, warm pool"),
        ("8 creates at once, empty pool", "ms", "", "create, empty pool"),
        ("first 1+1", "ms", "", "unisolated first 1+1"),
        ("second 1+1", "ms", "", "unisolated second 1+1"),
        ("/processes true", "ms", "", "unisolated /processes true"),
        ("upload 64 MiB", "MB/s", "target >= 80", "plain HTTP up"),
        ("download 64 MiB", "MB/s", "target >= 80", "plain HTTP down"),
        ("private memory per sandbox", "MiB", "", None),
        ("PSS per sandbox", "MiB", "", None),
    )


main()
