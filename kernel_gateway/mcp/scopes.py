"""Which sandbox a call of an MCP client means: the one that it names, its scope's, or a new one.

A scope is one chat, client process or legacy session. It has one sandbox, which is made when it is needed and knows its
scope by its metadata. So two chats with one key never share a kernel by accident.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from weakref import WeakValueDictionary

from kernel_gateway.errors import InvalidRequest, NotFound
from kernel_gateway.network.policy import Policy
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.lifecycle import ASLEEP, State
from kernel_gateway.sandbox.machines import DEFAULT_POLICY
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.sandboxes import Sandboxes

SCOPE = "cellvm.scope"
"""The name of the scope in a sandbox's metadata."""
HANDLE = 9
"""Characters of the shortest handle: the beginning of a sandbox's id that no other one of the key's has."""
REMEMBERED = 10_000
"""Scopes whose last sandbox is remembered, to tell when it has ended."""


class Scopes:
    """What is remembered of scopes: who is just making a sandbox, and which one was the last.

    Args:
        idle_timeout: seconds that a sandbox lives on after its last call.
    """

    def __init__(self, idle_timeout: int) -> None:
        self.idle_timeout = idle_timeout
        self._making: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._last: OrderedDict[tuple[str, str], str] = OrderedDict()

    def making(self, owner: str, scope: str) -> asyncio.Lock:
        """The lock of a scope's making, because calls that come together share one sandbox."""
        return self._making.setdefault((owner, scope), asyncio.Lock())

    def last(self, owner: str, scope: str) -> str | None:
        """The id of the scope's last sandbox."""
        return self._last.get((owner, scope))

    def remember(self, owner: str, scope: str, sandbox_id: str) -> None:
        self._last[owner, scope] = sandbox_id
        self._last.move_to_end((owner, scope))
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: what its key may see and create, and its scope (empty: none)."""

    sandboxes: Sandboxes
    mine: Access
    scopes: Scopes
    scope: str = ""

    async def sandbox_of(self, name: str | None) -> tuple[Sandbox, list[str]]:
        """The sandbox that a call means, running, and what the model must be told of it first.

        Raises:
            CellvmError: there is none of that name, or none can be created.
        """
        notes: list[str] = []
        if name is None and self.mine.key.scope.sandbox:
            name = self.mine.key.scope.sandbox
        if name is not None:
            sandbox = self.find(name)
        elif self.scope:
            sandbox, notes = await self._of_scope()
        else:
            sandbox = await self.create()
        sandbox = await self.awake(sandbox)
        sandbox.extend(self.scopes.idle_timeout)
        return sandbox, notes

    async def _of_scope(self) -> tuple[Sandbox, list[str]]:
        owner = self.mine.key.owner
        async with self.scopes.making(owner, self.scope):
            if there := self.of_scope():
                return there[0], []
            last = self.scopes.last(owner, self.scope)
            sandbox = await self.create(metadata={SCOPE: self.scope})
            self.scopes.remember(owner, self.scope, sandbox.id)
        if last is None:
            return sandbox, []
        entry = self.mine.store.entry(last)
        why = (entry and entry.reason) or "ended"
        return sandbox, [f"[the sandbox before has ended ({why}): variables and files are lost, this is a new one]"]

    def of_scope(self) -> list[Sandbox]:
        """The scope's sandboxes, newest first."""
        usable = (State.RUNNING, *ASLEEP)
        there = self.mine.list()
        return [each for each in there if each.metadata.get(SCOPE) == self.scope and each.state in usable]

    def find(self, name: str) -> Sandbox:
        """The sandbox with that id or handle.

        Raises:
            NotFound: the key sees none, or several.
        """
        found = [
            each for each in self.mine.list() if each.id == name or (each.id.startswith(name) and len(name) >= HANDLE)
        ]
        if len(found) != 1:
            raise NotFound(f"there is no sandbox {name!r:.80}", hint="leave `sandbox` out to get one")
        return found[0]

    async def awake(self, sandbox: Sandbox) -> Sandbox:
        """The sandbox, resumed if it is paused."""
        if sandbox.state in ASLEEP:
            await self.sandboxes.pauses.resume(sandbox, self.scopes.idle_timeout)
        return sandbox

    async def create(
        self,
        template: str | None = None,
        *,
        minutes: int | None = None,
        metadata: dict[str, str] | None = None,
        policy: Policy = DEFAULT_POLICY,
    ) -> Sandbox:
        """A new sandbox. Without a `template` it is of the default one, or of the only one that the key may create.

        Raises:
            InvalidRequest: there is no such template.
            CellvmError: as `Access.create`.
        """
        name = template or self.mine.key.scope.template
        found = self.sandboxes.templates.find(name) if name else self.sandboxes.templates.default
        if found is None:
            known = ", ".join(each.id for each in self.sandboxes.templates)
            raise InvalidRequest(f"unknown template {name!r:.100}", hint=f"this server offers {known}")
        timeout = self.scopes.idle_timeout if minutes is None else minutes * 60
        return await self.mine.create(found, timeout=timeout, metadata=metadata or {}, env={}, policy=policy)

    def handle_of(self, sandbox: Sandbox) -> str:
        """The shortest beginning of the sandbox's id that no other sandbox of the key's has."""
        others = [each.id for each in self.mine.list() if each is not sandbox]
        length = HANDLE
        while any(each.startswith(sandbox.id[:length]) for each in others):
            length += 1
        return sandbox.id[:length]

    def line_of(self, sandbox: Sandbox) -> str:
        """A sandbox in one line."""
        ends = sandbox.ends_at.strftime("%H:%M:%S UTC")
        return f"{self.handle_of(sandbox)} {sandbox.template.id} {sandbox.state}, until {ends}"
