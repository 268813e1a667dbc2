"""The process that Python programs are forked from, and what makes such a fork the program.

`python3 -c "import pandas"` takes half a second, and under emulation ten. A fork of a process that has imported pandas
takes milliseconds. So the agent starts this *zygote*, which imports the template's modules and waits. It runs no
program of the user's itself.

For each program the agent sends one byte with five descriptors: the program's standard input, output and error, a
socket, and a file with a request. The fork writes its process id to the socket and becomes the program. Its parent is
the agent, so it ends, is waited for and is told about as any program. When nothing forks, the socket closes without a
word, and the agent starts the program itself. So it does not matter when or how the zygote ends.

A fork that can't be what a fresh interpreter would be becomes one by `execve`, before it has run anything.

The program runs at the bottom of the stack, as in any interpreter, with no frame of ours below it. For that our main
program ends in the fork. The interpreter then asks the module `threading` to wait for its threads, before it shuts
down. What it finds under that name runs the user's program.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import locale
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import termios
import time
import zipimport
from collections.abc import Callable
from functools import partial
from typing import Any

from guest_agent.imports import Fresh, Recorder, Stash, file_of, stamp, stems
from guest_agent.startup import Program, names_variables, program, python_path

CLONE_PARENT, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x8000, 0x200000, 0x1000000
SYS_CLONE = 56
PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP, PR_GET_TID_ADDRESS = 15, 35, 14, 40
IGNORE_COOKIE = 0x0200
"""The compiler's flag for `-c`, whose text is UTF-8 whatever a comment in it says."""
NO_BYTECODE = 4
"""The place of that flag in `sys.flags`."""
CALLS_BELOW = 2
"""How deep in calls the interpreter believes to be when the program begins. It shall have as many as any."""
OF_KERNELS = ("matplotlib_inline",)
"""Packages that a template names for its kernels. They import IPython, which no program needs."""

_libc = ctypes.PyDLL(None, use_errno=True)  # it keeps the interpreter's lock, as `os.fork` does
_libc.sbrk.restype = ctypes.c_long
_libc.fdopen.restype = ctypes.c_void_p
_python = ctypes.pythonapi


class CompilerFlags(ctypes.Structure):
    """PyCompilerFlags."""

    _fields_ = (("flags", ctypes.c_int), ("version", ctypes.c_int))


class NotHere(Exception):
    """This fork can't be what a fresh interpreter would be."""


def fork() -> int:
    """Fork, and make the child a child of our parent's.

    It is `os.fork` but for that flag. Only a process with one thread may do so, because the C library's own
    preparations are left out. They are about locks that other threads may hold.

    Raises:
        OSError: the system refused.
    """
    thread_id, none = ctypes.c_void_p(), ctypes.c_long(0)
    if _libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(thread_id), none, none, none):
        raise OSError(ctypes.get_errno(), "prctl")
    flags = ctypes.c_long(CLONE_PARENT | CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID | signal.SIGCHLD)
    _python.PyOS_BeforeFork()
    pid: int = _libc.syscall(SYS_CLONE, flags, none, none, thread_id, none)
    number = ctypes.get_errno()
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid


def keep(thing: object) -> None:
    """Keep an object as long as the process, so that the interpreter does not take it apart at its end."""
    _python.Py_IncRef(ctypes.py_object(thing))


