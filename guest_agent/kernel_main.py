"""The process that kernels are forked from, and our changes to IPython's kernel.

Importing pandas, scikit-learn and matplotlib takes seconds. Forking a process that has already done so takes
milliseconds. So the agent starts this *nursery* once and lets it import the template's modules. Every kernel (the
first, and each after a restart) is a fork of it. The nursery itself never runs user code.

Agent and nursery talk in JSON lines on the socket FD:

    {"warm": [modules]}                       -> {"warmed": seconds}
    {"is_current": {environment}}             -> {"current": whether a fork is what a fresh interpreter would be}
    {"fork": connection_file, "env": {...}}   -> {"pid": n}
                                  unasked     -> {"exited": pid, "status": wait status}

Each kernel connects to the socket `resume` beside its connection file. A JSON list on it has the environment of the
sandbox that this kernel now belongs to, and for a copy of a kernel at work the variables that are new, else null. The
kernel renews the state that clones must not share and answers with its new session id. A thread waits for the list,
because the way over the control channel takes ten times as long and every create pays for it.
"""

import asyncio
import contextlib
import importlib
import json
import locale
import os
import random
import selectors
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.jsonutil import json_default
from jupyter_client.session import Session, json_packer

from guest_agent import namespace, results, tables
from guest_agent.cells import Cells
from guest_agent.completion import imported
from guest_agent.output import OutStream
from guest_agent.startup import INLINE, Imported, python_path
from guest_agent.tracebacks import Tracebacks
from guest_agent.views import Views

TEXT_PIECE = 1024 * 1024


def adopt(env: dict[str, str], path: list[str]) -> None:
    """Make `env` the environment, and read again what a process reads of it when it starts.

    Args:
        path: `sys.path` of an interpreter that was started without PYTHONPATH.
    """
    before = os.environ.get("MPLBACKEND", INLINE)
    coerced = {name: value for name, value in os.environ.items() if name == "LC_CTYPE"}  # the interpreter sets it
    os.environ.clear()
    os.environ.update(coerced | env)
    time.tzset()
    with contextlib.suppress(locale.Error):  # the machine has no such locale; an interpreter starts all the same
        locale.setlocale(locale.LC_CTYPE, "")
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:] = [*python_path(env), *path]
    importlib.invalidate_caches()
    backend = os.environ.setdefault("MPLBACKEND", INLINE)
    if backend != before and "matplotlib" in sys.modules:
        sys.modules["matplotlib"].use(backend)


def reseed() -> None:
    """Give fresh randomness to every generator of this process that was seeded before a restore or a fork.

    The string hash seed and the address layout can't be renewed, so clones of one template share them.
    """
    random.seed()
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(list(os.urandom(32)))
    ssl.RAND_add(os.urandom(64), 64.0)
    tempfile._name_sequence = None  # type: ignore[attr-defined]  # otherwise its private generator keeps its seed


def show_agg_figures() -> None:
    """Display and close open figures after a cell that switched to the file-only backend (`matplotlib.use("Agg")`).

    The inline backend does this for its own figures. Scripts written for a terminal switch away from it, and would
    otherwise lose their figures.
    """
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or sys.modules["matplotlib"].get_backend().lower() != "agg":
        return
    from IPython.display import display

    for number in pyplot.get_fignums():
        display(pyplot.figure(number))  # type: ignore[no-untyped-call]
    pyplot.close("all")


