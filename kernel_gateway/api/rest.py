"""The REST operations. The route's types parse the request; an operation makes a call and shapes the answer.

Paths and shapes are SandBase's.
"""

import asyncio
import base64
import binascii
import mimetypes
import posixpath
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, Protocol
from urllib.parse import parse_qsl, quote, unquote

import msgspec
from msgspec import Meta, Struct
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from guest_agent import wire
from kernel_gateway import __version__
from kernel_gateway.api.base import Call, Endpoint, RangeNotSatisfiable
from kernel_gateway.errors import (
    CellvmError,
    Conflict,
    GuestFailure,
    GuestUnresponsive,
    InvalidRequest,
    NotFound,
    TooLarge,
    Unavailable,
)
from kernel_gateway.guest.answers import answer, told, whole_answer
from kernel_gateway.guest.files import LISTING_SIZE, MAX_ENTRIES, Files, Writing
from kernel_gateway.guest.guest import Guest
from kernel_gateway.held import Holding
from kernel_gateway.kernel import message
from kernel_gateway.kernel.events import MAX_NAME, Cell, CellError, Collector, Events, Input, StreamEvent
from kernel_gateway.kernel.executions import RUNNING, Execution
from kernel_gateway.kernel.journal import Gap, Journal
from kernel_gateway.kernel.kernel import Kernel
from kernel_gateway.kernel.message import GATEWAY, By
from kernel_gateway.kernel.notebook import session_notebook
from kernel_gateway.kernel.shape import Shaper
from kernel_gateway.network.policy import MAX_ENTRY, Floor, Policy, parse_policy
from kernel_gateway.outcome import Ending
from kernel_gateway.sandbox.lifecycle import ASLEEP, State
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.snapshots import Snapshot

MAX_TIMEOUT, MAX_LIFETIME = 3600, 30 * 86400
"""Longest time of a cell or command, and of what `--max-timeout` may be, in seconds."""
INLINE_LIMIT = 1024 * 1024
"""Largest file that is sent inside JSON, in bytes."""
MAX_ARGUMENT = 128 * 1024 - 1
"""Longest single argument that Linux passes to a program, in bytes."""

MAX_METADATA = 64 * 1024
"""Bytes of a sandbox's metadata, names and values."""

Timeout = Annotated[int, Meta(ge=1, le=MAX_LIFETIME, description="Seconds; the server's --max-timeout at most.")]
Seconds = Annotated[float, Meta(gt=0, le=MAX_TIMEOUT, description="Seconds.")]
Text = dict[str, str]


# -- sandboxes


class NetworkRules(Struct):
    """What a sandbox may reach: addresses, CIDR blocks, names, and `*.` with a name. `allowOut` wins over `denyOut`.

    `allowPublicTraffic` opens its ports to whoever has their address. The last five fields are E2B's; they are not
    offered.
    """

    allowOut: list[str] = []
    denyOut: list[str] = []
    allowPublicTraffic: bool | None = None
    rules: Any = None
    maskRequestHost: Any = None
    egressProxy: Any = None
    dnsServers: Any = None
    httpsPorts: Any = None


class AutoResume(Struct):
    """Whether requests wake a paused sandbox."""

    enabled: bool = False


class CreateSandbox(Struct):
    """A new sandbox. `timeout` is its lifetime, `envVars` are seen by every process in it.

    With `autoPause` it is paused when its lifetime is over, in place of its end. With `autoResume` every request that
    needs it wakes it when it is paused. `autoPauseMemory: false` is not offered.

    With `checkpoints: "cell"` a checkpoint is taken after each cell.

    `allow_internet_access` and `allowInternetAccess` are one field in two spellings.
    """

    templateID: str
    timeout: Timeout = 300
    metadata: Text = {}
    envVars: Text = {}
    network: NetworkRules | None = None
    allow_internet_access: bool | None = None
    allowInternetAccess: bool | None = None
    autoPause: bool = False
    autoPauseMemory: bool = True
    autoResume: AutoResume | None = None
    checkpoints: Literal["cell"] | None = None


class NetworkModel(Struct):
    """What a sandbox may reach, in its owner's words."""

    allowOut: list[str]
    denyOut: list[str]
    allowPublicTraffic: bool


class KernelModel(Struct, omit_defaults=True):
    """What a sandbox's kernel is at: one of Jupyter's states, since when (in seconds since 1970), and whose cell runs.

    `asks` is the id of the cell that waits for input, `waiting` the number of cells that wait for their turn, and
    `connections` the number of clients that are connected.
    """

    state: str
    since: int
    by: By | None = None
    asks: str = ""
    waiting: int = 0
    connections: int = 0


class UsageModel(Struct):
    """A sandbox's use of resources at its last reading, in percent and bytes."""

    cpuUsedPct: float
    memUsed: int
    memTotal: int
    diskUsed: int
    diskTotal: int


class SandboxModel(Struct, omit_defaults=True):
    """A sandbox. `status` is SandBase's word for its state, `state` E2B's. Only GET of one sandbox tells `network`.

    `kernel` is there while it runs, and `usage` after the first reading.
    """

    sandboxID: str
    templateID: str
    clientID: str
    status: str
    state: str
    startedAt: str
    endAt: str
    metadata: Text
    cpuCount: int
    memoryMB: int
    diskSizeMB: int
    envdVersion: str
    kernelID: str
    alias: str | None = None
    allowInternetAccess: bool | None = None
    network: NetworkModel | None = None
    kernel: KernelModel | None = None
    usage: UsageModel | None = None


class SandboxFilter(Struct):
    """`metadata` is itself a query string, `key=value&…`, of what the sandbox's metadata must hold.

    `state` is running, paused, or both with a comma between them.
    """

    status: str | None = None
    state: str | None = None
    metadata: str | None = None


class SetTimeout(Struct):
    timeout: Timeout


class Connect(Struct):
    """`timeout` is its lifetime from now on. Without it a sandbox that is resumed gets the one of its create."""

    timeout: Timeout | None = None


class Resume(Connect):
    """`autoPause` replaces what the create has said."""

    autoPause: bool | None = None


