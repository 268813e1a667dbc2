"""Jupyter's REST operations. A kernel is a sandbox seen by a Jupyter client; its id is the sandbox's in another form.

Source: https://jupyter-server.readthedocs.io/en/latest/developers/rest-api.html
"""

import asyncio
import contextlib
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from kernel_gateway import __version__
from kernel_gateway.api.base import Call
from kernel_gateway.api.rest import Text, check_env, check_text
from kernel_gateway.errors import InvalidRequest, NotFound, TooManyRequests
from kernel_gateway.images.templates import Template
from kernel_gateway.kernel import layout
from kernel_gateway.kernel.journal import Gap
from kernel_gateway.kernel.pages import cost
from kernel_gateway.sandbox.lifecycle import Event
from kernel_gateway.sandbox.sandbox import Sandbox, kernel_id, sandbox_id
from kernel_gateway.tasks import to_its_end

DEAD_FOR = 3600
"""Seconds that a kernel which died stays listed as dead."""
MAX_SESSIONS, MAX_MAKING = 1000, 100
"""Sessions that one key may have, and that may be in the making for one key at once."""
ARGV = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
"""What clients read in a kernelspec. Nobody runs it, because a sandbox's kernel is there already."""
LOGO = (Path(__file__).parent / "logo.svg").read_bytes()


class ApiVersion(Struct):
    version: str


async def api_version(call: Call) -> ApiVersion:
    """The server's version."""
    return ApiVersion(__version__)


class Identity(Struct):
    """Whose key it is. Only the names mean something; the other fields are there for Jupyter's clients."""

    username: str
    name: str
    display_name: str
    initials: str | None = None
    avatar_url: str | None = None
    color: str | None = None


class Me(Struct):
    """An identity. Permissions are empty, because CellVM has scopes of keys instead."""

    identity: Identity
    permissions: Text


async def me(call: Call) -> Me:
    """Who you are: the owner of your key."""
    return Me(Identity(call.owner, call.owner, call.owner), {})


class ServerStatus(Struct):
    """A summary of your kernels."""

    started: str
    last_activity: str
    connections: int
    kernels: int


async def status(call: Call) -> ServerStatus:
    """How many kernels you have, and when they were last used."""
    models = [model(sandbox) for sandbox in call.mine.list()]
    started = jupyter_time(call.sandboxes.started_at)
    return ServerStatus(
        started=started,
        last_activity=max([each.last_activity for each in models], default=started),
        connections=sum(each.connections for each in models),
        kernels=len(models),
    )


# -- kernelspecs


class SpecBody(Struct):
    argv: list[str]
    display_name: str
    language: str
    env: Text
    metadata: dict[str, bool]
    interrupt_mode: str


class SpecModel(Struct):
    """One kind of kernel: a template."""

    name: str
    spec: SpecBody
    resources: Text


class Specs(Struct):
    """All kinds of kernels. A client that names none gets `default`."""

    default: str
    kernelspecs: dict[str, SpecModel]


def spec(call: Call, name: str) -> SpecModel:
    base = call.http.application.settings["base_url"]
    shown = "Python 3 (ipykernel)" if name == ANY_PYTHON else f"Python 3 in a VM ({name})"
    body = SpecBody(ARGV, shown, "python", {}, {"debugger": True}, "signal")
    return SpecModel(name, body, {"logo-svg": f"{base}/kernelspecs/{name}/logo-svg.svg"})


async def list_specs(call: Call) -> Specs:
    """One kernelspec for each template, and `python3` for the default one."""
    names = [ANY_PYTHON, *(template.id for template in call.sandboxes.templates)]
    specs = {name: spec(call, name) for name in names}
    return Specs(call.sandboxes.templates.default.id, specs)


async def get_spec(call: Call) -> SpecModel:
    """One kernelspec."""
    named(call, call.path["name"])
    return spec(call, call.path["name"])


async def spec_file(call: Call) -> None:
    """A kernelspec's logo."""
    named(call, call.path["name"])
    if call.path["file"] != "logo-svg.svg":
        raise NotFound("there is no such file")
    call.http.set_header("Content-Type", "image/svg+xml")
    call.http.set_header("Content-Security-Policy", "sandbox")
    await call.http.finish(LOGO)


