"""The control routes of E2B's clients: shapes over those of `api/rest`, with the fields and words that E2B adds."""

import asyncio
import base64
import binascii
import hashlib
import re
from collections import OrderedDict, defaultdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from kernel_gateway.api import rest
from kernel_gateway.api.base import STATUS, Call
from kernel_gateway.errors import CellvmError, Conflict, InvalidRequest, Unavailable
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.sandbox import Sandbox

KEPT_KEYS = 100
"""Keys of one owner's creates that are remembered, so that the same request again creates nothing."""
PAGE = 100
"""Sandboxes in one page of a list, if the client asks for no other number."""


class CreateSandbox(rest.CreateSandbox):
    """A new sandbox. Fields of E2B's that are not offered are refused. `secure` means nothing: every sandbox is."""

    secure: bool | None = None
    mcp: Any = None
    volumeMounts: Any = None
    iam: Any = None


class SandboxWithTokens(rest.SandboxModel, omit_defaults=True):
    """A sandbox, and what opens it: one token for all that is in it, one for its ports alone."""

    domain: str | None = None
    envdAccessToken: str | None = None
    trafficAccessToken: str | None = None


class Connect(rest.Connect):
    """`memory` of a running sandbox is as it is."""

    memory: bool | None = None


class SetTimeout(Struct):
    """Seconds from now; a sandbox with none left ends at once."""

    timeout: Annotated[int, Meta(le=rest.MAX_LIFETIME, description="Seconds; the server's --max-timeout at most.")]


class SandboxesQuery(Struct):
    """Filters. `metadata` is itself a query string, and `state` names states with commas between them."""

    metadata: str | None = None
    state: str | None = None
    startedAfter: str | None = None
    template: str | None = None
    order: Literal["asc", "desc"] = "desc"
    limit: Annotated[int, Meta(ge=1, le=1000)] = PAGE
    nextToken: str | None = None


class MetricsQuery(Struct):
    """Seconds since 1970."""

    start: int | None = None
    end: int | None = None


class Metric(Struct):
    """A reading of a sandbox's use of resources, in bytes and percent."""

    timestamp: str
    timestampUnix: int
    cpuCount: int
    cpuUsedPct: float
    memUsed: int
    memTotal: int
    memCache: int
    diskUsed: int
    diskTotal: int


class Creates:
    """The creates that were made under a key of the client's, by owner and key. Each gives its sandbox's id.

    Of each owner KEPT_KEYS are remembered, so that no owner makes others forget. Bodies are kept as digests.
    """

    def __init__(self) -> None:
        self._by_owner: defaultdict[str, OrderedDict[str, tuple[bytes, asyncio.Task[str]]]] = defaultdict(OrderedDict)

    def find(self, owner: str, key: str, digest: bytes) -> "asyncio.Task[str] | None":
        """The create under that key, whether it is over or not.

        Raises:
            Conflict: it was another one.
        """
        known = self._by_owner[owner].get(key)
        if known is None:
            return None
        if known[0] != digest:
            raise Conflict(
                "this Idempotency-Key was used for another sandbox", hint="choose a new one for every create"
            )
        return known[1]

    def add(self, owner: str, key: str, digest: bytes, task: "asyncio.Task[str]") -> None:
        """Remember a create, unless it fails."""
        mine = self._by_owner[owner]
        mine[key] = digest, task

        def done(task: "asyncio.Task[str]") -> None:
            if task.cancelled() or task.exception():
                mine.pop(key, None)

        task.add_done_callback(done)
        while len(mine) > KEPT_KEYS:
            mine.popitem(last=False)


def with_tokens(call: Call, sandbox: Sandbox, made: rest.SandboxModel) -> SandboxWithTokens:
    """A sandbox with what opens it."""
    fields = {name: getattr(made, name) for name in made.__struct_fields__}
    return SandboxWithTokens(
        **fields,
        domain=call.http.application.settings["domain"],
        envdAccessToken=sandbox.access_token,
        trafficAccessToken=sandbox.traffic_token,
    )


def check_offered(body: CreateSandbox) -> None:
    """Refuse what can't be done here, because a sandbox without it would not be what the client wants.

    Raises:
        Unavailable: the body asks for it.
    """
    for name in ("mcp", "volumeMounts", "iam"):
        if getattr(body, name) not in (None, [], {}):
            raise Unavailable(f"this server does not offer {name}")


async def create_sandbox(call: Call, body: CreateSandbox) -> SandboxWithTokens:
    """Create a sandbox. It is running when the answer comes.

    With a header `Idempotency-Key` the same request again gives the same sandbox.
    """
    check_offered(body)
    key = call.http.request.headers.get("Idempotency-Key", "")
    if not key:
        return _told(call, await _create(call, body))
    if not re.fullmatch("[A-Za-z0-9-]{1,255}", key):
        raise InvalidRequest("an Idempotency-Key has 1 to 255 letters, digits or hyphens")
    creates: Creates = call.http.application.settings["creates"]
    digest = hashlib.sha256(msgspec.json.encode(body)).digest()
    task = creates.find(call.owner, key, digest)
    if task is None:
        task = asyncio.create_task(_create(call, body))
        creates.add(call.owner, key, digest, task)
    return _told(call, await asyncio.shield(task))


async def _create(call: Call, body: CreateSandbox) -> str:
    return (await rest.create_sandbox(call, body)).sandboxID