class Pause(Struct):
    """`memory: false` would keep the files alone; it is not offered."""

    memory: bool = True
    requireHealthyGuest: bool = False


class TakeSnapshot(Struct):
    """`name` may be used in place of the snapshot's id. `memory: false` is not offered."""

    name: str = ""
    memory: bool = True


class Fork(Struct):
    """`count` copies, and their lifetimes. Without `timeout` they get the one of their parent's create."""

    count: Annotated[int, Meta(ge=1, le=100)] = 1
    timeout: Timeout | None = None


class SnapshotModel(Struct):
    """A sandbox as it stood at one moment. `snapshotID` and `names` can be the `templateID` of a create.

    `size` is in bytes of the server's disk.
    """

    snapshotID: str
    names: list[str]
    sandboxID: str
    templateID: str
    createdAt: str
    size: int


class SnapshotsQuery(Struct):
    """Filters, and a page: `limit`, and the `X-Next-Token` of the page before."""

    sandboxID: str | None = None
    name: str | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    nextToken: str | None = None


class Refresh(Struct):
    duration: Timeout = 60


ENVD_VERSION = "0.6.13"
"""The version that E2B's clients are told. By it they decide what they may ask for (docs/e2b.md)."""


def check_lifetime(call: Call, seconds: int | None) -> None:
    """Refuse a lifetime that is longer than this server allows."""
    most = call.sandboxes.max_timeout
    if seconds is not None and seconds > most:
        raise InvalidRequest(f"a lifetime must be <= {most} s", hint="it may be extended again and again")


def check_env(env: Text) -> None:
    """Refuse names and values that no process can have."""
    if sum(len(name) + len(value) for name, value in env.items()) > MAX_ARGUMENT:
        raise InvalidRequest(f"environment variables may have at most {MAX_ARGUMENT} characters in all")
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidRequest(f"environment variable {name[:100]!r}: names need no `=`, and nothing may hold a NUL")
    check_text("envVars", *env, *env.values())


def check_metadata(metadata: Text) -> None:
    """Refuse metadata that can't be UTF-8, or that are too long, because every listing repeats them."""
    check_text("metadata", *metadata, *metadata.values())
    if sum(len(text.encode()) for pair in metadata.items() for text in pair) > MAX_METADATA:
        raise TooLarge(f"metadata may have at most {MAX_METADATA} bytes in all", hint="store it as a file")


def check_text(field: str, *texts: str) -> None:
    """Refuse text of a field that can't be UTF-8 (JSON allows lone surrogates)."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"`{field}`: text with a lone surrogate can't be passed on") from None


def rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


SHOWN_AS = {State.PAUSING: State.RUNNING, State.RESUMING: State.PAUSED, State.RESTORING: State.RUNNING}
"""SandBase's and E2B's words for states that they do not have."""


def is_paused(sandbox: Sandbox) -> bool:
    return sandbox.state in (State.PAUSED, State.RESUMING)


def model(sandbox: Sandbox) -> SandboxModel:
    template = sandbox.template
    return SandboxModel(
        sandboxID=sandbox.id,
        templateID=template.id,
        clientID="CellVM",
        status=SHOWN_AS.get(sandbox.state, sandbox.state),
        state="paused" if is_paused(sandbox) else "running",
        startedAt=rfc3339(sandbox.started_at),
        endAt=rfc3339(sandbox.ends_at),
        metadata=sandbox.metadata,
        cpuCount=template.vcpus,
        memoryMB=template.memory_mb,
        diskSizeMB=template.disk_mb,
        envdVersion=ENVD_VERSION,
        kernelID=sandbox.kernel_id,
        alias=template.aliases[0] if template.aliases else None,
        kernel=None if sandbox.kernel is None else kernel_model(sandbox.kernel),
        usage=usage_model(sandbox.readings[-1]) if sandbox.readings else None,
    )


def kernel_model(kernel: Kernel) -> KernelModel:
    return KernelModel(
        state=kernel.state,
        since=round(kernel.since),
        by=kernel.running_for,
        asks=kernel.asking,
        waiting=len(kernel.waiting()),
        connections=kernel.connections,
    )


def usage_model(reading: wire.Metrics) -> UsageModel:
    return UsageModel(
        cpuUsedPct=reading.cpu_used_pct,
        memUsed=reading.mem_used,
        memTotal=reading.mem_total,
        diskUsed=reading.disk_used,
        diskTotal=reading.disk_total,
    )


async def create_sandbox(call: Call, body: CreateSandbox) -> SandboxModel:
    """Create a sandbox. It is running when the answer comes."""
    template = call.sandboxes.templates.find(body.templateID)
    snapshot = None if template is not None else call.mine.find_source(body.templateID)
    if snapshot is not None:
        template = snapshot.template
    if template is None:
        known = ", ".join(template.id for template in call.sandboxes.templates)
        raise InvalidRequest(
            f"unknown template: {body.templateID[:100]}",
            hint=f"this server offers {known}, and your own snapshots and templates",
        )
    if not body.autoPauseMemory:
        raise Unavailable("this server does not offer autoPauseMemory: false, a pause that keeps the files alone")
    check_lifetime(call, body.timeout)
    check_env(body.envVars)
    check_metadata(body.metadata)
    network = body.network or NetworkRules()
    sandbox = await call.mine.create(
        template,
        timeout=body.timeout,
        metadata=body.metadata,
        env=body.envVars if snapshot is None else {**snapshot.env, **body.envVars},
        snapshot=snapshot,
        policy=read_policy(call, network, body.allow_internet_access, body.allowInternetAccess),
        auto_pause=body.autoPause,
        auto_resume=body.autoResume is not None and body.autoResume.enabled,
        checkpoints=body.checkpoints is not None,
    )
    sandbox.open_all_ports(network.allowPublicTraffic is True)
    return model(sandbox)


async def list_sandboxes(call: Call) -> list[SandboxModel] | None:
    """Your sandboxes, newest first.

    With `Accept: application/x-ndjson` (or `text/event-stream`) the answer is the list and then, as they happen, its
    changes.
    """
    framing = wanted_framing(call.http)
    if framing is None:
        return listed(call)
    async with aclosing(changes(call)) as found:
        await stream(call.http, framing, found)
    return None


def listed(call: Call) -> list[SandboxModel]:
    """The sandboxes in the key's sight that the query asks for."""
    status = call.query.status
    if status not in (None, "creating", "running", "paused", "stopped", "error"):
        raise InvalidRequest(f"invalid status filter: {status[:100]}")
    states = None if call.query.state is None else call.query.state.split(",")
    wanted = parse_metadata(call.query.metadata or "")
    return [
        described
        for described in map(model, call.mine.list())
        if status in (None, described.status)
        and (states is None or described.state in states)
        and wanted.items() <= described.metadata.items()
    ]


