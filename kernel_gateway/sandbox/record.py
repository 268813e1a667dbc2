"""A paused sandbox's row in the store: what is needed to resume it, besides its files."""

from datetime import UTC, datetime

import msgspec

from kernel_gateway.images.templates import Template
from kernel_gateway.sandbox.sandbox import Sandbox


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
    )
    return msgspec.json.encode(record).decode()
