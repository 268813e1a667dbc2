"""Python programs that are forked from a warm process do what they do in a fresh interpreter.

Every program runs twice: as a fork, and with the switch that turns forks off. Output, exit status and files are equal.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.drivers.unisolated import Unisolated
from tests.api.test_commands import attached, record, start, write
from tests.api.test_fresh_kernel import venv_with
from tests.fakes import Service, serving

WARM = (
    "json asyncio logging.handlers unittest.mock decimal sqlite3 multiprocessing.pool concurrent.futures email.message "
    "http.client requests jinja2 xml.dom.minidom ctypes.util dataclasses typing argparse tempfile importlib.metadata "
    "six secrets uuid"
).split()
SWITCH = "CELLVM_INSTANT_PYTHON"
IS_FORK = "import gc; print(gc.get_freeze_count() > 0)"

# Programs of which the whole sys.modules, in its order, is compared.
IMPORTS = (
    "json json.tool asyncio asyncio.subprocess logging logging.handlers unittest unittest.mock decimal fractions "
    "sqlite3 multiprocessing multiprocessing.pool concurrent.futures concurrent.futures.thread email email.message "
    "http http.client urllib.request requests requests.adapters jinja2 xml xml.dom xml.dom.minidom ctypes ctypes.util "
    "dataclasses typing argparse tempfile importlib importlib.util importlib.metadata six six.moves random re enum "
    "collections collections.abc threading subprocess signal socket ssl zipfile shutil pathlib inspect traceback "
    "contextlib functools os.path runpy csv gc weakref atexit warnings secrets uuid struct"
).split()
TABLE = """
sys.argv, sys.orig_argv, sys.flags, sys.executable, sys._base_executable, sys.prefix, sys.base_prefix
sys.path, sys.meta_path, sys.path_hooks, sorted(sys.path_importer_cache), sys.warnoptions, sys._xoptions
sorted(vars(sys)), dir(), sys._getframe().f_back, __builtins__, __spec__, __loader__, __name__, __doc__
sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.line_buffering, sys.stdin.line_buffering
sys.stdout.buffer, sys.stdout.buffer.raw, sys.stdin.mode, sys.__stdin__ is sys.stdin, sys.stdout.newlines
open("/proc/self/cmdline").read(), open("/proc/self/comm").read(), os.readlink("/proc/self/exe")
sorted(open("/proc/self/environ").read().split(chr(0))), list(os.environ)
os.getsid(0) == os.getpid() == os.getpgid(0), os.getcwd(), os.umask(0o22), os.nice(0), os.getppid() > 1
[os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in sorted(os.listdir("/proc/self/fd")) if n < "3"]
sorted(n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))
[l for l in open("/proc/self/status") if l.startswith(("Sig", "Shd", "Uid", "Gid", "Groups", "Threads", "Seccomp"))]
open("/proc/self/limits").read(), open("/proc/self/oom_score_adj").read()
__import__("signal").getsignal(2), [__import__("signal").getsignal(n) for n in range(1, 32)]
__import__("threading").main_thread(), __import__("threading").enumerate(),
__import__("threading").current_thread().native_id == os.getpid(),
__import__("warnings").filters, sys.getrecursionlimit(), sys.getswitchinterval(), sys.dont_write_bytecode
__import__("locale").setlocale(0), __import__("locale").getpreferredencoding(), sys.getfilesystemencoding()
__import__("time").tzname, __import__("time").localtime(0), __import__("gc").isenabled(),
__import__("gc").get_threshold(),
__import__("faulthandler").is_enabled(), __import__("multiprocessing").get_start_method(),
__import__("tempfile").gettempdir(),
__import__("atexit")._ncallbacks() < 2, sys.excepthook, sys.displayhook, sys.unraisablehook, sys.breakpointhook
hasattr(__import__("xml"), "dom"), hasattr(__import__("importlib"), "util"), hasattr(__import__("os"), "fork")
__import__("importlib.util").util.find_spec("json"), __import__("json").__spec__, __import__("json").__loader__
__import__("logging").root.handlers, __import__("decimal").getcontext(), __import__("socket").getdefaulttimeout()
exit, quit, copyright, sorted(vars(__import__("builtins")))
"""
PROGRAMS = [
    "pass",
    "print('a', end='')",
    "1/0",
    "def f(): g()\ndef g(): raise ValueError('x') from KeyError(1)\nf()",
    "import json\njson.loads('{')",
    "import nowhere",
    "from json import nothing",
    "import json.nothing",
    "def f(: pass",
    "print('\\ud800')",
    "raise SystemExit",
    "raise SystemExit(3)",
    "raise SystemExit('told')",
    "import sys; sys.exit(300)",
    "import sys; sys.exit(-1)",
    "import sys; sys.exit([1, 2])",
    "import os; os._exit(9)",
    "import os; os.abort()",
    "raise KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import os, signal; os.kill(os.getpid(), signal.SIGPIPE); print('goes on')",
    "import signal, os\nsignal.signal(15, lambda *a: print('handled', a[0]))\nos.kill(os.getpid(), 15)",
    "import signal\nsignal.alarm(1)\nsignal.pause()",
    "import sys; sys.stdout.write('no end'); sys.stderr.write('error')",
    "import sys; print(sys.stdin.read())",
    "print(input(), input('? '))",
    "import os; print(os.read(0, 3), os.read(0, 99))",
    "import sys; sys.stdin.close(); print(1)",
    "import sys; sys.stdout.close()",
    "import os; os.close(1); print('lost')",
    "import os; os.close(2); 1/0",
    "import os, sys; f = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1); print('full')",
    "import os, sys; f = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1); print('full'); sys.exit(3)",
    "import atexit\natexit.register(print, 'a'); atexit.register(print, 'b'); print('c')",
    "import atexit, sys\natexit.register(print, 'a'); sys.exit(5)",
    "import atexit\natexit.register(lambda: 1/0)",
    "import atexit, threading, time\natexit.register(print, 'exit')\n"
    "threading.Thread(target=lambda: (time.sleep(.1), print('thread'))).start(); print('main')",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "import threading\nt = threading.Thread(target=lambda: 1/0, name='t'); t.start(); t.join()",
    "class A:\n    def __del__(self): print('gone')\na = A()",
    "class A:\n    def __del__(self): 1/0\na = A()",
    "import sys\nclass A:\n    def __del__(self): print(sys.is_finalizing())\na = A()",
    "f = open('out.txt', 'w'); f.write('kept')",
    "import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'finalized')",
    "import tempfile, os\nd = tempfile.TemporaryDirectory(); print(os.path.isdir(d.name))",
    "def g():\n    try: yield\n    finally: print('closed')\nx = g(); next(x)",
    "import warnings\nwarnings.warn('careful'); warnings.warn('old', DeprecationWarning)",
    "import warnings\ndef f(): warnings.warn('deep', stacklevel=2)\nf()",
    "import warnings\nwarnings.warn('deepest', stacklevel=2)",
    "import traceback\ndef f(): traceback.print_stack()\nf()",
    "import inspect; print([f.function for f in inspect.stack()])",
    "import logging\nlogging.warning('w'); logging.getLogger('a').error('e', stack_info=True)",
    "def f(n): return f(n + 1)\nf(0)",
    "import faulthandler, sys\nfaulthandler.dump_traceback(file=sys.stdout)",
    "import sys\nsys.excepthook = lambda *a: print('hook', a[0])\n1/0",
    "import sys\nsys.unraisablehook = lambda a: print('hook', a.exc_type)\nclass A:\n    def __del__(self): 1/0\nA()",
    "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'import sys; print(sys.argv)', "
    "'x'], capture_output=True))",
    "import subprocess\nprint(subprocess.run('echo $0; exit 3', shell=True, capture_output=True))",
    "import subprocess\nprint(subprocess.run(['true'], close_fds=False).returncode)",
    "import os\npid = os.fork()\nif pid: print('child', os.waitpid(pid, 0)[1]); \nelse: print('in child')",
    "import os\npid = os.fork()\nif pid == 0: raise SystemExit(4)\n"
    "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    "import os, random\na = os.pipe()\nif os.fork() == 0: os.write(a[1], str(random.random()).encode()); os._exit(0)\n"
    "print(os.read(a[0], 99) != str(random.random()).encode())",
    "import concurrent.futures as c\nwith c.ThreadPoolExecutor() as p: print(list(p.map(abs, [-1, -2])))",
    "import multiprocessing as m\nif __name__ == '__main__':\n"
    "    with m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, -2]))",
    "import multiprocessing as m\nif __name__ == '__main__':\n    q = m.get_context('fork').Queue(); "
    "q.put(1); print(q.get())",
    "import asyncio\nasync def f(): await asyncio.sleep(0); print('ran')\nasyncio.run(f())",
    "import asyncio\nasync def f():\n    p = await asyncio.create_subprocess_exec('echo', 'x', "
    "stdout=-1); print(await p.communicate())\nasyncio.run(f())",
    "import json, sys\ndel sys.modules['json']\nimport json as again\nprint(again is json, again.dumps(1))",
    "import sys\nsys.modules['json'] = None\nimport json",
    "import sys, types\nsys.modules['json'] = types.ModuleType('json')\nimport requests.compat\n"
    "print(requests.compat.json is sys.modules['json'])",
    "import importlib, json\nprint(importlib.reload(json) is json)",
    "import importlib; print(importlib.import_module('xml.dom.minidom').__name__)",
    "import xml.dom.minidom as m, xml; print(m is xml.dom.minidom, xml.dom.minidom.parseString('<a/>').toxml())",
    "import sys\nclass F:\n    def find_spec(self, name, path, target=None): print('asked', name); "
    "return None\nsys.meta_path.insert(0, F())\nimport colorsys",
    "import builtins\nwas = builtins.__import__\nbuiltins.__import__ = lambda n, *a: (print(n), was(n, "
    "*a))[1]\nimport colorsys",
    "import pickle, decimal, collections\nprint(pickle.loads(pickle.dumps(decimal.Decimal(1))), collections.__all__)",
    "import os\nos.environ['A'] = 'b'; os.system('echo $A')",
    "import time, os\nos.environ['TZ'] = 'Asia/Tokyo'; time.tzset(); print(time.tzname)",
    "import runpy\nrunpy.run_module('json.tool', run_name='x')",
    "import code; print(code)",
    "import this",
    "import __main__; print(vars(__main__).keys())",
    "exec('x = 1'); print(x, globals().keys())",
    "print(*(line for line in open('/proc/self/maps') if 'heap' in line and 0))",
    "import ctypes; print(ctypes.CDLL(None).getpid() > 0, ctypes.pythonapi.Py_IsInitialized())",
    "import ctypes; ctypes.CDLL(None).printf(b'from C\\n')",
    "import resource; print([resource.getrlimit(n) for n in range(15)])",
    "import sys; sys.setrecursionlimit(50)\ndef f(n): return n and f(n - 1)\nprint(f(20))\nf(60)",
    "import sys; print(sys.stdout.isatty(), sys.stdin.fileno(), sys.stdout.encoding)",
    "print('ü€😀'); import sys; sys.stdout.buffer.write(b'\\xff')",
    "import sqlite3; print(sqlite3.connect(':memory:').execute('select 1').fetchone())",
    "import jinja2; print(jinja2.Template('{{ a }}').render(a=1))",
    "import unittest.mock as m; print(m.Mock(return_value=2)())",
    "import pdb; print(pdb.Pdb)",
    "help",
    "import sys; print(len(sys.modules)); import requests; print('requests' in sys.modules, "
    "sys.modules['requests'] is requests)",
]
MODES: list[tuple[list[str], str]] = [
    (["python", "-c", "import sys; print(sys.argv, sys.orig_argv, sys.executable)", "-c", "x"], ""),
    (["python3.11", "-c", "import sys; print(sys.orig_argv, sys.executable, sys._base_executable)"], ""),
    (
        ["python3", "-uc", "import sys; print(sys.stdout.line_buffering, sys.stdout.write_through, sys.stdout.buffer)"],
        "",
    ),
    (["python3", "-u", "-B", "-c", "import sys; print(sys.flags, sys.dont_write_bytecode, sys.stderr.buffer)"], ""),
    (["python3", "-Bcprint(1)", "a"], ""),
    (["python3", "script.py", "a", "-c"], ""),
    (["python3", "./script.py"], ""),
    (["python3", "sub/link.py"], ""),
    (["python3", "/none.py"], ""),
    (["python3", "sub"], ""),
    (["python3", "fails.py"], ""),
    (["python3", "stops.py"], ""),
    (["python3", "syntax.py"], ""),
    (["python3", "-m", "package", "a"], ""),
    (["python3", "-m", "package.part"], ""),
    (["python3", "-m", "fails"], ""),
    (["python3", "-m", "stops"], ""),
    (["python3", "-m", "interrupted"], ""),
    (["python3", "interrupted.py"], ""),
    (["python3", "-m", "nowhere"], ""),
    (["python3", "-m", "json.tool"], '{"a": 1}'),
    (["python3", "-m", "timeit", "-n1", "-r1", "-h"], ""),
    (["python3", "-m", "unittest", "-h"], ""),
    (["python3", "spawns.py"], ""),
    (["python3", "serves.py"], ""),
    (["python3"], "import sys\nprint(sys.argv, __name__, dir())\n1/0\n"),
    (["python3", "-", "x"], "import sys\nprint(sys.argv, sys.path[0] == '', sys.stdin.read())\n"),
    (["python3", "-u"], "print(input())\nx"),
    (["python3", "-c"], ""),
    (["python3", "--version"], ""),
    (["python3", "-I", "-c", "import sys; print(sys.flags, sys.path)"], ""),
    (["python3", "-X", "utf8", "-c", "import sys; print(sys.flags)"], ""),
    (["python3", "-W", "error", "-c", "import warnings; warnings.warn('x')"], ""),
    (["python3", "-O", "-c", "assert False; print(__debug__)"], ""),
    (["python3", "-i", "-c", "print(1)"], "print(2)\n"),
    (["python3", "-S", "-c", "import sys; print('site' in sys.modules)"], ""),
    (["python3", "-q", "-c", "import json; print(json.__name__)"], ""),
    (["sh", "-c", "python3 -c 'import sys; print(sys.argv)' b"], ""),
    (["python3", "-c", "import yours; print(yours.x)"], ""),
    (["python3", "shadow/run.py"], ""),
]
FILES = {
    "script.py": "import sys, json\nprint(sys.argv, sys.path[0])\n"
    "print(__file__, __name__, __spec__, __cached__, __loader__)\n"
    "print(list(sys.modules), sys._getframe().f_back, open(__file__).read()[:6], dir())",
    "yours.py": "x = 'yours'",
    "fails.py": "def f():\n    1/0\nif __name__ == '__main__':\n    f()\n",
    "stops.py": "import sys\nsys.exit('stopped')\n",
    "interrupted.py": "raise KeyboardInterrupt\n",
    "syntax.py": "x = (\n",
    "package/__init__.py": "print('package', __name__)",
    "package/__main__.py": "import sys\nprint(sys.argv, sys.path[0])\n"
    "print(__name__, __package__, __spec__, __file__, sys.orig_argv)",
    "package/part.py": "from . import __name__ as name\nimport sys\nprint(name, __name__, list(sys.modules))\n1/0",
    "sub/other.py": "print('other', __name__)",
    "shadow/json.py": "raise ValueError('your json')",
    "shadow/run.py": "import decimal\ntry: import requests\nexcept ValueError as e:\n    print(e)\nimport json",
    "spawns.py": "import multiprocessing as m, sys\ndef f(x): return x + 1, __name__\nif __name__ == '__main__':\n"
    "    for how in ('spawn', 'forkserver', 'fork'):\n"
    "        with m.get_context(how).Pool(1) as p: print(how, p.map(f, [1]))\n",
    "serves.py": "import socketserver, threading, urllib.request, http.server\n"
    "class H(http.server.BaseHTTPRequestHandler):\n    def do_GET(self): self.send_response(204); self.end_headers()\n"
    "    def log_message(self, *a): pass\n"
    "s = http.server.HTTPServer(('127.0.0.1', 0), H); threading.Thread(target=s.serve_forever, daemon=True).start()\n"
    "print(urllib.request.urlopen(f'http://127.0.0.1:{s.server_port}').status)\n",
}
ENVIRONMENTS: list[dict[str, str]] = [
    {"TZ": "Asia/Tokyo"},
    {"LANG": "en_US.UTF-8"},
    {"LC_ALL": "C"},
    {"PYTHONPATH": "lib:/opt/none"},
    {"PYTHONPATH": "shadow"},
    {"PYTHONUNBUFFERED": "1"},
    {"PYTHONDONTWRITEBYTECODE": "1"},
    {"PYTHONHASHSEED": "7"},
    {"PYTHONOPTIMIZE": "1"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONIOENCODING": "latin-1"},
    {"OMP_NUM_THREADS": "1"},
    {"PATH": "bin:/usr/bin:/bin"},
    {"HOME": "/tmp"},
]
PROBES = """
import json, sys, os, time, warnings, locale
print(sys.path, sys.flags, hash("a") if os.environ.get("PYTHONHASHSEED") else 0, time.tzname, json.__file__)
print(sys.stdout.encoding, sys.stdout.errors, sys.stdout.write_through, locale.setlocale(0), sys.dont_write_bytecode)
print(sorted(os.environ), warnings.filters, sys.executable, os.path.expanduser("~"))
"""


@dataclass(frozen=True)
class Forking:
    """A sandbox whose zygote is ready."""

    service: Service
    box: str
    home: Path

    async def run(self, argv: list[str], fork: bool, stdin: str = "", **env: str) -> dict[str, Any]:
        """The answer of a command, without what differs from one process to another."""
        variables = {SWITCH: "yes" if fork else "0", **env}
        answer = await self.service.run(self.box, *argv, stdin=stdin, envVars=variables)
        del answer["processID"]
        return {name: hidden(value) if isinstance(value, str) else value for name, value in answer.items()}

    async def is_fork(self, *argv: str, **env: str) -> bool:
        answer = await self.service.run(self.box, *(argv or ("python3",)), "-c", IS_FORK, envVars=env)
        (*_, last) = answer["stdout"].splitlines()
        assert last in ("True", "False"), answer
        return str(last) == "True"

    async def ready(self) -> None:
        """Wait until there is a zygote. The first command that could use one starts it."""
        for _ in range(300):
            if await self.is_fork():
                return
            await asyncio.sleep(0.1)
        pytest.fail("there is no zygote")

    async def both(self, argv: list[str], stdin: str = "", **env: str) -> None:
        """Run the program both ways and compare."""
        outcomes = []
        for fork in (False, True):
            for path in (self.home / "work").iterdir() if (self.home / "work").exists() else ():
                path.unlink()
            answer = await self.run(argv, fork, stdin, **env)
            out = self.home / "out.txt"
            outcomes.append((answer, out.read_text() if out.exists() else None))
            out.unlink(missing_ok=True)
        assert outcomes[1] == outcomes[0], argv


def hidden(text: str) -> str:
    """A program's text without addresses, process ids and the switch, which two runs never share."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"(?<=MainThread, started )\d+|(?<=Thread )0x\w+", "", text)
    return re.sub(rf"{SWITCH}=(yes|0)", SWITCH, text)