class ListEvent(Struct, omit_defaults=True):
    """One event of the list; `type` tells which of the other fields are set. They have no numbers."""

    type: Literal["snapshot", "sandbox", "gone"]
    sandboxes: list[SandboxModel] | None = None
    sandbox: SandboxModel | None = None
    sandboxID: str | None = None

    @property
    def seq(self) -> int:
        return -1


LIST_PAUSE = 0.5
"""Seconds between two looks at the sandboxes of a client that follows its list."""


async def changes(call: Call) -> AsyncGenerator[ListEvent, None]:
    """The list, and then what changes in it. A client that reads slowly is told of fewer changes."""
    known = {each.sandboxID: each for each in listed(call)}
    yield ListEvent("snapshot", sandboxes=list(known.values()))
    while not call.sandboxes.places.is_draining:
        await asyncio.sleep(LIST_PAUSE)
        present = {each.sandboxID: each for each in listed(call)}
        for name, described in present.items():
            if not is_alike(described, known.get(name)):
                yield ListEvent("sandbox", sandbox=described)
        for name in known.keys() - present.keys():
            yield ListEvent("gone", sandboxID=name)
        known = present


def is_alike(one: SandboxModel, other: SandboxModel | None) -> bool:
    """Whether two states of a sandbox say the same. A deadline is computed anew each time, so it differs a little."""
    return other is not None and to_second(one) == to_second(other)


def to_second(described: SandboxModel) -> SandboxModel:
    return msgspec.structs.replace(described, endAt=described.endAt[:19])


def parse_metadata(text: str) -> Text:
    # E2B's clients encode twice. Decoding a text once too often changes it only if it holds a per cent sign.
    return {unquote(key): unquote(value) for key, value in parse_qsl(text, keep_blank_values=True)}


async def get_sandbox(call: Call) -> SandboxModel:
    """One sandbox."""
    sandbox = call.sandbox
    described = model(sandbox)
    described.allowInternetAccess = sandbox.policy.allow_internet
    described.network = NetworkModel(
        allowOut=list(sandbox.policy.allow_out),
        denyOut=list(sandbox.policy.deny_out),
        allowPublicTraffic=sandbox.all_ports_open,
    )
    return described


async def delete_sandbox(call: Call) -> None:
    """Destroy a sandbox and everything in it."""
    await call.sandboxes.kill(call.sandbox)


async def pause(call: Call, body: Pause) -> None:
    """Save the sandbox to disk with its memory, and end its machine. Nothing of it is lost, and it costs no memory.

    Its WebSockets are closed with 4411. Requests that wait for it get 409 `sandbox_paused`; their cells and commands go
    on when it is resumed.
    """
    if not body.memory:
        raise Unavailable("this server does not offer memory: false, a pause that keeps the files alone")
    await call.sandboxes.pauses.pause(call.sandbox)


async def connect(call: Call, body: Connect) -> SandboxModel:
    """Resume the sandbox if it is paused (201). One that runs lives at least `timeout` seconds more (200)."""
    sandbox = call.sandbox
    check_lifetime(call, body.timeout)
    if await call.sandboxes.pauses.resume(sandbox, body.timeout):
        call.http.set_status(201)
    return model(sandbox)


async def resume(call: Call, body: Resume) -> SandboxModel:
    """Resume a paused sandbox. One that runs is a conflict."""
    sandbox = call.sandbox
    check_lifetime(call, body.timeout)
    if sandbox.state is State.RUNNING:
        raise Conflict("the sandbox is running", hint="POST /sandboxes/{id}/connect takes it as it is")
    await call.sandboxes.pauses.resume(sandbox, body.timeout)
    if body.autoPause is not None:
        sandbox.auto_pause = body.autoPause
    return model(sandbox)


LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


async def take_snapshot(call: Call, body: TakeSnapshot) -> SnapshotModel:
    """Keep the sandbox as it stands, with its memory. It stands still for a moment, and goes on.

    The snapshot's id or name is a `templateID` for creates. What starts from it has all that the sandbox had.
    """
    if not body.memory:
        raise Unavailable("this server does not offer memory: false, a snapshot that keeps the files alone")
    if body.name:
        if not LEGAL_NAME.fullmatch(body.name):
            raise InvalidRequest(
                "a snapshot's name has 1 to 64 letters, digits or any of _ . - and begins with no mark"
            )
        builds = call.sandboxes.builds.of(call.owner)
        if call.sandboxes.templates.find(body.name) is not None or any(each.name == body.name for each in builds):
            raise Conflict(f"{body.name!r} is the name of a template", hint="choose another name")
    return snapshot_model(await call.mine.take_snapshot(call.sandbox, body.name))


def snapshot_model(snapshot: Snapshot) -> SnapshotModel:
    return SnapshotModel(
        snapshotID=snapshot.id,
        names=[snapshot.name] if snapshot.name else [],
        sandboxID=snapshot.sandbox,
        templateID=snapshot.template.id,
        createdAt=rfc3339(datetime.fromtimestamp(snapshot.created, UTC)),
        size=snapshot.size,
    )


async def list_snapshots(call: Call) -> list[SnapshotModel]:
    """Your snapshots in pages, newest first. The header `X-Next-Token` is there if more follow."""
    query = call.query
    found = [
        each
        for each in call.mine.snapshots()
        if query.sandboxID in (None, each.sandbox) and query.name in (None, each.name, each.id)
    ]
    if query.nextToken is not None:
        ids = [each.id for each in found]
        found = found[ids.index(query.nextToken) + 1 :] if query.nextToken in ids else []
    if len(found) > query.limit:
        found = found[: query.limit]
        call.http.set_header("X-Next-Token", found[-1].id)
    return [snapshot_model(each) for each in found]