def show_as(argv: list[str], env: dict[str, str], name: str) -> None:
    """Let /proc tell these arguments, this environment and this name of the process.

    Raises:
        OSError: the system refused.
    """
    arguments = b"".join(os.fsencode(part) + b"\0" for part in argv)
    variables = b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in env.items())
    area = mmap.mmap(-1, len(arguments) + len(variables) + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(arguments + variables)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    keep(area)
    with open("/proc/self/stat", "rb") as file:
        fields = [0, 0, 0, 0, *map(int, file.read().rpartition(b") ")[2].split()[1:])]  # numbered as in proc(5)
    start_code, end_code, start_stack = fields[26:29]
    start_data, end_data, start_brk = fields[45:48]
    middle = at + len(arguments)
    memory = struct.pack(
        "12QIi",
        *(start_code, end_code, start_data, end_data, start_brk, _libc.sbrk(ctypes.c_long(0)), start_stack),
        *(at, middle, middle, middle + len(variables), 0, 0, -1),
    )
    option, size, none = ctypes.c_long(PR_SET_MM_MAP), ctypes.c_long(len(memory)), ctypes.c_long(0)
    if _libc.prctl(PR_SET_MM, option, memory, size, none):
        raise OSError(ctypes.get_errno(), "prctl")
    _libc.prctl(PR_SET_NAME, os.fsencode(name)[:15], none, none, none)


def set_standard_streams(unbuffered: bool) -> None:
    """Make `sys.stdin`, `sys.stdout` and `sys.stderr` as the interpreter makes them."""
    lenient = "surrogateescape" if locale.setlocale(locale.LC_CTYPE) == "C.UTF-8" else "strict"
    for number, (name, errors) in enumerate((("stdin", lenient), ("stdout", lenient), ("stderr", "backslashreplace"))):
        mode = "w" if number else "r"
        raw = unbuffered and number > 0
        buffer: Any = open(number, mode + "b", 0 if raw else -1, closefd=False)  # noqa: SIM115  the process closes it
        (buffer if raw else buffer.raw).name = f"<{name}>"
        by_line = not unbuffered and (buffer.isatty() or number == 2)
        stream: Any = io.TextIOWrapper(buffer, "utf-8", errors, "\n", line_buffering=by_line, write_through=unbuffered)
        stream.mode = mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def take_place(request: dict[str, Any], descriptors: list[int]) -> None:
    """Do what the agent does in a child before `execve`."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 1024)
    os.chdir(request["cwd"])
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, request["processes"])
    if request["is_protected"]:  # from the end by want of memory, as the agent is; its children must not inherit it
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")


# -- the program at the bottom of the stack ------------------------------------------------------------------------


class Bottom:
    """It has the place of `threading` while our main program ends, and gives the interpreter the user's program."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    @property
    def _shutdown(self) -> Callable[[], object]:
        del sys.modules["threading"]
        for _ in range(CALLS_BELOW):
            _python.Py_LeaveRecursiveCall()
        return self._run


class Last:
    """The last thing that the interpreter takes apart of what a program can see. Then it ends the process.

    The interpreter would go on to take itself apart, and would write to each page that it shares with the zygote.
    """

    def __init__(self, status: int, leave: Callable[..., object]) -> None:
        self._status = ctypes.c_int(status)
        self._leave = leave

    def __del__(self, flush: Callable[[object], object] = _libc.fflush) -> None:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except Exception:  # noqa: BLE001  the interpreter tries again, tells of it, and changes the status
            return
        flush(None)
        self._leave(self._status)


def libraries_loaded() -> int:
    """The number of shared libraries that this process has ever loaded, counted by the loader."""
    counts: list[int] = []

    def take(info: Any, size: int, data: object) -> int:
        counts.append(info[4])  # dlpi_adds
        return 1  # enough

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t, ctypes.c_void_p)
    _libc.dl_iterate_phdr(kind(take), None)
    return counts[0]