@pytest.fixture(scope="module")
async def forking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Forking]:
    """One sandbox for all programs of this file."""
    directory = tmp_path_factory.mktemp("instant")
    async with serving(directory, Unisolated(directory, warm={"code_interpreter": WARM})) as running:
        box = await running.create()
        home = Path(running.sandboxes.get(running.owner, box).guest.home)
        for name, text in FILES.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text(text)
        (home / "sub/link.py").symlink_to("../script.py")
        found = Forking(running, box, home)
        await found.ready()
        yield found


@pytest.mark.parametrize("module", IMPORTS)
async def test_imports(forking: Forking, module: str) -> None:
    """An import loads what it loads, in its order, and nothing else is visible."""
    shown = "sorted" if module.startswith("requests") else "list"  # charset_normalizer imports in the order of a set
    await forking.both(["python3", "-c", f"import sys, {module}; print({shown}(sys.modules))"])


@pytest.mark.parametrize("expressions", TABLE.strip().split("\n"))
async def test_state(forking: Forking, expressions: str) -> None:
    """Whatever a program sees of its process is what a fresh one shows."""
    await forking.both(["python3", "-c", f"import os, sys\nfor each in ({expressions}): print(repr(each))", "a"])


@pytest.mark.parametrize("program", PROGRAMS)
async def test_programs(forking: Forking, program: str) -> None:
    """Output, exit status and files of a program are those of a fresh interpreter."""
    await forking.both(["python3", "-c", program], "one\ntwo\n")