async def delete_snapshot(call: Call) -> None:
    """Delete a snapshot by its id or name. Sandboxes that were started from it go on."""
    await call.mine.delete_snapshot(call.path["snapshot"])


async def set_timeout(call: Call, body: SetTimeout) -> None:
    """Let the sandbox end, or be paused if it has `autoPause`, that many seconds from now."""
    sandbox = call.sandbox
    check_lifetime(call, body.timeout)
    _ = sandbox.guest
    sandbox.set_timeout(body.timeout)
    call.sandboxes.changed(sandbox, {"reason": "timeout", "endAt": rfc3339(sandbox.ends_at)})


async def refresh(call: Call, body: Refresh) -> None:
    """Keep the sandbox alive for at least `duration` seconds from now."""
    sandbox = call.sandbox
    check_lifetime(call, body.duration)
    _ = sandbox.guest
    sandbox.extend(body.duration)


# -- the network


class SetNetwork(Struct):
    """What a sandbox may reach from now on. The old policy is replaced as a whole, and an absent field has its default.

    The fields are those of a new sandbox. Without `allowPublicTraffic` its ports stay as they are.
    """

    allowOut: list[str] = []
    denyOut: list[str] = []
    allow_internet_access: bool | None = None
    allowInternetAccess: bool | None = None
    allowPublicTraffic: bool | None = None
    rules: Any = None
    maskRequestHost: Any = None
    egressProxy: Any = None
    dnsServers: Any = None
    httpsPorts: Any = None


class RefusalModel(Struct):
    """A destination that a sandbox may not reach, how often it tried, and when last. `reason`: see docs/network.md."""

    destination: str
    port: int
    protocol: str
    reason: str
    count: int
    last: str


class NetworkState(Struct):
    """What a sandbox may reach, the mechanism of its network, and what was refused, newest first."""

    mechanism: str
    allowInternetAccess: bool
    allowOut: list[str]
    denyOut: list[str]
    refused: list[RefusalModel]
    refusedTotal: int


def read_policy(call: Call, wanted: NetworkRules | SetNetwork, *access: bool | None) -> Policy:
    """The policy that a body asks for; `access` has each spelling of the field that allows the internet."""
    for name in ("rules", "maskRequestHost", "egressProxy", "dnsServers", "httpsPorts"):
        if getattr(wanted, name) not in (None, [], {}):
            raise Unavailable(f"this server does not offer network.{name}")
    given = {each for each in access if each is not None}
    if len(given) > 1:
        raise InvalidRequest("allow_internet_access and allowInternetAccess contradict each other")
    network = call.sandboxes.network
    return parse_policy(
        allow_internet=False not in given,
        allow_out=wanted.allowOut,
        deny_out=wanted.denyOut,
        floor=network.floor if network is not None else Floor(),
    )


async def set_network(call: Call, body: SetNetwork) -> None:
    """Replace the sandbox's policy. Connections that are forbidden now are cut."""
    sandbox = call.sandbox
    policy = read_policy(call, body, body.allow_internet_access, body.allowInternetAccess)
    await call.sandboxes.set_policy(sandbox, policy, body.allowPublicTraffic)


async def get_network(call: Call) -> NetworkState:
    """What the sandbox may reach, and what it was refused."""
    sandbox = call.sandbox
    refused = await call.sandboxes.refusals(sandbox)
    return NetworkState(
        mechanism=call.sandboxes.capabilities.network,
        allowInternetAccess=sandbox.policy.allow_internet,
        allowOut=list(sandbox.policy.allow_out),
        denyOut=list(sandbox.policy.deny_out),
        refused=[
            RefusalModel(
                destination=each.destination[:MAX_ENTRY].encode("utf-8", "replace").decode(),  # the guest's own words
                port=each.port,
                protocol=each.protocol,
                reason=each.reason,
                count=each.count,
                last=rfc3339(datetime.fromtimestamp(each.last, UTC)),
            )
            for each in refused
        ],
        refusedTotal=sum(each.count for each in refused),
    )


# -- cells


MaxOutput = Annotated[int, Meta(ge=200, le=1_000_000, description="Characters.")]
Wait = Annotated[float, Meta(ge=0.1, le=MAX_TIMEOUT, description="Seconds.")]


class Execute(Struct):
    """A cell for the sandbox's persistent kernel.

    With `wait` the answer comes after so many seconds if the cell is not over by then, and the cell goes on. With
    `maxOutput` the answer has the output as one `text` of at most so many characters, for a model.
    """

    code: str
    timeout: Seconds = 60.0
    wait: Wait | None = None
    maxOutput: MaxOutput | None = None


LEGAL_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def check_id(execution_id: str | None) -> None:
    """Refuse what can't be an execution's id."""
    if execution_id is not None and not LEGAL_ID.fullmatch(execution_id):
        raise InvalidRequest("an execution's id has 1 to 128 letters, digits or any of _ . : -")


async def execute(call: Call, body: Execute) -> None:
    """Run a cell in the sandbox's kernel, where variables stay from call to call.

    The answer comes when the cell is over. With `Accept: application/x-ndjson` (or `text/event-stream`) events come as
    they happen: one JSON object a line, `{"type": "end"}` last. A client that hangs up interrupts the cell. With a
    header `Idempotency-Key: <id>` the cell goes on instead, and the same request again attaches to it, so it is not run
    twice. With `wait` it goes on, too.
    """
    check_text("code", body.code)
    execution_id = call.http.request.headers.get("Idempotency-Key")
    check_id(execution_id)
    asked = Asked(body.wait, body.maxOutput)
    framing = wanted_framing(call.http)
    if framing:
        check_stream(asked)
    guest = call.sandbox.guest
    by = By("execute", client_name(call.http) or GATEWAY.name)
    execution = guest.kernel.run(body.code, execution_id=execution_id, timeout=body.timeout, by=by)
    is_attended = execution_id is None and body.wait is None
    del body  # the cell may wait long, and its code is counted once
    with guest.kernel.attended(execution) if is_attended else nullcontext():
        async with aclosing(guest.kernel.events(execution)) as events:
            if framing:
                await stream(call.http, framing, with_text(guest, execution, events, asked.max_output))
                return
            cell = await collect(call, guest, execution, events, asked)
    call.http.set_header("Content-Type", "application/json")
    await call.http.finish(msgspec.json.encode(cell))