def pack(message: Any) -> bytes:
    """JSON as UTF-8. A character that can't be UTF-8 (a lone surrogate, as in a file name of other bytes) becomes `?`.

    Jupyter's own packer would send bytes that no reader takes, or fail, and the message would be lost.
    """
    try:
        text = json.dumps(message, default=json_default, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = json_packer(message).decode("utf-8", "replace")  # Jupyter's packer cleans values unknown to JSON
    return text.encode("utf-8", "replace")


class SandboxSession(Session):
    """Jupyter's session, with printed text in messages of at most TEXT_PIECE characters.

    ipykernel puts all text of 0.2 s into one message. 200 MB in one message would pass every reader's limits.
    """

    def send(self, stream: Any, msg_or_type: Any, content: Any = None, *args: Any, **options: Any) -> Any:
        # ipykernel's output streams hand over a finished message, not a type and its content.
        is_text = isinstance(msg_or_type, dict) and msg_or_type["msg_type"] == "stream"
        if is_text and len(msg_or_type["content"]["text"]) > TEXT_PIECE:
            whole, parent = msg_or_type["content"], msg_or_type["parent_header"]
            *firsts, last = [whole["text"][at : at + TEXT_PIECE] for at in range(0, len(whole["text"]), TEXT_PIECE)]
            for text in firsts:
                super().send(stream, self.msg("stream", {**whole, "text": text}, parent=parent), *args, **options)
            msg_or_type = self.msg("stream", {**whole, "text": last}, parent=parent)
        return super().send(stream, msg_or_type, content, *args, **options)


def leave() -> None:
    """End the cell, as `sys.exit()` does. A kernel that ended would take variables and later cells with it."""
    raise SystemExit


class SandboxKernel(IPythonKernel):
    """IPython's kernel with figures inline, whatever was imported before it started.

    It ignores SIGINT except in a cell and in a widget's callback. So every request is answered, and the agent knows
    from `cells` which cell a signal would reach.
    """

    cells: Cells
    _outputs: list[OutStream]

    def pre_handler_hook(self) -> None:
        """Leave SIGINT ignored. ipykernel would let it end the handling of any message, without an answer to it."""

    def post_handler_hook(self) -> None:
        pass

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        signal.signal(signal.SIGINT, self._signal_arrived)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _signal_arrived(self, number: int, frame: FrameType | None) -> None:
        self.cells.signal_arrived()
        signal.default_int_handler(number, frame)

    async def do_execute(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Run a cell. It has a reply whenever a signal comes."""
        if threading.current_thread() is not threading.main_thread():  # a subshell's cell gets no signal
            return await super().do_execute(*args, **options)  # type: ignore[no-any-return, no-untyped-call]
        parent = self.get_parent("shell")  # type: ignore[no-untyped-call]
        env = parent["metadata"].get("e2b")
        self.cells.begin(parent["header"]["msg_id"])
        try:
            with contextlib.nullcontext() if env is None else results.shown(self.shell, env), self._interruptible():
                return await super().do_execute(*args, **options)  # type: ignore[no-any-return, no-untyped-call]
        except (Exception, KeyboardInterrupt, asyncio.CancelledError) as stopped:  # noqa: BLE001  not the cell's code
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            name = type(stopped).__name__
            error = {"ename": name, "evalue": str(stopped), "traceback": [name]}
            self.send_response(self.iopub_socket, "error", error)  # type: ignore[no-untyped-call]
            return {"status": "error", **error, "execution_count": self.execution_count, "payload": []}
        finally:
            for output in self._outputs:
                output.drain()
            self.cells.end()

    async def do_debug_request(self, msg: dict[str, Any]) -> Any:
        """Tell the variables if the gateway asks for them. The debugger's own list would run everybody's `__repr__`."""
        if msg.get("command") == "cellvmVariables":
            return {"success": True, "body": {"variables": namespace.listed(self.shell)}}
        return await super().do_debug_request(msg)  # type: ignore[no-untyped-call]

    def init_metadata(self, parent: dict[str, Any]) -> dict[str, Any]:
        """Begin the metadata of a cell's reply, and remember the variables that there are."""
        metadata: dict[str, Any] = super().init_metadata(parent)  # type: ignore[no-untyped-call]
        if threading.current_thread() is threading.main_thread():  # a subshell's cell runs beside others
            metadata["cellvm"] = namespace.marks(self.shell)
        return metadata

    def finish_metadata(
        self, parent: dict[str, Any], metadata: dict[str, Any], reply_content: dict[str, Any]
    ) -> dict[str, Any]:
        """Tell in the metadata of a cell's reply what the cell has changed."""
        before = metadata.pop("cellvm", None)
        if before is not None and reply_content["status"] != "aborted":
            variables = namespace.changes(self.shell, before)
            if variables is not None:
                metadata["cellvm"] = {"changes": {"variables": variables}}
        return super().finish_metadata(parent, metadata, reply_content)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def _cancel_on_sigint(self, future: "asyncio.Future[Any]") -> Iterator[None]:
        """Let a signal stop a cell that awaits. ipykernel's own way does not wake a loop in which nothing happens.

        Code that runs when the signal comes is stopped there, because it may not return to the loop for long. It is
        stopped by a CancelledError, because a KeyboardInterrupt that leaves a task ends the loop, and so the kernel.
        """
        loop = asyncio.get_running_loop()

        def arrived(number: int, frame: FrameType | None) -> None:
            self.cells.signal_arrived()
            if self.cells.stopped == self.cells.running:
                return  # its traceback is being made
            task = asyncio.current_task(loop)
            if task is not future:
                future.cancel()  # at once, so that no other task of the cell begins
                loop.call_soon_threadsafe(lambda: None)  # a loop that waits for events wakes up
            if task is not None:
                raise asyncio.CancelledError

        before = signal.signal(signal.SIGINT, arrived)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def do_complete(self, code: str, cursor_pos: int | None) -> dict[str, Any]:  # type: ignore[override]  # as above it
        """Complete code, also by what its imports will bind. The user's own names come first."""
        assert self.shell is not None
        known = imported(code[:cursor_pos])
        self.shell.Completer.global_namespace = ChainMap(self.shell.user_global_ns, known)
        return super().do_complete(code, cursor_pos)  # type: ignore[no-any-return, no-untyped-call]

    def start(self) -> None:
        """Start, and connect the modules that the nursery imported before there was a shell."""
        super().start()  # type: ignore[no-untyped-call]
        reseed()
        self._outputs = [each for each in (sys.stdout, sys.stderr) if isinstance(each, OutStream)]
        assert self.shell is not None
        if "matplotlib" in sys.modules and os.environ["MPLBACKEND"] == INLINE:
            self.shell.run_line_magic("matplotlib", "inline")
        # Completions come from live objects and from `completion`, because jedi would first read sources. That takes
        # seconds in which no cell runs, and half a minute in an emulated machine.
        self.shell.Completer.use_jedi = False
        before = self.shell.InteractiveTB
        self.shell.InteractiveTB = Tracebacks(  # type: ignore[no-untyped-call]
            mode=before.mode, theme_name=before._theme_name, tb_offset=before.tb_offset
        )
        # IPython would render each traceback a second time for its history.
        self.shell._format_exception_for_storage = lambda *_, **__: self.shell._last_traceback or []
        show = self.shell.showtraceback

        def showtraceback(*args: Any, **options: Any) -> Any:
            self.cells.stop()
            return show(*args, **options)

        self.shell.showtraceback = showtraceback
        self.shell.ask_exit = leave  # `exit`, `quit` and `exit()` come here
        warnings.filterwarnings("ignore", message="To exit: use 'exit'")
        on_comm_message = self.shell_handlers["comm_msg"]

        def comm_message(*args: Any) -> Any:
            with self._interruptible():
                return on_comm_message(*args)

        self.shell_handlers["comm_msg"] = comm_message
        self.shell.events.register("post_execute", show_agg_figures)
        Views().connect(self.shell)
        tables.connect(self.shell)


class SandboxKernelApp(IPKernelApp):
    """IPython's application, whose sockets hold what their reader has not read yet."""

    def _bind_socket(self, s: "zmq.Socket[bytes]", port: int) -> int:
        # ZMQ drops what is beyond this limit, and a slow reader must not cost output. Output waits in the sandbox's own
        # memory. Readers that come later have the limit of this moment, whatever is set after it.
        s.sndhwm = 0
        return super()._bind_socket(s, port)  # type: ignore[no-any-return, no-untyped-call]


def await_resumes(channel: socket.socket, session: Any, shell: Any, path: list[str]) -> None:
    """Make this kernel another sandbox's whenever the agent says so."""
    for line in channel.makefile("rb"):
        reseed()
        env, added = json.loads(line)
        if added is None:
            adopt(env, path)
            shell.init_environment()  # what the shell itself sets
        else:
            os.environ.update(added)
        session.session = uuid.uuid4().hex
        channel.sendall(json.dumps(session.session).encode() + b"\n")


def run_kernel(connection_file: str, env: dict[str, str]) -> None:
    """Be a kernel until it is shut down."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(env["HOME"])
    adopt(env, list(sys.path))
    sys.orig_argv[1:] = ["-m", "ipykernel_launcher", "-f", connection_file]
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # when memory runs out, the user's kernel ends, not the nursery
    sys.argv = [""]  # as in an interactive Python, because our own arguments would be taken for the user's
    SandboxKernel.cells = Cells(Path(connection_file).with_name("cells"))
    session = SandboxSession()
    session.pack = pack
    app = SandboxKernelApp.instance(
        connection_file=connection_file,
        kernel_class=SandboxKernel,
        session=session,
        parent_handle=0,
        outstream_class="guest_agent.output.OutStream",
    )
    app.initialize([])  # type: ignore[no-untyped-call]
    path = [part for part in sys.path if part not in python_path(env)]  # with '', which the shell has put in
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(os.path.join(os.path.dirname(connection_file), "resume"))
    threading.Thread(
        target=await_resumes, args=(channel, app.session, app.shell, path), daemon=True, name="resume"
    ).start()
    app.start()  # type: ignore[no-untyped-call]


def fork() -> int:
    """Fork. At the limit of processes wait a while, because killed ones may still be on their way out."""
    for _ in range(200):
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.05)
    return os.fork()


def serve(channel: socket.socket, children: set[int]) -> None:
    """Answer the agent until it closes the channel. `children` gets the process ids of kernels that live."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    lines = channel.makefile("rwb", buffering=0)
    unasked = set(sys.modules)
    imported = Imported(unasked)

    def tell(**message: Any) -> None:
        lines.write(json.dumps(message).encode() + b"\n")

    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 512)
                for pid in list(children):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        children.discard(pid)
                        tell(exited=pid, status=status)
                continue
            if not (line := lines.readline()):
                return
            request = json.loads(line)
            if "warm" in request:
                started = time.monotonic()
                os.environ["MPLBACKEND"] = INLINE
                for module in request["warm"]:
                    importlib.import_module(module)
                imported = Imported(unasked)
                tell(warmed=time.monotonic() - started)
            elif "is_current" in request:
                env = request["is_current"]
                tell(current=imported.are_current([*python_path(env), *sys.path], env["HOME"]))
            else:
                pid = fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    os.close(wake_read)
                    os.close(wake_write)
                    channel.close()
                    lines.close()
                    try:
                        run_kernel(request["fork"], request["env"])
                    except BaseException:  # noqa: BLE001  the child ends here, because the loop is its parent's
                        traceback.print_exc()
                        os._exit(1)
                    os._exit(0)
                children.add(pid)
                tell(pid=pid)


def main() -> None:
    """Be the nursery. The agent starts it by `python -c`, with the way to our package first in `sys.path`."""
    del sys.path[0]
    children: set[int] = set()
    with contextlib.suppress(ConnectionError):  # the agent was killed
        serve(socket.socket(fileno=int(sys.argv[1])), children)
    for pid in children:  # nobody can ask for them any more
        os.kill(pid, signal.SIGKILL)  # it may be too young to have a group of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