@pytest.mark.parametrize(("argv", "stdin"), MODES, ids=[" ".join(argv)[:50] for argv, _ in MODES])
async def test_arguments(forking: Forking, argv: list[str], stdin: str) -> None:
    """Every way to name a program runs it."""
    await forking.both(argv, stdin)


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=str)
async def test_environments(forking: Forking, env: dict[str, str]) -> None:
    """What an interpreter reads of its environment counts."""
    await forking.both(["python3", "-c", PROBES], **env)


async def test_they_are_forks(forking: Forking) -> None:
    """The programs above are compared with forks, and what can't be a fork is none."""
    python = str(Path(sys.executable).with_name("python3"))
    for argv in (["python"], ["python3.11"], [python], ["python3", "-u"], ["python3", "-B"], ["python3", "-uB"]):
        assert await forking.is_fork(*argv) is (Path(sys.executable).with_name(Path(argv[0]).name).exists()), argv
    for env in ({"TZ": "Asia/Tokyo"}, {"PYTHONPATH": "lib"}, {"PYTHONUNBUFFERED": "1"}):
        assert await forking.is_fork(**env), env
    for argv in (["python3", "-I"], ["python3", "-X", "utf8"], ["sh", "-c", 'exec python3 "$@"', "x"]):
        assert not await forking.is_fork(*argv), argv
    for env in ({SWITCH: "0"}, {"PYTHONHASHSEED": "1"}, {"LC_ALL": "C"}, {"OMP_NUM_THREADS": "1"}):
        assert not await forking.is_fork(**env), env


