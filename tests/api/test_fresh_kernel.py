"""A kernel is what a freshly started interpreter would be: a fork is compared with `python -m ipykernel_launcher`.

Kernels here come from a pool, so their process has started before the sandbox's environment was known.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager

from guest_agent import wire
from kernel_gateway.drivers.unisolated import Unisolated
from tests.fakes import Service, eventually, serving

PROBES = """
import ctypes, datetime, decimal, gc, locale, logging, multiprocessing, os, random, resource, signal, subprocess, sys
import threading, time, warnings
def probes():
    home = os.environ["HOME"]
    yield "time zone", (time.tzname, time.localtime(0)[:5], str(datetime.datetime(2024, 7, 1).astimezone()))
    yield "sys.path", [part.replace(home, "~") for part in sys.path]
    yield "flags", [flag for flag in str(sys.flags).split(", ") if "bytecode" not in flag]  # nothing acts on that flag
    yield "hash", hash("text") if sys.flags.hash_randomization == 0 or os.environ.get("PYTHONHASHSEED") else None
    yield "warnings", [str(kind) for kind in warnings.filters if "To exit" not in str(kind)]
    yield "warnoptions", (sys.warnoptions, sys._xoptions)
    yield "locale", (locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), sys.getfilesystemencoding())
    yield "streams", [(type(s).__name__, s.encoding, s.errors) for s in (sys.stdout, sys.stderr)]
    yield "stdin", type(sys.stdin).__name__
    yield "bytecode", (sys.dont_write_bytecode, sys.pycache_prefix)
    yield "environment", {name: value.replace(home, "~") for name, value in os.environ.items()}
    yield "directory", os.getcwd().replace(home, "~")
    yield "umask", (lambda mask: (os.umask(mask), mask)[1])(os.umask(0))
    handlers = {s.name: str(signal.getsignal(s)).split(" at ")[0] for s in signal.valid_signals() if hasattr(s, "name")}
    yield "signals", {name: how for name, how in handlers.items() if name != "SIGINT"}
    yield "blocked signals", signal.pthread_sigmask(signal.SIG_BLOCK, [])
    child = "import os; print(os.listdir('/proc/self/fd'), open('/proc/self/status').read().split('SigBlk')[1][:90])"
    yield "a child", subprocess.run([sys.executable, "-c", child], capture_output=True, close_fds=False).stdout
    yield "limits", [resource.getrlimit(kind) for kind in range(15)]
    yield "priority", os.getpriority(os.PRIO_PROCESS, 0)
    yield "session", os.getsid(0) == os.getpid()
    yield "globals", sorted(set(globals()) - {"probes"})
    yield "main", ("__file__" in globals(), __name__, sys.modules["__main__"].__spec__)
    yield "original arguments", (sys.orig_argv[1:4], sys.executable)
    yield "interpreter", (sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_freeze_count())
    yield "hooks", (type(sys.excepthook).__name__, type(sys.displayhook).__name__)
    yield "logging", (logging.root.level, len(logging.root.handlers))
    yield "multiprocessing", multiprocessing.get_start_method()
    yield "decimal", str(decimal.getcontext())
    yield "files", sorted(
        os.readlink(f"/proc/self/fd/{fd}").partition(" ")[0].rpartition("/")[2]
        for fd in os.listdir("/proc/self/fd")
        if os.path.isfile(f"/proc/self/fd/{fd}") and "history" not in os.readlink(f"/proc/self/fd/{fd}")
    )
print(repr(list(probes())))
"""
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "nothing": {},
    "what is read again": {"TZ": "Asia/Tokyo", "PYTHONPATH": "lib:/opt/nowhere:lib", "PYTHONDONTWRITEBYTECODE": "1"},
    "more of it": {
        "TZ": "CET-1CEST,M3.5.0,M10.5.0/3",
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "agg",
        "DATABASE_URL": "x",
    },
    "hash seed": {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "warnings": {"PYTHONHASHSEED": "0", "PYTHONWARNINGS": "error::DeprecationWarning,ignore", "PYTHONOPTIMIZE": "1"},
    "development": {"PYTHONDEVMODE": "1", "PYTHONPYCACHEPREFIX": "/tmp/pycache", "PYTHONNOUSERSITE": "1"},
    "safe path": {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/opt/nowhere"},
    "C locale": {"LC_ALL": "C"},
    "no such locale": {"LANG": "xx_YY.UTF-8"},
    "POSIX locale": {"LANG": "POSIX"},
}
ONLY_HERE = {"cells"}
"""The page of memory that a kernel shares with its agent is an open file."""


@pytest.fixture
async def pooled(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service whose machines, and their kernels, have started before they are asked for."""
    directory = tmp_path_factory.mktemp("pooled")
    async with serving(directory, Unisolated(directory), pool_size=1) as running:
        await eventually(lambda: any(pool.ready for pool in running.sandboxes.pools.values()), 20)
        yield running