class Zygote:
    """What the zygote knows of itself, and how a fork of it becomes a program."""

    def __init__(self, fresh: Fresh, stash: Stash) -> None:
        self._fresh = fresh
        self._stash = stash
        folders = [part for part in fresh.path if os.path.isdir(part)]
        files = {name: file for name, module in fresh.modules.items() if os.path.exists(file := file_of(module))}
        read = [os.path.join(part, name) for part in folders for name in os.listdir(part) if name.endswith(".pth")]
        self._read = {file: stamp(file) for file in [*files.values(), *read, os.path.join(sys.prefix, "pyvenv.cfg")]}
        self._libraries = libraries_loaded()
        self._first = files.keys() | {"sitecustomize", "usercustomize"}

    def is_current(self) -> bool:
        """Whether nothing has changed that an interpreter reads when it starts, or that was imported ahead."""
        return self._stash.are_current() and all(stamp(file) == before for file, before in self._read.items())

    def become(self, request: dict[str, Any], program: Program) -> None:
        """Make this process the program. It begins to run when our main program has ended.

        Raises:
            NotHere: it can't be that program.
            OSError: something that it needs could not be done.
        """
        env, path = request["env"], python_path(request["env"])
        if any(stems(part) & self._first for part in path):
            raise NotHere("a directory of PYTHONPATH replaces what is imported at the start")
        show_as(request["argv"], env, os.path.basename(request["executable"]))
        os.environ.clear()
        os.environ.update(env)
        time.tzset()
        locale.setlocale(locale.LC_CTYPE, "")
        first, run = self._prepared(program)
        self._set_sys(request, program)
        sys.path[:0] = [*first, *path]
        set_standard_streams(program.unbuffered)
        sys.modules["threading"] = Bottom(run)  # type: ignore[assignment]

    def _prepared(self, program: Program) -> tuple[list[str], Callable[[], object]]:
        """What comes first in `sys.path`, and what runs the program."""
        if program.kind == "command":
            command = program.what.encode()
            self._read_text(command)
            return [""], self._run_text(command)
        if program.kind == "module":
            return [os.getcwd()], partial(self._run_module, program.what)
        if program.kind == "stdin":
            file = os.memfd_create("stdin")
            while data := os.read(0, 65536):
                os.write(file, data)
            os.lseek(file, 0, os.SEEK_SET)
            try:
                self._read_text(os.pread(file, os.fstat(file).st_size, 0))
            except NotHere:
                os.dup2(file, 0)  # for the interpreter that reads it in our place
                raise
            return [""], self._run_file(file, "<stdin>")
        script = program.what
        if not os.path.isfile(script) or script.endswith(".pyc"):
            raise NotHere("it is no file with a program's text")
        with contextlib.suppress(zipimport.ZipImportError):
            zipimport.zipimporter(script)
            raise NotHere("it is an archive")
        with open(script, "rb") as text:
            self._read_text(text.read())
        name = os.path.join(os.getcwd(), script)
        sys.path_importer_cache[name] = None
        return [os.path.dirname(os.path.realpath(script))], self._run_file(
            os.open(script, os.O_RDONLY | os.O_CLOEXEC), name
        )

    def _read_text(self, text: bytes) -> None:
        if variables := names_variables(text.decode("utf-8", "replace"), self._stash.reads):
            raise NotHere(f"it may set {variables} before it imports what has read them")

    def _set_sys(self, request: dict[str, Any], program: Program) -> None:
        sys.argv = list(program.argv)
        sys.orig_argv = request["argv"]
        base = sys._base_executable  # type: ignore[attr-defined]
        if base != os.path.realpath(sys.executable):  # in early versions of 3.11 it has the name that was called
            base = os.path.join(os.path.dirname(base), os.path.basename(request["executable"]))
        sys.executable, sys._base_executable = request["executable"], base  # type: ignore[attr-defined]
        main = sys.modules["__main__"] = type(sys)("__main__")  # a new one, which the collector of garbage sees
        vars(main).update({**self._fresh.main, "__annotations__": {}})
        if program.no_bytecode:
            sys.dont_write_bytecode = True
            place, one = ctypes.c_ssize_t(NO_BYTECODE), ctypes.py_object(1)
            _python.PyStructSequence_SetItem(ctypes.py_object(sys.flags), place, one)

    # -- the end

    def _end(self, status: int, error: type[BaseException] | None = None) -> None:
        """Let the interpreter end with this status. It goes on to shut down when we return.

        The libraries of the zygote do not free their memory (`_exit`). One that the program has loaded may have
        something to do, as to write a file.
        """
        leave = _libc._exit if libraries_loaded() == self._libraries else _libc.exit
        if error is KeyboardInterrupt:  # the shell shall see that it was interrupted
            status, leave = signal.SIGINT, _libc["raise"]
        vars(sys)["_last"] = Last(status, leave)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()

    def _finish(self, failed: int) -> None:
        """End after the program. SystemExit has ended it already."""
        self._end(int(failed != 0), getattr(sys, "last_type", None) if failed else None)

    def _run_text(self, text: bytes) -> Callable[[], object]:
        """What runs `-c text`."""
        run = _python["PyRun_SimpleStringFlags"]
        run.restype = self._finish
        return partial(run, ctypes.c_char_p(text), ctypes.byref(CompilerFlags(IGNORE_COOKIE, sys.version_info.minor)))

    def _run_file(self, file: int, name: str) -> Callable[[], object]:
        """What runs the program in an open file."""
        run = _python["PyRun_AnyFileExFlags"]
        run.restype = self._finish
        stream = ctypes.c_void_p(_libc.fdopen(file, b"rb"))
        flags = ctypes.byref(CompilerFlags(0, sys.version_info.minor))
        return partial(run, stream, ctypes.c_char_p(os.fsencode(name)), ctypes.c_int(1), flags)

    def _run_module(self, name: str) -> None:
        """Run `-m name`, and end."""
        import runpy  # as a program does

        status, kind = 0, None
        try:
            runpy._run_module_as_main(name)  # type: ignore[attr-defined]
        except SystemExit as stop:
            if isinstance(stop.code, int):
                status = stop.code
            elif stop.code is not None:
                print(stop.code, file=sys.stderr)
                status = 1
        except BaseException as error:  # noqa: BLE001  the interpreter shows any
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next  # the first is our own frame
            sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
            sys.excepthook(sys.last_type, error, sys.last_traceback)
            status, kind = 1, type(error)
        self._end(status, kind)