# -- terminals, groups, the zygote's end, pairs


async def test_a_terminal(forking: Forking) -> None:
    """A program with a terminal owns it, is interrupted by its keys, and is line buffered."""
    code = (
        "import os, sys\nprint(sys.stdout.line_buffering, os.tcgetpgrp(0) == os.getpid(), os.ttyname(0), "
        "os.environ['TERM'])"
    )
    waiting = "import time\nprint('? ', flush=True)\nwhile True: time.sleep(0.1)"
    for fork in (False, True):
        made = await start(
            forking.service, forking.box, "python3", "-c", f"{code}\n{IS_FORK}\n{waiting}",
            pty={"cols": 80, "rows": 24}, envVars={SWITCH: "yes" if fork else "0"},
        )  # fmt: skip
        async with attached(forking.service, forking.box, made["pid"]) as follower:
            shown = await follower.until(r"\? ")
            assert shown.startswith("True True /dev/pts/")
            assert f"xterm-256color\r\n{fork}" in shown
            assert await write(forking.service, forking.box, made["pid"], "\x03") == 204
            await follower.end()
        ended = await record(forking.service, forking.box, made["pid"])
        assert (ended["exitCode"], ended["signal"]) == (130, 2)


async def test_a_timeout_ends_the_group(forking: Forking) -> None:
    """A fork has a process group of its own, which a timeout ends."""
    code = "import os, time\nif os.fork(): print(os.getpgrp() == os.getpid(), flush=True)\ntime.sleep(60)"
    answer = await forking.service.run(forking.box, "python3", "-c", code, timeout=1)
    assert (answer["stdout"], answer["exitCode"], answer["timedOut"]) == ("True\n", 124, True)