ANY_PYTHON = "python3"
"""The kernel's name in notebooks from other servers. Here it means the default template."""
ALIASES = {"python": ANY_PYTHON}
"""Names of old clients. jupyter_client maps them in the same way."""


def named(call: Call, name: str | None) -> Template:
    """The template of that name, or the default one without a name."""
    templates = call.sandboxes.templates
    name = ALIASES.get(name or "", name)
    template = templates.default if name in (None, "", ANY_PYTHON) else templates.find(name)
    if template is None:
        raise NotFound(f"no such kernel spec: {name!r:.100}")
    return template


# -- kernels


class StartKernel(Struct):
    """A new kernel. `env` is seen by every process of its sandbox; `path`, a place on the client, is ignored.

    `kernel_id` may name a kernel that lives. It is the answer then, and nothing is started.
    """

    name: str | None = None
    env: Text | None = None
    path: str | None = None
    kernel_id: str | None = None


class KernelModel(Struct, omit_defaults=True):
    """A kernel. `reason` says why it is dead or restarting."""

    id: str
    name: str
    last_activity: str
    execution_state: str
    connections: int
    sandbox_id: str
    reason: str = ""


def jupyter_time(seconds: float) -> str:
    """A time as Jupyter's clients parse it: with a fraction, and `Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def model(sandbox: Sandbox) -> KernelModel:
    kernel = sandbox.kernel
    return KernelModel(
        id=sandbox.kernel_id,
        name=sandbox.kernel_name,
        last_activity=jupyter_time(kernel.last_activity if kernel else sandbox.started_at.timestamp()),
        execution_state=kernel.state if kernel else "idle" if sandbox.paused_at else "starting",
        connections=kernel.connections if kernel else 0,
        sandbox_id=sandbox.id,
        reason=kernel.reason if kernel else "",
    )


def dead(call: Call, name: str | None = None) -> list[KernelModel]:
    """Kernels that died lately without a request of their owner. Clients learn the reason from them."""
    ended = call.mine.ended_since(time.time() - DEAD_FOR)
    return [
        KernelModel(
            kernel_id(each.id),
            each.template,
            jupyter_time(each.ended or 0),
            "dead",
            0,
            each.id,
            f"the sandbox has ended: {each.reason}",
        )
        for each in ended
        if name in (None, each.id)
    ]


def sandbox_of(call: Call) -> Sandbox:
    """The sandbox of the kernel that the path names, if the key may see it."""
    return call.mine.of_kernel(call.path["kernel"])


async def list_kernels(call: Call) -> list[KernelModel]:
    """Your kernels, and those that died within the last hour.

    A kernel whose time was over is not in the list; `GET /api/kernels/{kernel}` still tells of it.
    """
    lost = [each for each in dead(call) if not each.reason.endswith(Event.EXPIRED)]
    return [model(sandbox) for sandbox in call.mine.list()] + lost


async def start_kernel(call: Call, body: StartKernel) -> KernelModel:
    """Start a kernel in a sandbox of its own. It lives as long as it is used, and a while longer, within a limit."""
    if body.kernel_id:
        try:
            return model(call.mine.of_kernel(body.kernel_id))
        except NotFound:
            raise InvalidRequest(
                f"there is no kernel {body.kernel_id!r:.100}, and a new one gets its id from the server",
                hint="leave `kernel_id` out, and take the id from the answer",
            ) from None
    sandbox = await new_kernel(call, body.name, body.env or {})
    call.http.set_header("Location", f"{call.http.application.settings['base_url']}/api/kernels/{sandbox.kernel_id}")
    return model(sandbox)


async def new_kernel(call: Call, name: str | None, env: dict[str, str]) -> Sandbox:
    """A sandbox of the template `name`, with the lifetimes that the settings give to kernels of Jupyter's clients."""
    check_env(env)
    settings = call.http.application.settings
    idle = settings["kernel_idle_timeout"]
    sandbox = await call.mine.create(
        named(call, name),
        timeout=idle,
        metadata={},
        env=env,
        idle_timeout=idle,
        longest_life=settings["kernel_max_life"],
    )
    if ALIASES.get(name or "", name) == ANY_PYTHON:
        sandbox.kernel_name = ANY_PYTHON  # Lab writes the name into notebooks, which should open elsewhere, too
    return sandbox


