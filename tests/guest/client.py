"""The tests on real machines share this: a server as users start it, and a thin client for it."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

KEY = "e2b_" + secrets.token_hex(20)
"""Each worker of a run has its own key, so that a search of the host finds no other worker's."""
CELLVM = Path(sys.executable).with_name("cellvm")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cellvm"
START_LIMIT = 600
"""Seconds until a server must be ready. It may have to build its templates first."""
SLOWNESS = {"kvm": 1.0, "tcg": 2.0, "native": 1.0}
"""A promise that allows for an emulated guest gives it this many times as long."""


class Server:
    """A `cellvm serve` process with its data directory. `flags` are further ones, `environment` further variables.

    `ca` is the certificate authority of a server with TLS.
    """

    def __init__(
        self,
        data: Path,
        *,
        pool_size: int,
        max_sandboxes: int,
        flags: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
        ca: Path | None = None,
    ) -> None:
        assert shutil.which("qemu-system-x86_64"), "these tests need QEMU: run `cellvm doctor`"
        self.data = data
        self.log = data.with_name(f"{data.name}.log")
        given = {"--port": 0, "--data-dir": data, "--pool-size": pool_size, "--max-sandboxes": max_sandboxes}
        command = [str(CELLVM), "serve", *(str(part) for flag in (given | (flags or {})).items() for part in flag)]
        variables = {**os.environ, "CELLVM_API_KEY": KEY, **(environment or {})}
        self.pool_size = pool_size
        started = time.monotonic()
        with self.log.open("ab") as log:
            offset = log.tell()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
        self.pid = self.process.pid
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"Bearer {KEY}"
        if ca is not None:
            self.http.verify = str(ca)
            self.http.trust_env = False  # a variable would win
        try:
            found = until(lambda: self._ready_line(offset), START_LIMIT, every=0.02)
        except BaseException:
            self.close()
            raise
        self.url = found[1]
        self.start_time = time.monotonic() - started
        # Each template has a first machine, which tests that count machines must not see.
        until(lambda: b"the other templates have had their turn" in self.log.read_bytes()[offset:], START_LIMIT)
        self.scale = SLOWNESS[self.get("/health").json()["accelerator"]]

    def _ready_line(self, offset: int) -> re.Match[str] | None:
        text = self.log.read_bytes()[offset:].decode()
        assert self.process.poll() is None, f"the server ended: {text[-3000:]}"
        return re.search(r"^CellVM .* is ready at (https?://\S+)", text, re.MULTILINE)

    def close(self) -> None:
        """Stop the server, by force if it does not stop in time. Idempotent."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return self.http.request(method, self.url + path, timeout=kwargs.pop("timeout", 120), **kwargs)

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, **kwargs: Any) -> requests.Response:
        return self.request("POST", path, **kwargs)

    @contextmanager
    def sandbox(self, template: str = "code_interpreter", **fields: Any) -> Iterator["Sandbox"]:
        """A sandbox for the time of the block."""
        answer = self.post("/sandboxes", json={"templateID": template, "timeout": 3600, **fields})
        assert answer.status_code == 201, answer.text
        sandbox = Sandbox(self, answer.json())
        try:
            yield sandbox
        finally:
            if self.process.poll() is None:
                self.request("DELETE", f"/sandboxes/{sandbox.id}")

    def machines(self) -> set[int]:
        """Process ids of the server's QEMUs."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return {int(pid) for pid in children if comm(int(pid)).startswith("qemu")}

    def pool_ready(self) -> bool:
        """Whether the warm pool is full."""
        return self.get("/health").json()["pool"][0]["ready"] == self.pool_size

    def memory(self, field: str) -> int:
        """A reading of the server process in bytes: VmRSS, or VmHWM for its peak."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024

    @contextmanager
    def memory_grows_at_most(self, limit: int) -> Iterator[None]:
        """The server's memory must not peak higher than this many bytes above its present size."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # forget the peak so far
        before = self.memory("VmRSS")
        yield
        grown = self.memory("VmHWM") - before
        assert grown <= limit, f"{grown >> 20} MiB"


class Sandbox:
    """One sandbox, seen through REST."""

    def __init__(self, server: Server, model: dict[str, Any]) -> None:
        self.server = server
        self.model = model
        self.id: str = model["sandboxID"]
        self.scale = server.scale

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return self.server.request(method, f"/sandboxes/{self.id}{path}", **kwargs)

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, **kwargs: Any) -> requests.Response:
        return self.request("POST", path, **kwargs)

    def run(self, cmd: str, *args: str, **fields: Any) -> dict[str, Any]:
        """A command's result."""
        answer = self.post("/processes", json={"cmd": cmd, "args": args, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def shell(self, script: str, **fields: Any) -> str:
        """The output of a bash script, which must succeed."""
        result = self.run("bash", "-c", script, **fields)
        assert result["exitCode"] == 0, result
        return result["stdout"]

    def execute(self, code: str, **fields: Any) -> dict[str, Any]:
        """The result of a cell."""
        answer = self.post("/execute", json={"code": code, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def value(self, code: str, **fields: Any) -> Any:
        """The value of a cell's last expression, through JSON."""
        lines = code.strip().split("\n")
        lines[-1] = f"print(__import__('json').dumps({lines[-1]}))"
        cell = self.execute("\n".join(lines), **fields)
        assert cell["error"] is None, "\n".join(cell["error"]["traceback"]) or cell["error"]
        return json.loads(cell["stdout"].splitlines()[-1])

    def upload(self, path: str, content: Any) -> requests.Response:
        return self.post("/files", data={"path": path}, files={"file": ("name", content)})

    def download(self, path: str, **kwargs: Any) -> requests.Response:
        return self.get("/files", params={"path": path}, **kwargs)


@contextmanager
def cache_without_snapshots() -> Iterator[Path]:
    """The user's cache without snapshots for the time of the block. Files are links, because nobody changes them."""
    (CACHE / "test").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="copy-", dir=CACHE / "test") as name:
        for kind in ("images", "initrd", "wheels", "debs", "kvm"):
            subprocess.run(["cp", "-al", CACHE / kind, name], check=True)
        Path(name, "snapshots").mkdir()
        yield Path(name)


def until(done: Callable[[], Any], limit: float, *, every: float = 0.01) -> Any:
    """Wait until `done` returns a true value, and return that value."""
    deadline = time.monotonic() + limit
    while not (found := done()):
        assert time.monotonic() < deadline, f"still not after {limit} s"
        time.sleep(every)
    return found


def comm(pid: int) -> str:
    """A process's name. It is empty when there is no such process, or only its entry is left."""
    try:
        name, state = re.search(r"\((.*)\) (\S)", Path(f"/proc/{pid}/stat").read_text(), re.DOTALL).groups()
    except OSError:
        return ""
    return "" if state in "ZX" else name
