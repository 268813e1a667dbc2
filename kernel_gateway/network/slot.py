"""One sandbox's network: a namespace of its own, the filter in it, and the way out.

It lives by open descriptors and, with passt, by a process that dies with the server. So nothing is left of it when it
is closed, or when the server ends in any way.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from kernel_gateway.drivers import DriverError
from kernel_gateway.network import rules
from kernel_gateway.network.policy import Floor, Policy, Refusal

INSIDE = Path(__file__).with_name("inside.py")
REFUSALS_KEPT = 500
REFUSALS_SHARED = 1.0
"""Seconds for which whoever asks for refusals gets the same reading of the filter, because each takes two processes."""
PIN_SLACK = 60.0
"""Seconds that an address is let through for longer than was asked, so that the next question costs nothing."""
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}
"""Protocols by number. nft would read their names from a file that minimal systems do not have."""
MAKE_TIMEOUT = 20.0
COMMAND_TIMEOUT = 20.0


async def command(argv: list[str], text: str, fds: Iterable[int] = ()) -> str:
    """Run a program with `text` on its standard input, and return what it prints.

    Raises:
        DriverError: the program failed; the text says how.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=tuple(fds)
        )
    except OSError as error:
        raise DriverError(f"{argv[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            out, err = await process.communicate(text.encode())
    except BaseException as error:
        with suppress(ProcessLookupError):  # it has ended just now
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise DriverError(f"{argv[0]} did not end in {COMMAND_TIMEOUT:.0f} s") from None
        raise
    if process.returncode:
        raise DriverError(f"{' '.join(argv)[:200]}: {err.decode('utf-8', 'replace').strip()[-500:]}")
    return out.decode()


class Slot:
    """A network that one machine uses once. `Slots` makes it, connects it, and gives it a resolver and a gate.

    Two stacks undo what was set up: `closing` first, in the event loop; `closed` last, in a thread. `tap` is the
    machine's end. `sockets` are bound to the gateway's address: the resolver's UDP and TCP sockets, the gate's, the
    proxy's.
    """

    def __init__(
        self,
        mechanism: str,
        net: int,
        user: int,
        tap: int,
        sockets: list[socket.socket],
        floor: Floor,
        *,
        to_gate: bool,
    ) -> None:
        self.mechanism = mechanism
        self._to_gate = to_gate
        self.net = net
        self._user = user
        self._tap = tap
        self.sockets = sockets
        self.policy = Policy()
        self.floor = floor
        self.policy_changed: Callable[[], None] = lambda: None
        self.closing, self.closed = ExitStack(), ExitStack()
        self._generation = 1
        self._pinned: dict[IPv4Address, tuple[str, float]] = {}  # past ones, too: connections to them may go on
        self._lock = asyncio.Lock()
        self._refused: dict[tuple[str, int, str, str], Refusal] = {}
        self._reading: asyncio.Task[list[Refusal]] | None = None
        self._read_at = 0.0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Slot {self.mechanism} {'closed' if self._is_closed else 'open'}>"

    @classmethod
    async def make(cls, mechanism: str, floor: Floor, *, to_gate: bool = False, bandwidth: int = 0) -> "Slot":
        """A namespace with the guest's side and the filter of the default policy, not connected to anything yet.

        Args:
            to_gate: all web traffic passes through its gate.
            bandwidth: Mbit a second that the guest may send, and that it may receive; 0 for no limit.

        Raises:
            DriverError: the slot could not be made.
        """
        spaces = ["--net"] if mechanism == "netns" else ["--user", "--map-root-user", "--net"]
        wanted = {
            "tap": rules.TAP,
            "ip": f"link set {rules.TAP} address {rules.GATEWAY_MAC}\n"
            f"addr add {rules.GATEWAY}/30 dev {rules.TAP}\nlink set {rules.TAP} up\n",
            "nft": rules.slot(floor, bandwidth) + rules.policy(Policy(), 1, to_gate=to_gate),
            "tc": rules.shaping(bandwidth),
            "address": str(rules.GATEWAY),
            "dns": rules.DNS_PORT,
            "gate": rules.GATE_PORT,
            "proxy": rules.PROXY_PORT,
        }
        argv = ["unshare", *spaces, "--", sys.executable, "-I", "-S", str(INSIDE)]
        try:
            said, fds = await _set_up(argv, json.dumps(wanted))
        except TimeoutError as error:
            raise DriverError(f"a network could not be made within {MAKE_TIMEOUT:.0f} s") from error
        except OSError as error:
            raise DriverError(f"a network could not be made: {error}") from error
        if not fds:
            raise DriverError(f"a network could not be made: {said}")
        net, user, tap, *rest = fds
        for fd in fds:
            os.set_inheritable(fd, False)
        sockets = [socket.socket(fileno=fd) for fd in rest]
        for sock in sockets:
            sock.setblocking(False)
        return cls(mechanism, net, user, tap, sockets, floor, to_gate=to_gate)

    @property
    def tap(self) -> int:
        return self._tap

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors that a program started with `enter` must inherit."""
        return self.net, self._user

    @property
    def enter(self) -> list[str]:
        """The prefix of a command that runs inside."""
        user = [] if self.mechanism == "netns" else ["--preserve-credentials", f"--user=/proc/self/fd/{self._user}"]
        return ["nsenter", *user, f"--net=/proc/self/fd/{self.net}", "--"]

    async def run(self, *argv: str, text: str = "") -> str:
        """Run a program inside.

        Raises:
            DriverError: the program failed, or the slot is closed.
        """
        if self._is_closed:
            raise DriverError("the network is closed")
        return await command([*self.enter, *argv], text, self.fds)

    async def apply(self, policy: Policy) -> None:
        """Replace the policy. Connections that the new one forbids are cut.

        Raises:
            DriverError: the filter refused it; the old one is still in force.
        """
        async with self._lock:
            self._generation += 1  # before it can fail, because nobody knows then how far it came
            now = time.monotonic()
            self._pinned = {
                address: (name, until) for address, (name, until) in self._pinned.items() if policy.permits_name(name)
            }
            pinned = {address: until - now for address, (_, until) in self._pinned.items() if until > now}
            text = rules.policy(
                policy, self._generation, to_gate=self._to_gate, pinned=pinned, kept=self._pinned.keys()
            )
            await self.run("nft", "-f", "-", text=text)
            self.policy = policy
        self.policy_changed()

    async def pin(self, name: str, addresses: list[IPv4Address], seconds: float) -> bool:
        """Let the addresses of a name through for at least `seconds`, if the policy (still) allows the name.

        Returns:
            Whether the filter had to be told, which takes a process.
        """
        async with self._lock:
            now = time.monotonic()
            found = [self._pinned.get(address, ("", 0.0)) for address in addresses]
            if not self.policy.permits_name(name) or all(
                pinned == name and until >= now + seconds for pinned, until in found
            ):
                return False
            await self.run("nft", "-f", "-", text=rules.pin(dict.fromkeys(addresses, seconds + PIN_SLACK)))
            for address in addresses:
                self._pinned.pop(address, None)  # the newest come last
                self._pinned[address] = name, now + seconds + PIN_SLACK
            while len(self._pinned) > rules.PINS:
                del self._pinned[next(iter(self._pinned))]
            return True

    async def set_floor(self, floor: Floor) -> None:
        """Tell the filter which addresses and networks are the host's now."""
        async with self._lock:
            await self.run("nft", "-f", "-", text=rules.surroundings(floor))
            self.floor = floor

    def refused(self, destination: str, port: int, protocol: str, reason: str) -> None:
        """Count a refusal of the resolver or the gate."""
        key = (destination, port, protocol, reason)
        before = self._refused.pop(key, None)
        if before is None and len(self._refused) >= REFUSALS_KEPT:
            del self._refused[next(iter(self._refused))]
        count = before.count + 1 if before else 1
        self._refused[key] = Refusal(destination, port, protocol, reason, count, time.time())

    async def refusals(self) -> list[Refusal]:
        """All refusals, by name and by address, newest first. Those by address may be as of a second ago.

        Raises:
            DriverError: the filter can't be read.
        """
        now = time.monotonic()
        if self._reading is None or (self._reading.done() and now - self._read_at > REFUSALS_SHARED):
            self._reading, self._read_at = asyncio.create_task(self._read_refusals()), now
            # asyncio would complain of an exception that nobody has waited for.
            self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        found = [*self._refused.values(), *await asyncio.shield(self._reading)]
        return sorted(found, key=lambda refusal: refusal.last, reverse=True)[:REFUSALS_KEPT]

    async def _read_refusals(self) -> list[Refusal]:
        """The refusals that the filter has counted."""
        found: list[Refusal] = []
        for name in ("refused", "refused_other"):
            text = await self.run("nft", "--json", "--numeric-protocol", "list", "set", "inet", "slot", name)
            found += _listed(json.loads(text), time.time())
        return found

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.closing.close()
            # A thread does it, because the kernel takes tens of milliseconds to take a device down.
            asyncio.get_running_loop().run_in_executor(None, self._release)

    def _release(self) -> None:
        for sock in self.sockets:
            sock.close()
        for fd in (self.net, self._user, self._tap):
            os.close(fd)
        self.closed.close()


async def _set_up(argv: list[str], wanted: str) -> tuple[str, list[int]]:
    """Run `inside.py`, and return the descriptors that it hands out, or else a message and no descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(argv, stdin=theirs.fileno(), stderr=subprocess.PIPE, start_new_session=True)
        answer, fds = b"", list[int]()
        with process:  # this waits for its end, which comes as soon as it has answered
            assert process.stderr
            try:
                ours.setblocking(False)
                with suppress(ConnectionError):  # it has ended already; its stderr says why
                    ours.send(wanted.encode())
                    async with asyncio.timeout(MAKE_TIMEOUT):
                        await _readable(ours)
                    answer, fds, _, _ = socket.recv_fds(ours, 64 * 1024, 16)
                if fds:
                    return "", fds
                told = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
                return json.loads(answer)["error"] if answer else (told or ["it ended without a word"])[-1], fds
            finally:
                if not fds:
                    os.killpg(process.pid, signal.SIGKILL)  # a program of it that hangs must not outlive it


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def _listed(document: dict[str, Any], now: float) -> list[Refusal]:
    """The elements of one of the filter's sets of refusals, as `nft --json` shows them."""
    found = []
    for found_set in (part["set"] for part in document["nftables"] if "set" in part):
        for element in found_set.get("elem", []):
            fields = element["elem"]
            reason, address, protocol, *port = fields["val"]["concat"]
            found.append(
                Refusal(
                    destination=address,
                    port=int(port[0]) if port else 0,
                    protocol=PROTOCOLS.get(protocol, str(protocol)),
                    reason=rules.REASONS[int(reason)],
                    count=fields["counter"]["packets"],
                    last=now - (found_set["timeout"] - fields["expires"]),
                )
            )
    return found