async def get_kernel(call: Call) -> KernelModel:
    """One kernel. Its state is `dead` if it died lately by itself."""
    try:
        return model(sandbox_of(call))
    except NotFound:
        for found in dead(call, sandbox_id(call.path["kernel"])):
            return found
        raise


async def delete_kernel(call: Call) -> None:
    """End a kernel, and its sandbox with it."""
    name = sandbox_id(call.path["kernel"])
    if dead(call, name):
        call.mine.forget(name)
    else:
        await call.sandboxes.kill(sandbox_of(call))


async def interrupt_kernel(call: Call) -> None:
    """Interrupt what the kernel runs."""
    await sandbox_of(call).guest.kernel.interrupt()


async def restart_kernel(call: Call) -> KernelModel:
    """Replace the kernel by a fresh one. The answer comes when the new kernel is usable. Files stay."""
    sandbox = sandbox_of(call)
    await sandbox.guest.kernel.restart()
    return model(sandbox)


class JournalQuery(Struct):
    """`since`: number of the last message you have. `wait`: seconds to wait for a newer one when there is none yet."""

    since: Annotated[int, Meta(ge=0)] = 0
    wait: Annotated[float, Meta(ge=0, le=60)] = 0


class JournalPage(Struct):
    """Messages after `since`, about a megabyte of them. Ask again with `next`. `last` is the newest one's number.

    `missing` counts messages in this stretch that are not kept any more. Buffers are base64 encoded.
    """

    messages: list[dict[str, Any]]
    next: int
    last: int
    missing: int


async def journal(call: Call) -> JournalPage:
    """A kernel's messages, without a WebSocket."""
    kernel = sandbox_of(call).guest.kernel
    kept = kernel.journal
    after = min(call.query.since, kept.last)
    with kept.reader(after) as reader:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(call.query.wait):
                await reader.arrived()
        call.http.hold("output on its way to clients", cost(reader.ahead, kernel.account))
        records = reader.take() if reader.ahead else []
    found = [layout.journal_entry(each.seq, each.parts) for each in records if not isinstance(each, Gap)]
    return JournalPage(
        messages=found,
        next=records[-1].seq if records else after,
        last=kept.last,
        missing=sum(each.messages for each in records if isinstance(each, Gap)),
    )


# -- sessions: a document's path and its kernel, as Jupyter's own front ends remember them


class KernelRef(Struct):
    id: str | None = None
    name: str | None = None


SessionText = Annotated[str, Meta(max_length=4096)]
"""A text that the server keeps for as long as the session lives. Linux has no longer paths."""


class SessionBody(Struct):
    """A new session, or the changes to one. Old clients send the path in `notebook`."""

    path: SessionText | None = None
    name: SessionText | None = None
    type: SessionText | None = None
    kernel: KernelRef | None = None
    notebook: "OldNotebook | None" = None


class OldNotebook(Struct):
    """The path, as old clients send it."""

    path: SessionText | None = None


class NotebookRef(Struct):
    path: str
    name: str


class SessionModel(Struct):
    """A session. `notebook` is for old clients."""

    id: str
    path: str
    name: str
    type: str
    kernel: KernelModel
    notebook: NotebookRef


class Session(Struct):
    """A session as the server keeps it."""

    id: str
    path: str
    name: str
    type: str
    sandbox: str


class Sessions:
    """The sessions of one key, in memory. A session ends with its kernel. Beyond MAX_SESSIONS the oldest goes.

    `making` has the sessions that are being made, by path. Requests for the same path share one of them.
    """

    def __init__(self) -> None:
        self.making: dict[str, asyncio.Task[tuple[Session, Sandbox]]] = {}
        self._sessions: dict[str, Session] = {}

    def add(self, session: Session) -> None:
        self._sessions[session.id] = session
        if len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]

    def live(self, call: Call) -> list[tuple[Session, Sandbox]]:
        """The sessions whose kernels live; the others are forgotten."""
        mine = {sandbox.id: sandbox for sandbox in call.mine.list()}
        self._sessions = {name: each for name, each in self._sessions.items() if each.sandbox in mine}
        return [(each, mine[each.sandbox]) for each in self._sessions.values()]

    def listed(self, call: Call) -> list[tuple[Session, Sandbox]]:
        """The live sessions, and one for each sandbox that has none, because VS Code finds kernels by sessions only.

        Such a session has the sandbox's id as its path and the kernel's id as its own. It is kept when it is changed.
        """
        live = self.live(call)
        taken = {session.sandbox for session, _ in live}
        return live + [
            (Session(sandbox.kernel_id, sandbox.id, sandbox.id, "notebook", sandbox.id), sandbox)
            for sandbox in call.mine.list()
            if sandbox.id not in taken and sandbox.kernel_id not in self._sessions
        ]

    def get(self, call: Call) -> tuple[Session, Sandbox]:
        """The session that the path names.

        Raises:
            NotFound: the key has no such session.
        """
        for session, sandbox in self.listed(call):
            if session.id == call.path["session"]:
                return session, sandbox
        raise NotFound("session not found")

    def remove(self, session: Session) -> None:
        self._sessions.pop(session.id, None)