def client_name(http: Endpoint) -> str:
    """What the client calls itself, for others to see who has run a cell."""
    return http.request.headers.get("X-Client-Name", "").strip()[:MAX_NAME]


class Asked(NamedTuple):
    """What an answer is to be: after how many seconds at most, with a text of how many characters at most."""

    wait: float | None = None
    max_output: int | None = None


def check_stream(asked: Asked) -> None:
    """Refuse to limit the time of a stream, which tells everything at once."""
    if asked.wait is not None:
        raise InvalidRequest("`wait` is for an answer in one piece", hint="leave it out, or send no such `Accept`")


async def with_text(
    guest: Guest, execution: Execution, events: AsyncIterator[StreamEvent], limit: int | None
) -> AsyncIterator[StreamEvent]:
    """Events, the end of which has the cell's output as a text, if there is a limit."""
    async for event in events:
        if limit is not None and event.type == "end":
            made = await whole_answer(guest, execution, limit)
            yield msgspec.structs.replace(event, text=made.text, outputFile=made.output_file)
        else:
            yield event


async def collect(
    call: Call, guest: Guest, execution: Execution, events: AsyncIterator[StreamEvent], asked: Asked, since: int = 0
) -> Cell:
    """What a cell gives within the time that the caller waits. What there is no room for is left out and counted."""
    collector = Collector(keep=call.http.hold("answers of cells").grow)
    if asked.max_output is not None:
        call.http.hold("answers of cells", 2 * asked.max_output)
    shaper = None if asked.max_output is None else Shaper(asked.max_output)
    takers = [collector.add] if shaper is None else [collector.add, shaper.add]
    since = max(since, await told(events, asked.wait, *takers))
    cell = collector.cell()
    if asked == Asked():
        return cell
    cell.executionCount = cell.executionCount or execution.count
    cell.outcome = cell.outcome if execution.is_told(since) else RUNNING
    cell.id, cell.status, cell.next = execution.id, cell.outcome, since
    if shaper is not None:
        made = await answer(guest, execution, shaper)
        cell.text, cell.outputFile = made.text, made.output_file
    return cell


def wanted_framing(http: Endpoint) -> str | None:
    accept = http.request.headers.get("Accept", "")
    return next((kind for kind in ("application/x-ndjson", "text/event-stream") if kind in accept), None)


class Event(Protocol):
    """What `stream` sends: a struct whose `seq` is its number, -1 if it has none."""

    @property
    def seq(self) -> int: ...


LINE_ENDS = {"\u0085".encode(): rb"\u0085", "\u2028".encode(): rb"\u2028", "\u2029".encode(): rb"\u2029"}
"""Characters that are no line ends in NDJSON and server-sent events, but that the readers of many clients split at."""


def one_line(text: bytes) -> bytes:
    """JSON with nothing in it that any reader takes for the end of a line.

    A kernel's data is its own JSON text. A bare line end in it stands between tokens, where a blank means the same.
    """
    text = text.translate(bytes.maketrans(b"\n\r", b"  "))
    for character, escaped in LINE_ENDS.items():
        text = text.replace(character, escaped)
    return text


async def stream(http: Endpoint, framing: str, events: AsyncIterator[Event]) -> None:
    """Send events as they come. If the sandbox ends meanwhile, an error and an end are the last events."""

    async def send(event: Event) -> None:
        line = one_line(msgspec.json.encode(event))
        number = b"id: %d\n" % event.seq if event.seq >= 0 else b""
        http.write(line + b"\n" if framing == "application/x-ndjson" else number + b"data: " + line + b"\n\n")
        await http.flush()

    http.set_header("Content-Type", framing)
    http.set_header("Cache-Control", "no-store")
    await http.flush()
    if http.is_head:
        await http.finish()
        return
    try:
        async for event in events:
            await send(event)
    except CellvmError as error:
        await send(StreamEvent("error", error=CellError(type(error).__name__, str(error), code=error.code)))
        await send(StreamEvent("end", outcome=error.outcome))
    await http.finish()


class Since(Struct):
    """`since`: number of the last event you have, if you ask for a stream."""

    since: Annotated[int, Meta(ge=0)] = 0


class ExecutionQuery(Since):
    """`wait` and `maxOutput` are as for `/execute`. With one of them the answer has what came after `since`."""

    wait: Wait | None = None
    maxOutput: MaxOutput | None = None


def last_seen(call: Call) -> int:
    """The number of the last event that a client has, by the header of server-sent events or by its query."""
    header = call.http.request.headers.get("Last-Event-ID", "")
    return int(header) if re.fullmatch("[0-9]{1,100}", header) else int(call.query.since)


class ExecutionModel(Struct):
    """An execution that was started under an id. `status` is running, finished, not_started or unknown.

    `unknown` means that its kernel ended before it was over, so nobody can say how much of it has happened.
    `not_started` means that it never ran. `retrySafe` means that the same request again has no further effect.
    `result` is there if it ran and its sandbox lives, and while it runs to whoever asked with `wait` or `maxOutput`.
    """

    id: str
    status: str
    retrySafe: bool
    result: Cell | None = None


async def get_execution(call: Call) -> None:
    """An execution by its id (the `Idempotency-Key` it was started with), or as a stream like POST …/execute.

    404 means that no such execution was ever started here, so it is safe to start it.
    """
    guest = call.sandbox.guest
    execution = found_execution(guest, call.path["execution"])
    asked = Asked(call.query.wait, call.query.maxOutput)
    since = last_seen(call)
    events = guest.kernel.events(execution, since)
    async with aclosing(events):
        if framing := wanted_framing(call.http):
            check_stream(asked)
            await stream(call.http, framing, with_text(guest, execution, events, asked.max_output))
            return
        has_result = execution.outcome is not None and execution.outcome.error is None
        if asked.max_output is not None and asked.wait is None and not has_result:
            asked = asked._replace(wait=0.0)
        is_asked = asked.wait is not None and execution.outcome is None
        result = await collect(call, guest, execution, events, asked, since) if has_result or is_asked else None
    status = execution.state if result is None else result.outcome
    call.http.set_header("Content-Type", "application/json")
    await call.http.finish(msgspec.json.encode(ExecutionModel(execution.id, status, status != Ending.UNKNOWN, result)))