def be(zygote: Zygote, request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the program that is asked for: by `become`, or else by `execve`."""
    *streams, told = descriptors
    os.setsid()  # before anybody can know the group and kill it
    os.write(told, str(os.getpid()).encode())
    try:
        take_place(request, streams)
        chosen = program(request["argv"], request["env"], terminal=request["terminal"])
        if chosen is None:
            raise NotHere("its arguments are not known")
        zygote.become(request, chosen)
    except Exception:  # noqa: BLE001  whatever it is, the interpreter itself can do it
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the interpreter ignores them
            signal.signal(number, signal.SIG_DFL)
        os.execve(request["executable"], request["argv"], request["env"])  # noqa: S606  no shell is wanted


def serve(fd: int, modules: list[str], fresh: Fresh, recorder: Recorder) -> None:
    """Import the modules, then fork for the agent until it goes, or until what was imported is not current any more.

    It returns in a fork, and nowhere else.
    """
    for module in modules:
        if not module.startswith(OF_KERNELS):
            with contextlib.suppress(ImportError):  # driver `unisolated`: the host may not have the package
                importlib.import_module(module)
    recorder.stop()
    stash = Stash(fresh, recorder.traces)
    zygote = Zygote(fresh, stash)
    stash.on_arrival["numpy.random"] = lambda module: module.seed(list(os.urandom(32)))
    stash.open()
    stash.on_arrival["threading"] = lambda module: module.main_thread()._set_native_id()  # no fork does it
    keep(zygote)
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=fd)
    channel.sendall(b"\n")
    # The agent waits for orphans now. Libraries have started threads, and only the fork of their process has none.
    if not channel.recv(1) or os.fork():
        os._exit(0)
    channel.sendall(b"%d\n" % os.getpid())
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, 1, 5)
        if not data or not zygote.is_current():
            os._exit(0)
        with open(descriptors.pop(), "rb") as file:
            file.seek(0)
            request = json.load(file)
        try:
            pid = fork()
        except OSError:  # there are too many processes
            pid = -1
            os.write(descriptors[-1], b"0")
        if pid == 0:
            channel.detach()
            be(zygote, request, descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