def sessions_of(call: Call) -> Sessions:
    sessions: Sessions = call.http.application.settings["sessions"][call.mine.key.id]
    return sessions


def session_model(session: Session, sandbox: Sandbox) -> SessionModel:
    return SessionModel(
        session.id, session.path, session.name, session.type, model(sandbox), NotebookRef(session.path, session.name)
    )


async def list_sessions(call: Call) -> list[SessionModel]:
    """Your sessions, and one for each of your sandboxes that has none."""
    return [session_model(*each) for each in sessions_of(call).listed(call)]


async def start_session(call: Call, body: SessionBody) -> SessionModel:
    """The session of a path. If there is none, one is made, with the kernel that the body names or a new kernel.

    It is made to its end, even if the client has gone, because others may wait for it and the client may ask again.
    """
    path = path_of(body)
    if not path:
        raise InvalidRequest("a session needs a `path`")
    check_names(path, body)
    sessions = sessions_of(call)
    for session, sandbox in sessions.listed(call):
        if session.path == path:
            return session_model(session, sandbox)
    making = sessions.making.get(path)
    if making is None:
        if len(sessions.making) >= MAX_MAKING:
            raise TooManyRequests(
                f"{MAX_MAKING} sessions of your key are being made, which is all there may be at once"
            )
        making = sessions.making[path] = asyncio.create_task(make_session(call, sessions, path, body))
    return session_model(*await to_its_end(making))


def path_of(body: SessionBody) -> str:
    return body.path or (body.notebook and body.notebook.path) or ""


async def make_session(call: Call, sessions: Sessions, path: str, body: SessionBody) -> tuple[Session, Sandbox]:
    """A new session and its kernel."""
    try:
        sandbox = await kernel_for(call, body.kernel or KernelRef())
        session = Session(secrets.token_hex(16), path, body.name or "", body.type or "notebook", sandbox.id)
        sessions.add(session)
        return session, sandbox
    finally:
        del sessions.making[path]


async def kernel_for(call: Call, wanted: KernelRef) -> Sandbox:
    """The kernel of that id, or a new one."""
    if wanted.id:
        return call.mine.of_kernel(wanted.id)
    return await new_kernel(call, wanted.name, {})


async def get_session(call: Call) -> SessionModel:
    """One session."""
    return session_model(*sessions_of(call).get(call))


def check_names(path: str, body: SessionBody) -> None:
    """Refuse names that can't be UTF-8."""
    check_text("path", path)
    check_text("name", body.name or "")
    check_text("type", body.type or "")


async def change_session(call: Call, body: SessionBody) -> SessionModel:
    """Rename or move a session, or give it another kernel.

    The kernel before ends if a Jupyter client has made it and no other session has it.
    """
    sessions = sessions_of(call)
    session, sandbox = sessions.get(call)
    check_names(path_of(body), body)
    if body.kernel is not None and (body.kernel.id or body.kernel.name):
        before, sandbox = sandbox, await kernel_for(call, body.kernel)
        session.sandbox = sandbox.id
        is_used = any(each.sandbox == before.id for each, _ in sessions.live(call))
        if before.idle_timeout is not None and not is_used:
            await call.sandboxes.kill(before)
    session.path, session.name, session.type = (
        path_of(body) or session.path,
        session.name if body.name is None else body.name,
        body.type or session.type,
    )
    sessions.add(session)
    return session_model(session, sandbox)


async def delete_session(call: Call) -> None:
    """End a session and its kernel."""
    session, sandbox = sessions_of(call).get(call)
    sessions_of(call).remove(session)
    await call.sandboxes.kill(sandbox)
