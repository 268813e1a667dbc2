"""Slots, made ahead of need and connected to the outside by one of two mechanisms.

`netns` needs root: a veth pair joins each slot to the host, which masquerades. A table of our own keeps slots away from
the host and from each other. `passt` is for a server that is not root or must not touch the host's tables: a passt
process per slot turns its packets into ordinary sockets. The filter inside a slot is the same for both.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from pathlib import Path
from typing import Any

from kernel_gateway.drivers import DriverError
from kernel_gateway.network import rules
from kernel_gateway.network.gate import Gate
from kernel_gateway.network.policy import DENIED, Floor, parse_zone
from kernel_gateway.network.resolver import Resolver
from kernel_gateway.network.slot import Slot, command

log = logging.getLogger(__name__)

SPARE = 2
"""Slots kept ready, beside the slots of the pool's machines."""
LOOK = 5.0
"""Seconds between looks at the host's addresses and networks."""
SHORTEST = 8
"""Length of the shortest prefix of a connected network. A shorter one is a part of a default route, as VPNs make it."""
UPLINK_TIMEOUT = 10.0
TABLE = "cellvm_"
"""Beginning of the name of a server's table on the host; the server's process id follows."""
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
RESOLV_CONF = Path("/etc/resolv.conf")
OURS = Path("/run/cellvm")
"""Directory of files, one for each network namespace, that say that a server of ours switched forwarding on."""
PROGRAMS = {
    "netns": ("ip", "nft", "nsenter", "unshare", "conntrack"),
    "passt": ("ip", "nft", "nsenter", "unshare", "pasta"),
}


async def choose(wanted: str, bandwidth: int = 0) -> tuple[str, str]:
    """The mechanism to use, "off" if there is none, and a text that says what did not work.

    Args:
        wanted: "auto", "off", or the only mechanism to try.
        bandwidth: Mbit a second that slots will be limited to; 0 for no limit.
    """
    if wanted == "off":
        return "off", "switched off"
    candidates = ["netns", "passt"] if wanted == "auto" else [wanted]
    reasons = []
    for mechanism in candidates:
        missing = [program for program in PROGRAMS[mechanism] if shutil.which(program) is None]
        if mechanism == "netns" and os.geteuid():
            reasons.append("netns: needs root")
        elif missing:
            reasons.append(f"{mechanism}: no {', '.join(missing)}")
        else:
            try:
                if mechanism == "netns":
                    await check_forwarding(whatever=wanted != "auto")
                slot = await Slot.make(mechanism, Floor(), bandwidth=bandwidth)
            except DriverError as error:
                reasons.append(f"{mechanism}: {error}")
            else:
                slot.close()
                return mechanism, "; ".join(reasons)
    return "off", "; ".join(reasons)


async def check_forwarding(*, whatever: bool) -> None:
    """Check that the host can forward the slots' packets.

    Args:
        whatever: skip the host's own rules, because the operator chose `netns` and may have made them fit.

    Raises:
        DriverError: the host can't forward them; the text says why.
    """
    if FORWARD.read_text().strip() == "0" and not os.access(FORWARD, os.W_OK):
        raise DriverError(f"forwarding is off, and {FORWARD} may not be written")
    chains = json.loads(await command(["nft", "--json", "list", "chains"], ""))["nftables"]
    for chain in (part["chain"] for part in chains if "chain" in part and not whatever):
        is_ours = chain["table"].startswith(TABLE)
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and not is_ours:
            table = f"{chain['family']} {chain['table']}"
            raise DriverError(f"the host's table `{table}` drops what is forwarded (Docker's does)")


async def tables() -> list[str]:
    """The tables of all servers on this host."""
    listed = json.loads(await command(["nft", "--json", "list", "tables", "inet"], ""))["nftables"]
    names = [part["table"]["name"] for part in listed if "table" in part]
    return [name for name in names if name.startswith(TABLE)]


