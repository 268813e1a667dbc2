"""A paused sandbox's row in the store: what is needed to resume it, besides its files."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from kernel_gateway.errors import CellvmError
from kernel_gateway.images.templates import Template
from kernel_gateway.network.policy import Floor, Policy, parse_policy
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.recipe import Defaults
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.timeline import Timeline

log = logging.getLogger(__name__)


class Record(msgspec.Struct):
    """A paused sandbox. The fields are the Sandbox's own.

    `longest_life` is what was left of it, in seconds.
    """

    owner: str
    template: Template
    metadata: dict[str, str]
    env: dict[str, str]
    timeout: int
    idle_timeout: int | None
    longest_life: float | None
    auto_pause: bool
    auto_resume: bool
    was_stopped: bool
    allow_internet: bool
    allow_out: list[str]
    deny_out: list[str]
    open_ports: set[int]
    all_ports_open: bool
    kernel_name: str
    started_at: datetime
    paused_at: datetime
    access_token: str = ""
    traffic_token: str = ""
    timeline: Timeline = msgspec.field(default_factory=Timeline)
    defaults: Defaults = Defaults()


def record_of(sandbox: Sandbox) -> str:
    """The record of a sandbox that is being paused, as JSON."""
    record = Record(
        owner=sandbox.owner,
        template=sandbox.template,
        metadata=sandbox.metadata,
        env=sandbox.env,
        timeout=sandbox.timeout,
        idle_timeout=sandbox.idle_timeout,
        longest_life=sandbox.life_left,
        auto_pause=sandbox.auto_pause,
        auto_resume=sandbox.auto_resume,
        was_stopped=sandbox.was_stopped,
        allow_internet=sandbox.policy.allow_internet,
        allow_out=list(sandbox.policy.allow_out),
        deny_out=list(sandbox.policy.deny_out),
        open_ports=sandbox.open_ports,
        all_ports_open=sandbox.all_ports_open,
        kernel_name=sandbox.kernel_name,
        started_at=sandbox.started_at,
        paused_at=sandbox.paused_at or datetime.now(UTC),
        access_token=sandbox.access_token,
        traffic_token=sandbox.traffic_token,
        timeline=sandbox.timeline,
        defaults=sandbox.defaults,
    )
    return msgspec.json.encode(record).decode()


def read_record(what: str, text: str) -> Record | None:
    """A record that was stored; None for one of a later version, whose server may come back. The log names it then."""
    try:
        return msgspec.json.decode(text, type=Record)
    except msgspec.MsgspecError as error:
        log.error("%s can't be read, and is left as it is: %s", what, error)
        return None


def paused_sandbox(make: Callable[..., Sandbox], sandbox_id: str, record: Record, floor: Floor) -> Sandbox:
    """The sandbox of a record, paused.

    Args:
        make: the Sandbox with the arguments that are the same for all.
        floor: what no sandbox of this server reaches.
    """
    sandbox = make(
        sandbox_id,
        record.owner,
        record.template,
        timeout=record.timeout,
        metadata=record.metadata,
        env=record.env,
        policy=_policy_of(sandbox_id, record, floor),
        idle_timeout=record.idle_timeout,
        longest_life=record.longest_life,
        auto_pause=record.auto_pause,
        auto_resume=record.auto_resume,
        state=State.PAUSED,
    )
    sandbox.open_ports, sandbox.all_ports_open = record.open_ports, record.all_ports_open
    sandbox.kernel_name, sandbox.was_stopped = record.kernel_name, record.was_stopped
    sandbox.timeline = record.timeline
    sandbox.defaults = record.defaults
    if record.access_token:  # records of earlier servers have none
        sandbox.access_token, sandbox.traffic_token = record.access_token, record.traffic_token
    sandbox.started_at, sandbox.paused_at, sandbox.has_files = record.started_at, record.paused_at, True
    return sandbox


def _policy_of(sandbox_id: str, record: Record, floor: Floor) -> Policy:
    """The policy of a paused sandbox. One that this server's floor does not allow any more becomes no internet."""
    try:
        return parse_policy(
            allow_internet=record.allow_internet, allow_out=record.allow_out, deny_out=record.deny_out, floor=floor
        )
    except CellvmError as error:
        log.error("paused sandbox %s gets no internet, because its policy is not allowed here: %s", sandbox_id, error)
        return Policy(allow_internet=False)