def found_execution(guest: Guest, execution_id: str) -> Execution:
    """The execution of that id.

    Raises:
        NotFound: there is none.
    """
    execution = guest.kernel.executions.get(execution_id)
    if execution is None:
        raise NotFound("no such execution was started in this sandbox", hint="it has not run: it is safe to start it")
    return execution


async def stop_execution(call: Call) -> None:
    """Interrupt an execution, or if its turn has not come, never run it. One that is over stays as it is."""
    guest = call.sandbox.guest
    guest.kernel.stop(found_execution(guest, call.path["execution"]))


class ExportQuery(Struct):
    """`ipynb` is the only format."""

    format: Literal["ipynb"] = "ipynb"


EXPORT_LIMIT = 16 * 1024 * 1024
"""Bytes of messages that an export takes from the journal. Of a longer session, outputs are left out and counted."""
exporting = asyncio.Semaphore(1)
"""Exports wait for each other, because each takes a few times its messages' bytes."""


async def export(call: Call) -> None:
    """The session so far as a notebook, with outputs. Cells whose messages are not kept any more are left out."""
    journal = call.sandbox.guest.kernel.journal
    async with exporting:
        holding = call.http.hold("exports")
        cells = await session(journal, holding)
        content = await asyncio.to_thread(session_notebook, cells)
    call.http.set_header("Content-Type", "application/x-ipynb+json")
    call.http.set_header("Content-Disposition", f'attachment; filename="{call.sandbox.id}.ipynb"')
    await call.http.finish(content)


async def session(journal: Journal, holding: Holding) -> list[tuple[str, int | None, list[StreamEvent]]]:
    """The cells that a journal knows: code, execution count and events."""
    translate = Events()
    cells: dict[str, tuple[str, list[StreamEvent]]] = {}
    after, room = 0, EXPORT_LIMIT
    while records := journal.read(after):
        after = records[-1].seq
        for record in records:
            size = 0 if isinstance(record, Gap) else sum(map(len, record.parts))
            if isinstance(record, Gap) or size > room:
                if cells:
                    missing = record.messages if isinstance(record, Gap) else 1
                    cells[next(reversed(cells))][1].append(StreamEvent("gap", seq=record.seq, messages=missing))
                continue
            if record.kind == "execute_input":
                cells[record.parent] = (message.read(record.parts[message.CONTENT], Input).code, [])
            if record.parent in cells:
                room -= size
                cells[record.parent][1].extend(
                    translate.receive(record.seq, record.kind, record.parent, record.ends, record.parts)
                )
        holding.resize(3 * (EXPORT_LIMIT - room))  # the messages, the outputs, the answer
        await asyncio.sleep(0)  # let other work run between the pages
    return [(code, next((e.executionCount for e in events), None), events) for code, events in cells.values()]


# -- files


class PathQuery(Struct):
    path: Annotated[str, Meta(min_length=1)]


class ListQuery(Struct):
    """`after` is the name after which the list begins. Without `limit` the answer is the whole rest."""

    path: str = "~"
    after: Annotated[str, Meta(max_length=wire.MAX_TEXT)] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_ENTRIES)] | None = None


class UploadQuery(Struct):
    path: str | None = None


class FileEntry(Struct, omit_defaults=True):
    """A file or directory. `mode` is the permission bits, `modified` RFC 3339, `size` bytes."""

    name: str
    path: str
    isDir: bool
    type: str
    size: int
    mode: int
    owner: str
    group: str
    modified: datetime
    target: str | None = None


class InlineFile(Struct):
    """A small file's content, base64 encoded."""

    path: str
    content: str


class MakeDir(Struct):
    path: Annotated[str, Meta(min_length=1)]


class Move(Struct):
    source: Annotated[str, Meta(min_length=1)]
    destination: Annotated[str, Meta(min_length=1)]


def file_entry(entry: wire.Entry) -> FileEntry:
    return FileEntry(
        name=entry.name,
        path=entry.path,
        isDir=entry.kind == "dir",
        type=entry.kind,
        size=entry.size,
        mode=entry.mode,
        owner=entry.owner,
        group=entry.group,
        modified=datetime.fromtimestamp(max(0, min(entry.modified_ns, 2**62)) / 1e9, UTC),
        target=entry.target,
    )


async def download(call: Call) -> None:
    """A file's bytes, or with `Range` a part of them."""
    await send_file(call.http, Files(call.sandbox.guest), call.query.path, "attachment")


async def send_file(http: Endpoint, files: Files, path: str, disposition: str) -> None:
    """Answer with a file, or the part of it that the request's `Range` names."""
    span = re.fullmatch("bytes=([0-9]{0,100})-([0-9]{0,100})", http.request.headers.get("Range", ""))
    offset, length = 0, -1
    if span and any(span.groups()):
        size = (await files.stat(path)).size
        first, last = span.groups()
        offset = int(first) if first else max(size - int(last), 0)
        length = (min(int(last), size - 1) if first and last else size - 1) - offset + 1
        if length <= 0 or offset >= size:
            http.set_header("Content-Range", f"bytes */{size}")
            raise RangeNotSatisfiable(f"the file has {size} bytes")
        http.set_status(206)
        http.set_header("Content-Range", f"bytes {offset}-{offset + length - 1}/{size}")
    async with files.read(path, offset, length, is_sent=not http.is_head) as content:
        http.hold("downloads", min(content.size or wire.INITIAL_CREDIT, wire.INITIAL_CREDIT))
        name = posixpath.basename(path)
        http.set_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        http.set_header("Content-Disposition", f"{disposition}; filename*=UTF-8''{quote(name, safe='')}")
        http.set_header("Content-Security-Policy", "sandbox")
        http.set_header("Accept-Ranges", "bytes")
        if content.size is not None:
            http.set_header("Content-Length", str(content.size))
        if http.is_head:
            await http.finish()
            return
        async for data in content.pieces():
            http.write(data)
            await http.flush()
        await http.finish()