async def found_floor(base: Floor) -> Floor:
    """The operator's floor, and with it what this host adds: its own addresses, its networks, its routers, its zones.

    Links to slots are left out, because they come and go, and DENIED has them.

    Raises:
        DriverError: the host can't be asked.
    """
    links = json.loads(await command(["ip", "-json", "-4", "addr"], ""))
    own = {IPv4Address(entry["local"]) for link in links for entry in link["addr_info"]}
    own = {address for address in own if not address.is_loopback and address not in rules.LINKS}
    networks = connected(json.loads(await command(["ip", "-json", "-4", "route"], "")))
    near = tuple(collapse_addresses((*base.near, *networks)))
    return replace(base, host=base.host | own, near=near, zones=base.zones or search_domains())


def connected(routes: list[dict[str, Any]]) -> list[IPv4Network]:
    """The networks that a host is in, and its routers, from the routes that `ip -json` lists. Pure.

    Hosters and universities put strangers' machines into one network of public addresses, so that such an address is
    no sign of a stranger from afar. What DENIED has is left out.
    """
    found = []
    for route in routes:
        hops = [route, *route.get("nexthops", [])]
        found += [IPv4Network(hop["gateway"]) for hop in hops if "gateway" in hop]
        if route.get("scope") == "link" and route["dst"] != "default":
            found.append(IPv4Network(route["dst"]))
    return [
        block
        for block in found
        if block.prefixlen >= SHORTEST and not any(block.subnet_of(denied) for denied in DENIED)
    ]


def forget_connections(source: IPv4Address, mask: str = "255.255.255.255") -> None:
    """Remove links' connections from the host's list of connections, because they would stay there for days.

    This blocks until it is done.
    """
    command = ["conntrack", "--delete", "--family", "ipv4", "--src", str(source), "--mask-src", mask]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "0 flow entries" not in done.stderr:
        log.error("the host's list of connections can't be cleaned: %.500s", done.stderr)


def system_resolvers() -> list[tuple[str, int]]:
    """The resolvers that the host itself asks; none if they can't be found."""
    return [(words[1], 53) for words in _resolv_conf() if words[0] == "nameserver" and words[1:]]


def search_domains() -> tuple[str, ...]:
    """The zones in which the host itself completes names: those of its own network."""
    found = []
    for text in (word for words in _resolv_conf() if words[0] in ("search", "domain") for word in words[1:]):
        with contextlib.suppress(ValueError):  # a dot alone means that names are not completed
            found.append(parse_zone(text))
    return tuple(dict.fromkeys(found))


def _resolv_conf() -> list[list[str]]:
    with contextlib.suppress(OSError):
        return [line.split() for line in RESOLV_CONF.read_text().splitlines() if line.split()]
    return []