async def test_killed_while_it_starts(forking: Forking) -> None:
    """A command that is killed at once ends, and leaves no process."""
    for _ in range(10):
        answer = await forking.service.run(forking.box, "python3", "-c", "import time; time.sleep(60)", timeout=0.001)
        assert answer["timedOut"], answer
    assert await forking.is_fork()


async def test_many_at_once(forking: Forking) -> None:
    """Programs that start at the same moment do not mix, and share no random state."""
    code = "import random, sys; print(sys.argv[1], sys.stdin.read(), random.random(), file=sys.stderr)"
    answers = await asyncio.gather(
        *(forking.service.run(forking.box, "python3", "-c", code, str(n), stdin=f"in {n}") for n in range(12))
    )
    texts = [answer["stderr"].split() for answer in answers]
    assert [text[:3] for text in texts] == [[str(n), "in", str(n)] for n in range(12)]
    assert len({text[3] for text in texts}) == 12


async def zygote(forking: Forking) -> int:
    """The zygote's process id, which a program finds as anybody could."""
    code = (
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    try:\n"
        "        text, stat = open(f'/proc/{pid}/cmdline').read(), open(f'/proc/{pid}/stat').read()\n"
        "    except OSError: continue\n"
        "    if 'guest_agent.imports' in text and pid != str(os.getpid()) and "
        "stat.rpartition(')')[2].split()[1] == str(os.getppid()): print(pid)"
    )
    answer = await forking.service.run(forking.box, "python3", "-c", code, envVars={SWITCH: "0"})
    return int(answer["stdout"])


