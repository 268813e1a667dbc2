"""The sandboxes as one key sees them. Whatever a request does with a sandbox, it gets the sandbox from here."""

import builtins
from typing import Any

from kernel_gateway.errors import CellvmError, NotFound
from kernel_gateway.images.templates import Template
from kernel_gateway.sandbox import outbox, shares
from kernel_gateway.sandbox.key import Key, hashed, new_key
from kernel_gateway.sandbox.outbox import Event
from kernel_gateway.sandbox.sandbox import Sandbox, sandbox_id
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.shares import Share
from kernel_gateway.sandbox.snapshots import Snapshot
from kernel_gateway.sandbox.store import Entry, Store


class Access:
    """All that `key` may see and create: the sandboxes of its owner, within its scope."""

    def __init__(self, sandboxes: Sandboxes, store: Store, key: Key) -> None:
        self.key = key
        self._sandboxes = sandboxes
        self._snapshots = sandboxes.snapshots
        self._builds = sandboxes.builds
        self.store = store

    def of_kernel(self, kernel: str) -> Sandbox:
        """The sandbox of the kernel of that id.

        Raises:
            NotFound: as `get`; a text that can be no id counts as one that is unknown.
        """
        try:
            return self.get(sandbox_id(kernel))
        except NotFound as error:
            raise NotFound(f"kernel not found: {kernel!r:.100}", hint=error.hint) from None

    def get(self, sandbox_id: str) -> Sandbox:
        """The sandbox of that id.

        Raises:
            InvalidRequest: no sandbox can have such an id.
            NotFound: there is none, or it is out of the key's sight.
        """
        if self.key.scope.sandbox not in ("", sandbox_id):
            raise NotFound("sandbox not found")
        sandbox = self._sandboxes.get(self.key.owner, sandbox_id)
        if not self.key.scope.covers(sandbox.id, sandbox.template.id):
            raise NotFound("sandbox not found")
        return sandbox

    async def create(self, template: Template, **fields: Any) -> Sandbox:
        """A new, running sandbox; `fields` are those of `Sandboxes.create`.

        Raises:
            Forbidden: the key may not create it.
            CellvmError: as `Sandboxes.create`.
        """
        self.key.scope.check_create(template.id)
        return await self._sandboxes.create(self.key.owner, template, **fields)

    def snapshots(self) -> builtins.list[Snapshot]:
        """The snapshots in the key's sight, newest first. Those that are templates are not among them."""
        scope, templates = self.key.scope, self._builds.results(self.key.owner)
        return [
            each
            for each in self._snapshots.of(self.key.owner)
            if scope.covers(each.sandbox, each.template.id) and each.id not in templates
        ]

    def find_snapshot(self, name: str) -> Snapshot | None:
        """The snapshot of that id or name."""
        return next((each for each in self.snapshots() if name and name in (each.id, each.name)), None)

    def find_source(self, name: str) -> Snapshot | None:
        """What a sandbox can start from under that name: a snapshot, or a template of the owner's."""
        if (snapshot := self.find_snapshot(name)) is not None:
            return snapshot
        found = self._builds.named(self.key.owner, name)
        if found is None or not self.key.scope.covers(found[1].sandbox, found[1].template.id):
            return None
        return found[1]

    async def take_snapshot(self, sandbox: Sandbox, name: str) -> Snapshot:
        """A new snapshot; as `Snapshots.take`."""
        return await self._snapshots.take(sandbox, name)

    async def delete_snapshot(self, name: str) -> None:
        """Delete the snapshot of that id or name.

        Raises:
            NotFound: there is none in the key's sight.
        """
        snapshot = self.find_snapshot(name)
        if snapshot is None:
            raise NotFound("snapshot not found")
        await self._snapshots.delete(snapshot)

    async def fork(self, sandbox: Sandbox, count: int, timeout: int | None) -> builtins.list[Sandbox | CellvmError]:
        """Copies of a sandbox; as `Sandboxes.fork`.

        Raises:
            Forbidden: the key may not create them.
        """
        self.key.scope.check_create(sandbox.template.id)
        return await self._sandboxes.fork(sandbox, count, timeout)

    async def share(self, sandbox: Sandbox, mode: str, seconds: float) -> tuple[str, Share]:
        """A new link to a sandbox, and its key, which nobody can read again.

        Raises:
            Forbidden: the key may not give the sandbox away.
            NotFound, TooManyRequests: as `shares.add`.
            HostFull: the database can't be written.
        """
        self.key.scope.check_whole("share a sandbox")
        key = new_key()
        return key, await self.store.change(shares.add, sandbox.id, hashed(key), mode, seconds, is_news=True)

    async def shares(self, sandbox: Sandbox) -> builtins.list[Share]:
        """The links of a sandbox that are good now, the oldest first."""
        return await self.store.read(shares.of, sandbox.id)

    async def revoke(self, sandbox: Sandbox, share: str) -> None:
        """Remove a link of a sandbox. What was begun with it is cut soon after.

        Raises:
            Forbidden: the key may not give the sandbox away.
            NotFound: the sandbox has no such link.
            HostFull: the database can't be written.
        """
        self.key.scope.check_whole("revoke a link")
        await self.store.change(shares.revoke, sandbox.id, share, is_news=True)

    def ended_since(self, moment: float) -> list[Entry]:
        """The sandboxes that ended after `moment`, but not by a request, the last one first."""
        scope = self.key.scope
        return [each for each in self.store.ended_since(self.key.owner, moment) if scope.covers(each.id, each.template)]

    async def events(self, *, sandbox: str = "", **options: Any) -> builtins.list[Event]:
        """The events of the sandboxes in the key's sight; `options` are those of `outbox.events`.

        Args:
            sandbox: of this one alone, unless it is empty.

        Raises:
            NotFound: there never was such a sandbox in the key's sight.
        """
        if sandbox:
            known = self.store.entry(sandbox)
            if known is None or known.owner != self.key.owner or not self.key.scope.covers(known.id, known.template):
                raise NotFound("sandbox not found")
        scope = self.key.scope
        if scope.is_for_metrics:
            return []
        within = {"sandbox": sandbox or scope.sandbox, "template": scope.template}
        return await self.store.read(outbox.events, self.key.owner, **within, **options)

    def forget(self, sandbox_id: str) -> None:
        """Take note that the client knows of a sandbox's end."""
        self.store.sandbox_forgotten(sandbox_id, self.key.owner)

    def list(self) -> list[Sandbox]:
        """The sandboxes in the key's sight, newest first."""
        scope = self.key.scope
        return [each for each in self._sandboxes.list(self.key.owner) if scope.covers(each.id, each.template.id)]