def _told(call: Call, sandbox_id: str) -> SandboxWithTokens:
    sandbox = call.mine.get(sandbox_id)
    return with_tokens(call, sandbox, rest.model(sandbox))


async def connect(call: Call, body: Connect) -> SandboxWithTokens:
    """Resume the sandbox if it is paused (201). One that runs lives at least `timeout` seconds more (200)."""
    return with_tokens(call, call.sandbox, await rest.connect(call, body))


class ForkError(Struct):
    """Why a copy could not be started, as any error."""

    code: int
    message: str
    error: str


class ForkModel(Struct, omit_defaults=True):
    """One copy, or why there is none."""

    sandbox: SandboxWithTokens | None = None
    error: ForkError | None = None


async def fork(call: Call, body: rest.Fork) -> list[ForkModel]:
    """Copies of the sandbox, each with its own id, kernel id, tokens, randomness and network, and all that it had."""
    rest.check_lifetime(call, body.timeout)
    made = await call.mine.fork(call.sandbox, body.count, body.timeout)
    return [
        ForkModel(error=ForkError(STATUS[each.code], str(each), each.code))
        if isinstance(each, CellvmError)
        else ForkModel(sandbox=with_tokens(call, each, rest.model(each)))
        for each in made
    ]


async def get_sandbox(call: Call) -> SandboxWithTokens:
    """One sandbox. A key that may only read is told no token, and neither is a link, because tokens outlive it."""
    sandbox = call.sandbox
    told = with_tokens(call, sandbox, await rest.get_sandbox(call))
    told.trafficAccessToken = None
    if call.mine.key.scope.is_read_only or call.mine.key.scope.mode:
        told.envdAccessToken = None
    return told


async def set_timeout(call: Call, body: SetTimeout) -> None:
    """Let the sandbox end that many seconds from now. E2B's clients may end it at once, with 0 or less."""
    if body.timeout >= 1:
        await rest.set_timeout(call, rest.SetTimeout(body.timeout))
    elif not is_e2b(call):
        raise InvalidRequest("`timeout` is at least 1", hint="delete the sandbox to end it at once")
    else:
        _ = call.sandbox.guest
        call.sandbox.set_timeout(0)


def is_e2b(call: Call) -> bool:
    """Whether the client says that it is one of E2B's."""
    return call.http.request.headers.get("publisher") == "e2b"


def moment(text: str) -> datetime:
    """A time of RFC 3339.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        found = datetime.fromisoformat(text.replace(" ", "+"))  # a query turns the zone's plus into a blank
    except ValueError:
        raise InvalidRequest(f"{text[:100]!r} is no time as in 2026-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


async def list_sandboxes(call: Call) -> list[SandboxWithTokens | rest.SandboxModel]:
    """Your sandboxes in pages, newest first. The header `X-Next-Token` is there if more follow."""
    query = call.query
    wanted = rest.parse_metadata(query.metadata or "")
    states = {each.strip() for each in (query.state or "").split(",") if each.strip()}
    after = moment(query.startedAfter) if query.startedAfter else None
    template = call.sandboxes.templates.find(query.template) if query.template else None
    found = [
        sandbox
        for sandbox in call.mine.list()
        if (not states or rest.model(sandbox).state in states)
        and wanted.items() <= sandbox.metadata.items()
        and (after is None or sandbox.started_at >= after)
        and (not query.template or (template is not None and sandbox.template.id == template.id))
        and sandbox.state is not State.CREATING
    ]
    found.sort(key=place_in_list, reverse=query.order == "desc")
    if query.nextToken:
        last = read_token(query.nextToken)
        is_desc = query.order == "desc"
        found = [each for each in found if (place_in_list(each) < last if is_desc else place_in_list(each) > last)]
    if len(found) > query.limit:
        found = found[: query.limit]
        token = base64.urlsafe_b64encode("|".join(place_in_list(found[-1])).encode()).decode()
        call.http.set_header("X-Next-Token", token)
    return [rest.model(sandbox) for sandbox in found]


def place_in_list(sandbox: Sandbox) -> tuple[str, str]:
    return sandbox.started_at.isoformat(timespec="microseconds"), sandbox.id


def read_token(token: str) -> tuple[str, str]:
    """The place of the last sandbox of a page.

    Raises:
        InvalidRequest: the token is not one of ours.
    """
    try:
        started, _, sandbox = base64.urlsafe_b64decode(token).decode().partition("|")
    except (binascii.Error, ValueError):
        raise InvalidRequest("`nextToken` is not one that this server gave") from None
    return started, sandbox


async def metrics(call: Call) -> Any:
    """The sandbox's use of resources: the last reading, or for E2B's clients the readings of a time."""
    query = call.query
    is_range = query.start is not None or query.end is not None
    if not is_range and not is_e2b(call):
        return await rest.metrics(call)
    start, end = query.start or 0, query.end
    return [
        Metric(
            timestamp=rest.rfc3339(datetime.fromtimestamp(each.ts, UTC)),
            timestampUnix=each.ts,
            cpuCount=each.cpu_count,
            cpuUsedPct=each.cpu_used_pct,
            memUsed=each.mem_used,
            memTotal=each.mem_total,
            memCache=each.mem_cache,
            diskUsed=each.disk_used,
            diskTotal=each.disk_total,
        )
        for each in call.sandbox.readings
        if start <= each.ts and (end is None or each.ts <= end)
    ]


async def not_offered(call: Call) -> None:
    """Volumes and secrets are not offered."""
    raise Unavailable("this server does not offer volumes and secrets")