async def test_a_killed_zygote_costs_speed(forking: Forking) -> None:
    """Programs that run go on and are told about, the next one runs, and later ones are forks again."""
    running = asyncio.create_task(
        forking.service.run(forking.box, "python3", "-c", "import time, sys; time.sleep(1); sys.exit(7)")
    )
    await asyncio.sleep(0.3)
    os.kill(await zygote(forking), signal.SIGKILL)
    assert not await forking.is_fork()
    assert (await running)["exitCode"] == 7
    await forking.ready()


async def test_a_stopped_zygote_costs_seconds(forking: Forking) -> None:
    """A zygote that does not answer is given up, and the program runs once."""
    os.kill(await zygote(forking), signal.SIGSTOP)
    begun = time.monotonic()
    answers = await asyncio.gather(
        *(forking.service.run(forking.box, "python3", "-c", "print('ran')", timeout=20) for _ in range(2))
    )
    assert [answer["stdout"] for answer in answers] == ["ran\n"] * 2
    assert time.monotonic() - begun < 16
    await forking.ready()


# -- packages that change

COLOUR = "import colour.names; print(colour.VERSION, colour.names.RED)"


@pytest.fixture
async def changing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Forking, Path]]:
    """A sandbox whose zygote has imported `colour`, and its site-packages."""
    directory = tmp_path_factory.mktemp("changing")
    packages = venv_with(directory / "venv")
    argv = [str(directory / "venv/bin/python3"), "-m", "guest_agent"]
    driver = Unisolated(directory, argv, warm={"code_interpreter": ["colour.names"]})
    async with serving(directory, driver) as running:
        box = await running.create()
        found = Forking(running, box, Path(running.sandboxes.get(running.owner, box).guest.home))
        await found.ready()
        assert (await found.run(["python3", "-c", COLOUR], True))["stdout"] == "1 red\n"
        yield found, packages


