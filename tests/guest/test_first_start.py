"""The first start on real machines: when it is interrupted, and when the cache is damaged or from elsewhere."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kernel_gateway.images.snapshot import FileDigest, Manifest, copy_sparse, memory_file
from tests.guest.client import CACHE, CELLVM, cache_without_snapshots, comm, until

MADE_AGAIN = "base: boot the template (usually 6 s)\n"
"""The line of a boot's begin. On a busy host others follow, which tell that it goes on."""


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """The tests' own cache, with a copy of the snapshot of `base`."""
    with cache_without_snapshots() as copy:
        for snapshot in (CACHE / "snapshots").glob("base-*"):
            subprocess.run(["cp", "-a", snapshot, copy / "snapshots"], check=True)
        yield copy


def command(cache: Path, tmp_path: Path, *words: object) -> list[str]:
    settings = ("--cache-dir", cache, "--data-dir", tmp_path / "data", "--templates", "base")
    return [str(word) for word in (CELLVM, *words, *settings)]


def run_in(cache: Path, tmp_path: Path) -> str:
    """Run a file by `cellvm run`, which must print the right result. Returns its messages."""
    (tmp_path / "cell.py").write_text("import time\nprint(6 * 7, abs(time.time() - time.time()) < 1)\n")
    ran = subprocess.run(
        command(cache, tmp_path, "run", "cell.py", "--template", "base"),
        cwd=tmp_path, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "42 True\n"), ran.stderr
    return ran.stderr


def newest(cache: Path) -> Path:
    """The snapshot that was used last."""
    return max((cache / "snapshots").glob("base-*"), key=lambda path: path.stat().st_mtime)


def change(snapshot: Path, **fields: object) -> None:
    """Write other facts into a snapshot's manifest."""
    manifest = msgspec.json.decode((snapshot / "manifest.json").read_bytes(), type=Manifest)
    (snapshot / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, **fields)))


def test_a_copied_cache_is_used(cache: Path, tmp_path: Path) -> None:
    """Nothing is built when the cache is a copy, although its files have other holes."""
    for name in ("memory", "disk"):
        file = newest(cache) / name
        subprocess.run(["cp", "--sparse=always", file, file.with_suffix(".sparse")], check=True)
        file.with_suffix(".sparse").rename(file)
    assert MADE_AGAIN not in run_in(cache, tmp_path)


def test_a_start_that_builds_nothing_waits_for_nobody(cache: Path, tmp_path: Path) -> None:
    """While another process builds, a template that is there is used at once."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "wait for another build" not in run_in(cache, tmp_path)


def test_a_cache_of_two_hosts(cache: Path, tmp_path: Path) -> None:
    """The snapshot of a host whose counter runs a hundredth faster is not used, because a guest would lose 14 minutes a
    day by it. It stays for that host, beside the new one.
    """
    mine = newest(cache)
    rate = int(re.search(r"-(\d+)khz-", mine.name)[1])
    other = mine.rename(mine.with_name(mine.name.replace(str(rate), str(int(rate * 1.01)))))
    change(other, tsc_khz=int(rate * 1.01))
    assert run_in(cache, tmp_path).count(MADE_AGAIN) == 1
    assert MADE_AGAIN not in run_in(cache, tmp_path)
    assert {newest(cache).name, other.name} <= {path.name for path in (cache / "snapshots").iterdir()}
    shutil.rmtree(other)


def another_machine(snapshot: Path) -> None:
    """The snapshot's directory was renamed to the name that this host looks for."""
    manifest = msgspec.json.decode((snapshot / "manifest.json").read_bytes(), type=Manifest)
    change(snapshot, made_with={**manifest.made_with, "argv": "-cpu qemu64", "cpu": "model=1"})


def truncated(snapshot: Path) -> None:
    """A copy was interrupted."""
    os.truncate(snapshot / "memory", (snapshot / "memory").stat().st_size // 2)


def a_state_of_no_use(snapshot: Path) -> None:
    """A faulty QEMU wrote the state. Its hash is right, and no machine wakes from it."""
    state = snapshot / "state"
    state.write_bytes(state.read_bytes()[:100] + bytes(1000))
    source, sink = os.open(state, os.O_RDONLY), memory_file("state")
    digest: FileDigest = copy_sparse(source, sink)
    os.close(source)
    os.close(sink)
    manifest = msgspec.json.decode((snapshot / "manifest.json").read_bytes(), type=Manifest)
    change(snapshot, files={**manifest.files, "state": digest})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (another_machine, "it was made with something else than its name says"),
        (truncated, "memory: its content is not what the manifest says"),
        (a_state_of_no_use, "a machine that was restored from the snapshot does not answer"),
    ],
)
def test_a_snapshot_that_does_not_fit(
    cache: Path, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:  # fmt: skip
    """Such a snapshot is never used for a sandbox. It is made again, the log says why, and the next start uses it."""
    spoil(newest(cache))
    said = run_in(cache, tmp_path)
    assert re.search(rf"the cached snapshot of base is of no use and is made again: .*{why}", said, re.DOTALL), said
    assert said.count(MADE_AGAIN) == 1
    assert MADE_AGAIN not in run_in(cache, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_start_goes_on(cache: Path, tmp_path: Path, number: int) -> None:
    """A start that is ended while the template warms up leaves no machine, and the next one succeeds."""
    shutil.rmtree(newest(cache))
    log = tmp_path / "log"
    serve = command(cache, tmp_path, "serve", "--port", 0, "--pool-size", 0)
    with log.open("wb") as file:
        server = subprocess.Popen(serve, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            until(lambda: "warm the kernel" in log.read_text(), 120)
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            machines = [int(pid) for pid in children if comm(int(pid)).startswith("qemu")]
            assert machines
            server.send_signal(number)
            assert server.wait(20) == (-number if number == signal.SIGKILL else 130)
            until(lambda: not any(comm(pid) for pid in machines), 5)
        finally:
            server.kill()
            server.wait()
    began = time.monotonic()
    assert MADE_AGAIN in run_in(cache, tmp_path)
    assert time.monotonic() - began < 170
    assert [path.name for path in cache.rglob(".*") if path.parent.parent == cache] == []
