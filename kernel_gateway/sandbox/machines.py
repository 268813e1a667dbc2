"""How sandboxes get their machines: from the pool, a template, or files. Each has its policy before it runs."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kernel_gateway import drivers
from kernel_gateway.drivers import DriverError, NoSpace, Vm
from kernel_gateway.errors import (
    CellvmError,
    Corrupt,
    GuestFailure,
    HostFull,
    Incompatible,
    InsufficientStorage,
    Unavailable,
)
from kernel_gateway.guest.guest import Guest, Guests, Identity, Still
from kernel_gateway.held import Held
from kernel_gateway.images.preparation import Preparation
from kernel_gateway.images.templates import Template, Templates
from kernel_gateway.metrics import Metrics
from kernel_gateway.network.policy import Policy
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.sandbox import Sandbox, filter_of

log = logging.getLogger(__name__)

START_ATTEMPTS = 2
DEFAULT_POLICY = Policy()


@contextmanager
def saving(sandbox: Sandbox, what: str) -> Iterator[None]:
    """Tell what keeps a sandbox from being saved in the words of its owner.

    Args:
        what: "paused", for example.

    Raises:
        InsufficientStorage: the disk has no room.
        GuestFailure: the sandbox can't be saved.
    """
    try:
        yield
    except NoSpace as error:
        hint = "the operator must free some space; the sandbox still runs"
        raise InsufficientStorage(f"the sandbox can't be {what}: {error}", hint=hint) from error
    except (DriverError, OSError, OverflowError, ValueError) as error:  # what a guest has said may not be encodable
        log.error("sandbox %s could not be %s: %.500s", sandbox.id, what, error)
        raise GuestFailure(
            "failed", f"the sandbox could not be {what}, and still runs; the server's log says why"
        ) from error


class Machines:
    """The starter of sandboxes' guests. The arguments are those of `Sandboxes`."""

    def __init__(
        self,
        guests: Guests,
        pools: dict[str, Pool],
        templates: Templates,
        held: Held,
        metrics: Metrics,
        journals: Path | None,
        preparation: Preparation | None,
    ) -> None:
        self.guests = guests
        self.pools = pools
        self.capabilities = guests.capabilities
        self._templates = templates
        self._held = held
        self._metrics = metrics
        self._journals = journals
        self._preparation = preparation

    async def require(self, template: Template) -> None:
        """Return when the template is ready, if this server offers it.

        Raises:
            TemplateNotReady: it is still being built.
        """
        if self._preparation is not None and self._templates.find(template.id) is not None:
            await self._preparation.require(template)

    async def fresh(self, sandbox: Sandbox) -> Guest:
        """A guest from the pool, or else from a restore. If a machine fails the handshake, another is tried.

        Raises:
            HostFull: no machine could be started.
        """
        pool = self.pools.get(sandbox.template.id)
        began = time.monotonic()
        for attempt in range(START_ATTEMPTS):
            try:
                in_stock = await pool.take() if pool else None
                guest = in_stock or await self.guests.start(sandbox.template.id)
                try:
                    await self._prepare(guest.vm, sandbox.policy)
                    await self.guests.resume(guest, sandbox_id=sandbox.id, hostname=sandbox.id, env=sandbox.full_env)
                except BaseException:
                    await guest.kill()
                    raise
                path = "pool" if in_stock else "restore"
                self._metrics.creates.labels(sandbox.template.id, path).observe(time.monotonic() - began)
                guest.adopt(self._held.account(sandbox.owner), self._journals)
                return guest
            except (DriverError, CellvmError) as error:
                self._metrics.failed_starts.labels(sandbox.template.id).inc()
                log.error("sandbox %s: start %d failed: %.500s", sandbox.id, attempt + 1, error)
        raise HostFull("no machine could be started for the sandbox", hint="the server's log says why")

    async def saved(self, sandbox: Sandbox, directory: Path, what: str = "paused sandbox") -> Guest:
        """A guest that goes on where the sandbox was saved.

        Args:
            what: what the directory has, in the words of the sandbox's owner.

        Raises:
            Corrupt: the files are damaged.
            Incompatible: it can't go on with this host, or with this template.
            HostFull: no machine could be started.
        """
        return await self._restored(sandbox, directory, None, what)

    async def copy(self, sandbox: Sandbox, source: Path | Still) -> Guest:
        """A guest that stands where another sandbox stood, and is this sandbox's own.

        Args:
            source: the directory of a snapshot, or how the other one stood.

        Raises:
            Corrupt, Incompatible, HostFull: as `saved`.
        """
        began = time.monotonic()
        guest = await self._restored(sandbox, source, Identity(sandbox.id, sandbox.full_env), "snapshot")
        path = "snapshot" if isinstance(source, Path) else "fork"
        self._metrics.creates.labels(self._templates.label(sandbox.template), path).observe(time.monotonic() - began)
        return guest

    async def _restored(self, sandbox: Sandbox, source: Path | Still, another: Identity | None, what: str) -> Guest:
        account, prepare = self._held.account(sandbox.owner), partial(self._prepare, policy=sandbox.policy)
        try:
            return await self.guests.restore(source, account, self._journals, prepare, another)
        except drivers.Damaged as error:
            log.error("sandbox %s can't go on from its files: %s", sandbox.id, error)
            hint = f"the server's log names the file; restore it from a copy, or delete the {what}"
            raise Corrupt(f"the files of the {what} are damaged, and it can't be resumed", hint=hint) from error
        except drivers.Incompatible as error:
            hint = f"use it where it was saved, or delete the {what}"
            raise Incompatible(f"the {what} can't be resumed here: {error}", hint=hint) from error
        except (DriverError, OSError) as error:
            log.error("sandbox %s could not be resumed: %.500s", sandbox.id, error)
            raise HostFull("no machine could be started for the sandbox", hint="the server's log says why") from error

    # -- policies

    def check_enforceable(self, policy: Policy) -> None:
        """See that machines here can be restricted as the policy says.

        Raises:
            Unavailable: they can't.
        """
        if policy.restricts and self.capabilities.network == "host":
            raise Unavailable(
                "this server can't restrict what sandboxes reach: they are not isolated and use the host's own network",
                hint="run it with another --isolation",
            )

    async def enforce(self, vm: Vm, policy: Policy) -> None:
        """Put the policy into the machine's filter.

        Raises:
            DriverError: the filter did not take the policy.
        """
        between = filter_of(vm)
        if between is not None:
            try:
                await between.apply(policy)
            except OSError as error:
                raise DriverError(f"the filter could not be reached: {error}") from error
        elif policy.restricts and self.capabilities.network != "off":
            raise DriverError("the machine has no filter")

    async def _prepare(self, vm: Vm, policy: Policy) -> None:
        if policy != DEFAULT_POLICY:  # every filter begins with the default
            await self.enforce(vm, policy)