async def upload(call: Call) -> list[FileEntry]:
    """Store files: multipart with a part `file` for each, and its `path` beside it (for one file also in the query).

    A `path` names the `file` that follows, or the last one. Without a `path` a file's own name is its path. A file is
    stored as a whole or not at all.
    """
    upload = Upload(Files(call.sandbox.guest), call.query.path)
    try:
        async for event in parts(call.http):
            await upload.receive(event)
        await upload.finish()
    finally:
        await upload.close()
    return [file_entry(entry) for entry in upload.entries]


async def parts(http: Endpoint) -> AsyncIterator[Any]:
    """The parts of a multipart body as they come: of each its head, its bytes, and None.

    Raises:
        InvalidRequest: it is no such body.
    """
    kind, options = parse_options_header(http.request.headers.get("Content-Type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequest("an upload is multipart/form-data with a part named `file`")
    try:
        with PushMultipartParser(options["boundary"], max_segment_size=1 << 60) as parser:
            async for chunk in http.body_chunks():
                for event in parser.parse(chunk):
                    yield event
            for event in parser.parse(b""):
                yield event
    except MultipartError as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from None


class Upload:
    """Passes the parts of a multipart body on to the guest as they come.

    A `path` names the next `file`, or the last one when none follows. So a file that comes without a path waits under a
    made-up name until its path is known, because it must not overwrite another file meanwhile.
    """

    def __init__(self, files: Files, path: str | None) -> None:
        self._files = files
        self._path = path
        self._field = bytearray()
        self._waiting: tuple[str, str] | None = None
        self._asking: AbstractAsyncContextManager[Writing] | None = None
        self._writing: Writing | None = None
        self.entries: list[wire.Entry] = []

    async def receive(self, event: Any) -> None:
        """A part's head, some of its bytes, or None at its end."""
        if isinstance(event, MultipartSegment):
            if event.name == "file":
                await self._settle(None)
                await self._open(file_name(event))
            elif event.name != "path":
                raise InvalidRequest(f"unknown part {event.name[:100]!r}; an upload has `file` and `path`")
        elif event and self._writing is not None:
            await self._writing.send(event)
        elif event:
            self._field += event
            if len(self._field) > 4096:
                raise InvalidRequest("`path` may have at most 4096 bytes")
        elif self._writing is not None:
            self.entries.append(await self._writing.finish())
            await self._hang_up()
        else:
            try:
                self._path = self._field.decode()
            except UnicodeDecodeError:
                raise InvalidRequest("`path` is not UTF-8") from None
            self._field.clear()

    async def _open(self, name: str) -> None:
        if self._path:
            target = file_path(self._path)
        else:
            target = f".{secrets.token_hex(8)}.upload"
            self._waiting = (target, name)
        self._path = None
        self._asking = self._files.write(target)
        self._writing = await self._asking.__aenter__()

    async def _settle(self, path: str | None) -> None:
        """Give the file that waits its path, or its own name."""
        if self._waiting is None:
            return
        source, name = self._waiting
        if not (path or name):
            raise InvalidRequest("where to? send `path`, or a file name that is a path")
        self.entries[-1] = await self._files.move(source, file_path(path or name))
        self._waiting = None

    async def finish(self) -> None:
        """The body is complete."""
        if not self.entries:
            raise InvalidRequest("the upload has no part named `file`")
        await self._settle(self._path)

    async def _hang_up(self) -> None:
        if self._asking is not None:
            asking, self._asking, self._writing = self._asking, None, None
            await asking.__aexit__(None, None, None)

    async def close(self) -> None:
        """Clean up: cancel an unfinished file, and delete one that waits for its path."""
        await self._hang_up()
        if self._waiting is not None:
            with suppress(GuestFailure):  # not_found: it was never written
                await self._files.delete(self._waiting[0])


def file_name(part: MultipartSegment) -> str:
    """The name of an uploaded file. Many clients send one that is not ASCII as RFC 5987 says, which RFC 7578 forbids.

    Raises:
        InvalidRequest: the name is not in the character set that it names.
    """
    unquoted = re.sub(r'"(\\.|[^\\"])*"', '""', part.header("Content-Disposition") or "")
    extended = re.search(r"; *filename\* *= *([^';]*)'[^';]*'([^'; ]*)", unquoted, re.IGNORECASE)
    if extended is None:
        return part.filename or ""
    charset, encoded = extended.groups()
    try:
        return unquote(encoded, charset, "strict")
    except (UnicodeDecodeError, LookupError):
        raise InvalidRequest(f"the file name {encoded[:200]!r} can't be read as {charset[:50]!r}") from None


def file_path(path: str) -> str:
    """The path, if it can be a file's."""
    if path.endswith("/"):
        raise InvalidRequest(f"{path[:200]!r} is a directory; the path names the file itself")
    return path


async def read_inline(call: Call) -> InlineFile:
    """A small file's content inside JSON."""
    files, path = Files(call.sandbox.guest), call.query.path
    found = bytearray()
    holding = call.http.hold("files inside JSON")
    async with files.read(path) as content:
        async for data in content.pieces():
            holding.resize(3 * (len(found) + len(data)))  # its bytes, their base64, the answer
            found += data
            if len(found) > INLINE_LIMIT:
                raise InvalidRequest(
                    f"{path[:200]}: too large for JSON (over {INLINE_LIMIT} bytes)",
                    hint="download it with GET …/files?path=",
                )
    return InlineFile(path=files.resolve(path), content=base64.b64encode(found).decode())


async def write_inline(call: Call, body: InlineFile) -> FileEntry:
    """Write a file from JSON. Its parents are made as needed."""
    call.http.hold("files inside JSON", len(body.content))
    try:
        content = base64.b64decode(body.content, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("`content` is not base64") from None
    if not body.path:
        raise InvalidRequest("`path` is empty")
    async with Files(call.sandbox.guest).write(body.path) as writing:
        await writing.send(content)
        return file_entry(await writing.finish())


async def delete_file(call: Call) -> None:
    """Delete a file, or a directory with its content."""
    await Files(call.sandbox.guest).delete(call.query.path)


async def list_dir(call: Call) -> list[FileEntry]:
    """The entries of a directory, sorted by name.

    With `limit` the answer may be a part of them. The header `X-More: true` then tells that there are more, and the
    next request asks for those `after` the last name.
    """
    query = call.query
    files, holding = Files(call.sandbox.guest), call.http.hold("listings of directories")
    listing = await files.list(query.path, holding=holding, after=query.after, limit=query.limit or MAX_ENTRIES)
    if listing.more and query.limit is None:
        raise TooLarge(
            f"a listing in one piece has at most {MAX_ENTRIES} entries and {LISTING_SIZE} characters",
            hint="list the directory in pages, with `limit` and `after`",
        )
    if listing.more:
        call.http.set_header("X-More", "true")
    return [file_entry(entry) for entry in listing.entries]


async def stat(call: Call) -> FileEntry:
    """The file or directory at a path."""
    return file_entry(await Files(call.sandbox.guest).stat(call.query.path))


async def make_dir(call: Call, body: MakeDir) -> FileEntry:
    """Make a directory, with its parents."""
    return file_entry(await Files(call.sandbox.guest).make_dir(body.path))


async def move(call: Call, body: Move) -> FileEntry:
    """Rename or move. The destination's parents are made as needed."""
    return file_entry(await Files(call.sandbox.guest).move(body.source, body.destination))


# -- the rest


class MetricsModel(Struct):
    """Readings from inside the sandbox: percent of all processors since the last reading, bytes, MiB by their names."""

    ts: int
    cpu_count: int
    cpu_used_pct: float
    mem_total: int
    mem_used: int
    mem_cache: int
    mem_total_mib: int
    mem_used_mib: int
    disk_total: int
    disk_used: int


async def metrics(call: Call) -> MetricsModel:
    """The sandbox's use of resources, as its agent reports it."""
    found = await call.sandbox.guest.link.call(wire.GetMetrics(), wire.Metrics)
    values = {name: getattr(found, name) for name in found.__struct_fields__}
    return MetricsModel(**values, mem_total_mib=found.mem_total >> 20, mem_used_mib=found.mem_used >> 20)


async def sandbox_health(call: Call) -> None:
    """Whether the sandbox answers: 204 if it does, else 502. Asking does not wake one that is paused."""
    sandbox = call.sandbox
    if sandbox.state in ASLEEP:
        hint = "POST /sandboxes/{id}/resume lets it go on"
        raise GuestUnresponsive(f"the sandbox is {sandbox.state}", hint=hint, outcome=Ending.NOT_STARTED)
    await sandbox.guest.link.call(wire.Ping(), wire.Done, timeout=5)


class PoolModel(Struct):
    template: str
    ready: int
    size: int


class Health(Struct):
    """Whether the server takes new sandboxes, and how it isolates them from the host. `trouble` says what is amiss.

    `capabilities` names what a client may offer its user.
    """

    ready: bool
    version: str
    isolation: str
    accelerator: str
    network: str
    sandboxes: int
    maxSandboxes: int
    pool: list[PoolModel]
    capabilities: list[str]
    trouble: str | None = None


class Limit(Struct):
    """How much of something your key may have, and how much of it your key has now."""

    limit: int
    used: int


class RateLimit(Struct):
    """How often your key may do something, how often it has, and in how many seconds the oldest of these expires."""

    limit: int
    used: int
    reset: int


class LimitsModel(Struct):
    """The limits of your key. `heldBytes` are those that wait in the server for you; docs/rest.md says which.

    `maxTimeout` is how many seconds a sandbox may live at a time, and `checkpointBytes` what the checkpoints of one
    sandbox may take.
    """

    sandboxes: Limit
    pausedSandboxes: Limit
    snapshots: Limit
    createsPerMinute: RateLimit
    requests: Limit
    connections: Limit
    heldBytes: Limit
    maxTimeout: int
    checkpointBytes: int


async def limits(call: Call) -> LimitsModel:
    """The limits of your key, and what of them is used now."""
    sandboxes, owner, now = call.sandboxes, call.owner, time.monotonic()
    requests, sockets = (call.http.application.settings[name] for name in ("requests", "sockets"))
    creates, held = sandboxes.creates, sandboxes.held
    return LimitsModel(
        sandboxes=Limit(sandboxes.places.per_owner, sandboxes.places.of(owner)),
        pausedSandboxes=Limit(sandboxes.pauses.maximum, sandboxes.pauses.of(owner)),
        snapshots=Limit(sandboxes.snapshots.maximum, len(sandboxes.snapshots.of(owner))),
        createsPerMinute=RateLimit(creates.most, creates.of(owner, now), creates.reset(owner, now)),
        requests=Limit(requests.most, requests.of(owner)),
        connections=Limit(sockets.most, sockets.of(owner)),
        heldBytes=Limit(held.most, held.of(owner)),
        maxTimeout=sandboxes.max_timeout,
        checkpointBytes=sandboxes.checkpoints.budget,
    )


async def health(call: Call) -> Health:
    """The server's own health. No key is needed."""
    sandboxes = call.sandboxes
    capabilities = sandboxes.capabilities
    if sandboxes.places.is_draining:
        call.http.set_status(503)
    return Health(
        ready=not sandboxes.places.is_draining,
        version=__version__,
        isolation=capabilities.isolation,
        accelerator=capabilities.accelerator,
        network=capabilities.network,
        sandboxes=len(sandboxes),
        maxSandboxes=sandboxes.places.maximum,
        pool=[PoolModel(pool.template_id, pool.ready, pool.size) for pool in sandboxes.pools.values()],
        capabilities=[
            "pty",
            "hold",
            "variables",
            "complete",
            "share",
            *(["pause", "snapshot", "fork", "checkpoints"] if sandboxes.pauses.is_offered else []),
        ],
        trouble=sandboxes.trouble or None,
    )