async def dial(address: IPv4Address, port: int) -> socket.socket:
    """A connection for a gate, which has judged the address.

    Raises:
        OSError: there is no connection, or the address is the host's own. The kernel knows its own before we do.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), port))  # sends nothing, but chooses the source address
        if probe.getsockname()[0] == str(address):
            raise ConnectionRefusedError("the address is the host's own")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


class Slots:
    """All slots of a server. A machine gets its slot from `take`.

    Args:
        mechanism: "netns" or "passt".
        floor: the operator's part of the floor.
        resolvers: the resolvers to ask; empty for those of the host.
        proxy: host and port of the proxy for all web traffic; None for direct connections.
        bandwidth: Mbit a second that each slot may send, and may receive; 0 for no limit.
    """

    def __init__(
        self,
        mechanism: str,
        floor: Floor,
        *,
        resolvers: list[tuple[str, int]],
        proxy: tuple[str, int] | None,
        bandwidth: int = 0,
    ) -> None:
        self.bandwidth = bandwidth
        self.mechanism = mechanism
        self._resolvers = resolvers
        self._proxy = proxy
        self._base = self.floor = floor
        self._table = f"{TABLE}{os.getpid()}"
        self._numbers = itertools.count(os.getpid())
        self._spare: deque[Slot] = deque()
        self._open: set[Slot] = set()
        self._only_ours = False
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # One thread only for strangers' answers. They may take long to read, so no other work should wait for it.
        self._reader = ThreadPoolExecutor(1, "names")
        self._switched = OURS / f"ip_forward-{Path('/proc/self/ns/net').stat().st_ino}"

    def __repr__(self) -> str:
        return f"<Slots {self.mechanism} {len(self._spare)} spare>"

    async def start(self) -> None:
        """Prepare the host, and begin to make slots ahead.

        Raises:
            DriverError: the filter can't be installed. Then there must be no network.
        """
        if not (self._resolvers or system_resolvers()):
            log.warning("SANDBOXES HAVE NO NAMES: /etc/resolv.conf has no resolver; --dns gives them one")
        self.floor = await found_floor(self._base)
        if self.mechanism == "netns":
            for table in await tables():
                if not Path(f"/proc/{table.removeprefix(TABLE)}").exists():  # its server was killed
                    await command(["nft", "-f", "-"], f"delete table inet {table}\n")
            if not await tables():
                forget_connections(rules.LINKS.network_address, str(rules.LINKS.netmask))
            self._only_ours = self._switched.exists() or FORWARD.read_text().strip() == "0"
            await self._put_table()
            if self._only_ours:
                OURS.mkdir(mode=0o700, exist_ok=True)
                self._switched.touch()
                FORWARD.write_text("1")
        self._tasks = [asyncio.create_task(self._refill()), asyncio.create_task(self._watch_host())]

    async def _put_table(self) -> None:
        await command(["nft", "-f", "-"], rules.host(self._table, only_ours=self._only_ours))

    async def close(self) -> None:
        """Take down everything that this server has made."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in list(self._open):
            slot.close()
        self._reader.shutdown(wait=False, cancel_futures=True)
        if self.mechanism == "netns":
            await command(["nft", "-f", "-"], f"add table inet {self._table}\ndelete table inet {self._table}\n")
            await self._stop_forwarding()

    async def _stop_forwarding(self) -> None:
        """Switch forwarding off again, if we switched it on and no other server of ours needs it."""
        if self._switched.exists() and not await tables():
            FORWARD.write_text("0")
            self._switched.unlink()

    async def take(self) -> Slot:
        """A slot that nobody has used.

        Raises:
            DriverError: no slot could be made.
        """
        self._wanted.set()
        return self._spare.popleft() if self._spare else await self._make()

    async def _refill(self) -> None:
        pause = 1.0
        while True:
            if len(self._spare) >= SPARE:
                self._wanted.clear()
                await self._wanted.wait()
                continue
            try:
                self._spare.append(await self._make())
                pause = 1.0
            except Exception as error:  # noqa: BLE001  only this task fills the stock, so it must not end
                log.error("a sandbox's network could not be prepared: %s", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)

    async def _make(self) -> Slot:
        floor = self.floor
        to_gate = self._proxy is not None
        slot = await Slot.make(self.mechanism, floor, to_gate=to_gate, bandwidth=self.bandwidth)
        self._open.add(slot)
        slot.closing.callback(self._open.discard, slot)
        try:
            if floor != self.floor:  # the host got an address while the slot was being made
                await slot.set_floor(self.floor)
            if self.mechanism == "netns":
                await self._link(slot)
            else:
                await self._start_passt(slot)
            self._serve(slot)
        except BaseException:
            slot.close()
            raise
        return slot

    def _serve(self, slot: Slot) -> None:
        """Give a slot its resolver and its gate."""
        resolver = Resolver(
            upstreams=self._resolvers or system_resolvers(),
            floor=lambda: self.floor,
            policy=lambda: slot.policy,
            pin=slot.pin,
            refused=lambda name, reason: slot.refused(name, 0, "dns", reason),
            reader=self._reader,
        )
        gate = Gate(
            policy=lambda: slot.policy,
            floor=lambda: self.floor,
            pinned=resolver.gave,
            resolve=resolver.addresses,
            connect=dial,
            refused=lambda host, port, reason: slot.refused(host, port, "tcp", reason),
            proxy=self._proxy,
        )
        udp, tcp, redirected, proxy = slot.sockets
        resolver.start(udp, tcp)
        slot.closing.callback(resolver.close)
        if not self._proxy:
            proxy.close()  # nobody would answer there, so the kernel should refuse
        gate.start(redirected, proxy if self._proxy else None)
        slot.closing.callback(gate.close)
        slot.policy_changed = gate.judge_again

    async def _link(self, slot: Slot) -> None:
        """Link a slot to the host by a veth pair with a free number, which makes its name and its addresses."""
        for number in self._free_numbers():
            name, base = f"{rules.HOST_SIDE}{number}", rules.LINKS[4 * number]
            ours, theirs = base + 1, base + 2
            link = f"link add {name} type veth peer name {rules.UPLINK} netns /proc/self/fd/{slot.net}\n"
            try:
                await command(["ip", "-batch", "-"], link, slot.fds)
            except DriverError as error:
                if "File exists" in str(error):
                    continue
                raise
            await command(["ip", "-batch", "-"], f"addr add {ours}/30 dev {name}\nlink set {name} up\n")
            slot.closed.callback(forget_connections, theirs)
            inner = (
                f"addr add {theirs}/30 dev {rules.UPLINK}\nlink set {rules.UPLINK} up\nroute add default via {ours}\n"
            )
            await slot.run("ip", "-batch", "-", text=inner)
            return
        raise DriverError("no link between host and sandboxes is free")

    def _free_numbers(self) -> Iterator[int]:
        room = rules.LINKS.num_addresses // 4
        return (number % room for number in itertools.islice(self._numbers, room))

    async def _start_passt(self, slot: Slot) -> None:
        """Start the process that is the way out. It ends with the slot or with the server."""
        link = rules.LINKS[0]
        argv = [
            "setpriv", "--pdeathsig=KILL", "--", "pasta", "--foreground", "--quiet", "--ipv4-only", "--config-net",
            "--no-map-gw", "--no-dhcp", "-t", "none", "-u", "none", "-T", "none", "-U", "none", "--mtu", "1500",
            "--address", str(link + 2), "--netmask", "30", "--gateway", str(link + 1), "--ns-ifname", rules.UPLINK,
            "--runas", str(os.geteuid()), "--netns", f"/proc/self/fd/{slot.net}", "--userns",
            f"/proc/self/fd/{slot.fds[1]}",
        ]  # fmt: skip
        nothing = subprocess.DEVNULL
        try:
            process = subprocess.Popen(argv, pass_fds=slot.fds, stdin=nothing, stdout=nothing, stderr=nothing)
        except OSError as error:
            raise DriverError(f"{argv[0]}: {error.strerror}") from error
        slot.closed.callback(process.wait)
        slot.closing.callback(process.kill)
        deadline = time.monotonic() + UPLINK_TIMEOUT
        while not (await slot.run("ip", "route", "show", "default")).strip():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DriverError(f"passt did not connect a network (status {process.poll()})")
            await asyncio.sleep(0.02)

    async def _watch_host(self) -> None:
        """Keep every filter's list of the host's addresses and networks up to date, and our table in its place."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                if self.mechanism == "netns" and self._table not in await tables():
                    log.error(
                        "the table %s was deleted, perhaps by a firewall that started; it is put back", self._table
                    )
                    await self._put_table()
                self.floor = await found_floor(self._base)
                for slot in [slot for slot in self._open if slot.floor != self.floor]:
                    with contextlib.suppress(DriverError):  # it was closed meanwhile, or it is told the next time
                        await slot.set_floor(self.floor)
            except Exception as error:  # noqa: BLE001  this task must not end, either
                log.error("the host's tables or addresses can't be read or written: %s", error)