@contextmanager
def nothing_ignored() -> Iterator[None]:
    """Programs that are started in this block inherit no ignored signal, whatever has started the tests."""
    ignored = [each for each in signal.valid_signals() if signal.getsignal(each) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


async def reference(env: dict[str, str], home: Path) -> Any:
    """What the probes say in a kernel that Jupyter has started."""
    manager = AsyncKernelManager(kernel_name="python3", connection_file=str(home / "connection.json"))
    # An agent's standard output is nowhere, too.
    with nothing_ignored():
        await manager.start_kernel(env={**env, "HOME": str(home)}, cwd=str(home), stdout=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)
        printed: list[str] = []

        def take(message: dict[str, Any]) -> None:
            printed.append(message["content"].get("text", message["content"].get("evalue", "")))

        await client.execute_interactive(PROBES, output_hook=take, timeout=60)
        return ast.literal_eval("".join(printed))
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("case", ENVIRONMENTS)
async def test_a_fork_is_what_a_fresh_interpreter_is(pooled: Service, case: str, tmp_path: Path) -> None:
    """Whatever Python reads when it starts is read for the sandbox, though the kernel's process started earlier."""
    box = await pooled.create(envVars=ENVIRONMENTS[case])
    try:
        env = json.loads((await pooled.call("GET", f"/sandboxes/{box}/envs")).body)
        cell = await pooled.execute(box, PROBES)
        assert cell["error"] is None, cell
        found = dict(ast.literal_eval(cell["stdout"]))
        expected = dict(await reference(env, tmp_path))
        found["files"] = [name for name in found["files"] if name not in ONLY_HERE]
        for name in ("JPY_PARENT_PID", "PYDEVD_USE_FRAME_EVAL"):  # the first is Jupyter's own, the second debugpy's
            expected["environment"].pop(name, None)
        different = [
            f"{name}: {found[name]}\n not: {expected[name]}" for name in expected if found[name] != expected[name]
        ]
        assert not different, "\n".join(different)
    finally:
        await pooled.call("DELETE", f"/sandboxes/{box}")


# -- packages that change


def venv_with(directory: Path) -> Path:
    """The site-packages of a virtual environment that has the package `colour` and all that this Python has."""
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python3.*/site-packages")
    (packages / "all.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    (packages / "colour").mkdir()
    (packages / "colour/__init__.py").write_text("VERSION = 1\n")
    (packages / "colour/names.py").write_text("RED = 'red'\n")
    return packages


@dataclass(frozen=True)
class Warmed:
    """A sandbox, the site-packages of its kernel, and its home."""

    service: Service
    box: str
    packages: Path
    home: Path

    async def value(self, code: str) -> Any:
        """What the last line of a cell is."""
        *lines, last = code.split("\n")
        cell = await self.service.execute(self.box, "\n".join([*lines, f"print(repr(({last})))"]))
        assert cell["error"] is None, cell
        return ast.literal_eval(cell["stdout"])

    async def restart(self) -> None:
        kernel = json.loads((await self.service.call("GET", "/api/kernels")).body)[0]["id"]
        assert (await self.service.call("POST", f"/api/kernels/{kernel}/restart")).code == 200

    async def die(self) -> None:
        cell = await self.service.execute(self.box, "import os\nos._exit(3)")
        assert cell["error"]["name"] == "KernelRestarted"


@pytest.fixture
async def warmed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callable[..., Awaitable[Warmed]]]:
    """Makes a sandbox whose nursery has imported `colour`, a package of two modules."""
    directory = tmp_path_factory.mktemp("warmed")
    packages = venv_with(directory / "venv")
    python = str(directory / "venv/bin/python")
    async with serving(directory, Unisolated(directory, [python, "-m", "guest_agent"])) as running:

        async def make(**env: str) -> Warmed:
            box = await running.create(envVars=env)
            guest = running.sandboxes.get(running.owner, box).guest
            await guest.link.call(wire.Warm(modules=["colour.names"], exercise=""), wire.Done, timeout=30)
            return Warmed(running, box, packages, Path(guest.home))

        yield make


IS_WARM = "import sys\n'colour' in sys.modules"
COLOUR = "import colour.names\ncolour.VERSION, colour.names.RED, colour.__file__"


async def test_an_unchanged_package_stays_imported(warmed: Any) -> None:
    """A restart is quick while nothing has changed, also when other packages have come."""
    sandbox = await warmed()
    assert await sandbox.value(IS_WARM)
    (sandbox.packages / "other.py").write_text("")
    for end in (sandbox.restart, sandbox.die):
        await end()
        assert await sandbox.value(IS_WARM)


async def test_an_upgraded_package_is_imported_anew(warmed: Any) -> None:
    """After a restart a kernel has the package that pip has put there, and a second restart keeps it."""
    sandbox = await warmed()
    (sandbox.packages / "colour/__init__.py").write_text("VERSION = 22\n")
    await sandbox.restart()
    assert await sandbox.value(COLOUR) == (22, "red", str(sandbox.packages / "colour/__init__.py"))
    await sandbox.restart()
    assert (await sandbox.value(COLOUR))[0] == 22


async def test_a_part_of_a_package_changes(warmed: Any) -> None:
    """A file that the package imports counts as the package does, also when the kernel ends by itself."""
    sandbox = await warmed()
    # It has another size, because Python notices a change within a second by that alone.
    (sandbox.packages / "colour/names.py").write_text("RED = 'rouge'\n")
    await sandbox.die()
    assert (await sandbox.value(COLOUR))[:2] == (1, "rouge")


async def test_a_change_that_leaves_size_and_times(warmed: Any) -> None:
    """An installer may set a file's time, and the content may be as long as before."""
    sandbox = await warmed()
    file = sandbox.packages / "colour/__init__.py"
    times = file.stat()
    shutil.rmtree(file.parent / "__pycache__")
    file.write_text("VERSION = 3\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    await sandbox.restart()
    assert (await sandbox.value(COLOUR))[0] == 3


async def test_a_removed_package_is_gone(warmed: Any) -> None:
    """What pip has removed can't be imported after a restart."""
    sandbox = await warmed()
    shutil.rmtree(sandbox.packages / "colour")
    await sandbox.restart()
    cell = await sandbox.service.execute(sandbox.box, "import colour")
    assert cell["error"]["name"] == "ModuleNotFoundError"


@pytest.mark.parametrize("where", ["home", "PYTHONPATH"])
async def test_a_module_of_the_users_comes_first(warmed: Any, where: str, tmp_path: Path) -> None:
    """A module that an interpreter would find before the package is the one that is imported."""
    sandbox = await warmed(PYTHONPATH=str(tmp_path))
    folder = sandbox.home if where == "home" else tmp_path
    (folder / "colour.py").write_text("VERSION = 'mine'\n")
    await sandbox.restart()
    assert await sandbox.value("import colour\ncolour.VERSION") == "mine"


async def test_modules_of_the_users_do_not_break_the_kernel(warmed: Any) -> None:
    """A nursery that starts anew does not take the user's files for the modules that it needs."""
    sandbox = await warmed(PYTHONPATH="")
    (sandbox.packages / "colour/__init__.py").write_text("VERSION = 22\n")
    for name in ("random", "json", "zmq", "guest_agent"):
        (sandbox.home / f"{name}.py").write_text("raise ValueError('not yours')\n")
    await sandbox.restart()
    assert (await sandbox.value(COLOUR))[0] == 22


async def test_a_running_kernel_sees_new_packages(warmed: Any) -> None:
    """What is installed into a running kernel can be imported, also from a directory that was not there before."""
    sandbox = await warmed(PYTHONPATH="later")
    code = "import importlib.util\nbool(importlib.util.find_spec('fresh')), bool(importlib.util.find_spec('latest'))"
    assert await sandbox.value(code) == (False, False)
    (sandbox.packages / "fresh.py").write_text("")
    (sandbox.home / "later").mkdir()
    (sandbox.home / "later/latest.py").write_text("")
    assert await sandbox.value("importlib.invalidate_caches()\n" + code) == (True, True)