def rename(packages: Path, home: Path) -> None:
    (packages / "colour").rename(packages / "color")


def replace(packages: Path, home: Path) -> None:
    """As pip does: the old package goes, a new one and its metadata come."""
    shutil.rmtree(packages / "colour")
    (packages / "colour").mkdir()
    (packages / "colour/__init__.py").write_text("VERSION = 2\n")
    (packages / "colour/names.py").write_text("RED = 'rouge'\n")
    (packages / "colour-2.dist-info").mkdir()


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "replaced": replace,
    "removed": rename,
    "edited": lambda packages, _: (packages / "colour/names.py").write_text("RED = 'crimson'\n"),
    "edited package": lambda packages, _: (packages / "colour/__init__.py").write_text("VERSION = 22\n"),
    "sitecustomize": lambda packages, _: (packages / "sitecustomize.py").write_text("print('customized')\n"),
    "pth": lambda packages, _: (packages / "new.pth").write_text("import sys; print('path')\n"),
    "edited pth": lambda packages, _: append(packages / "all.pth", "import sys; print('more')\n"),
    "another module": lambda packages, _: (packages / "other.py").write_text(""),
    "a module of the user's": lambda _, home: (home / "colour.py").write_text("VERSION = 'mine'"),
    "configuration": lambda packages, _: append(packages.parents[2] / "pyvenv.cfg", "\n# changed\n"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_changes(changing: tuple[Forking, Path], change: str) -> None:
    """The next process sees what has changed among its packages."""
    forking, packages = changing
    CHANGES[change](packages, forking.home)
    for _ in range(2):
        await forking.both(["python3", "-c", COLOUR])
    await forking.ready()  # with what is there now
    await forking.both(["python3", "-c", COLOUR])


async def test_a_change_while_a_program_runs(changing: tuple[Forking, Path]) -> None:
    """A program that has not imported a package yet gets the new one."""
    forking, packages = changing
    code = f"import time\ntime.sleep(1)\n{COLOUR}\n{IS_FORK}"
    running = asyncio.create_task(forking.service.run(forking.box, "python3", "-c", code))
    await asyncio.sleep(0.5)
    replace(packages, forking.home)
    assert (await running)["stdout"] == "2 rouge\nTrue\n"
