"""A slot's filter in the real kernel, without a machine. The test itself is the guest, and speaks Ethernet."""

import asyncio
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from kernel_gateway.drivers import GUEST_MAC, DriverError
from kernel_gateway.network import rules
from kernel_gateway.network.policy import DENIED as BLOCKS
from kernel_gateway.network.policy import Floor, Policy
from kernel_gateway.network.slot import Slot
from kernel_gateway.network.slots import Slots, choose
from tests.guest.world import DENIED, HOST, NAME_SERVER, OTHER_PUBLIC, PUBLIC, ROUTER, World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces; `doctor` says so")
NATTED, DENIED_BY_US = "93.184.215.99", "93.184.216.0/24"
"""The host's address behind its NAT, and a block that the operator denies."""
SO_RCVBUFFORCE = 33
VNET = bytes(10)
"""The header that our taps put before every frame."""
ME, GATE = bytes.fromhex(GUEST_MAC.replace(":", "")), bytes.fromhex(rules.GATEWAY_MAC.replace(":", ""))


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Guest:
    """Sends packets into a slot, and tells the answers."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._port = random.randrange(20_000, 60_000)
        self._places: dict[int, tuple[int, int]] = {}  # numbers of the next byte each way, by our port
        self.last = b""

    def send(self, payload: bytes, kind: int = 0x0800) -> None:
        os.write(self.slot.tap, VNET + GATE + ME + struct.pack(">H", kind) + payload)

    def packet(self, target: str, protocol: int, payload: bytes, ttl: int = 64) -> bytes:
        addresses = socket.inet_aton(str(rules.GUEST)) + socket.inet_aton(target)
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, ttl, protocol, 0) + addresses
        return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload

    def segment(
        self, target: str, ports: tuple[int, int], seq: int, ack: int, flags: int, data: bytes = b"", ttl: int = 64
    ) -> None:
        """Send a TCP segment of an even length."""
        head = struct.pack(">HHIIBBHHH", *ports, seq, ack, 0x50, flags, 64_000, 0, 0) + data
        addresses = socket.inet_aton(str(rules.GUEST)) + socket.inet_aton(target)
        total = checksum(addresses + struct.pack(">BBH", 0, 6, len(head)) + head)
        self.send(self.packet(target, 6, head[:16] + struct.pack(">H", total) + head[18:], ttl))

    async def connect(self, target: str, port: int) -> tuple[tuple[int, int], int]:
        """Open a connection. Returns its ports, and the number to acknowledge."""
        self._port += 1
        ports = (self._port, port)
        self.segment(target, ports, 0, 0, 0x02)
        async with asyncio.timeout(5):
            while await self._answer("tcp") != "open":
                pass
        ack = struct.unpack(">I", self.last[24:28])[0] + 1
        self.segment(target, ports, 1, ack, 0x10)
        return ports, ack

    async def goes_on(self, target: str, ports: tuple[int, int], ack: int) -> bool:
        """Send data on an open connection. Tells whether the answer is data, and not a reset.

        An answer that was sent before, and is sent again because nobody acknowledged it, does not count.
        """
        newest, self._port = self._port, ports[0]
        sent, expected = self._places.get(ports[0], (1, ack))
        self.segment(target, ports, sent, expected, 0x18, b"hi\r\n")
        try:
            async with asyncio.timeout(5):
                while True:
                    await self._answer("tcp")
                    port, seq = struct.unpack(">HI", self.last[22:28])
                    is_reset, data = self.last[33] & 0x04, self.last[40:]
                    if port == ports[0] and (is_reset or (data and seq == expected)):
                        self._places[port] = sent + 4, expected + len(data)
                        return not is_reset
        finally:
            self._port = newest

    async def ask(self, target: str, port: int = 80, protocol: str = "tcp") -> str:
        """Send a first packet. Tells its fate: open, reset, prohibited, or silence."""
        self._port += 1
        if protocol == "tcp":
            self.segment(target, (self._port, port), 1, 0, 0x02)
        elif protocol == "udp":
            self.send(self.packet(target, 17, struct.pack(">HHHH", self._port, port, 14, 0) + b"hello\n"))
        else:
            head = struct.pack(">BBHHH", 8, 0, 0, self._port, 1)
            self.send(self.packet(target, 1, head[:2] + struct.pack(">H", checksum(head)) + head[4:]))
        try:
            async with asyncio.timeout(1.5):
                return await self._answer(protocol)
        except TimeoutError:
            return "silence"

    async def _answer(self, protocol: str) -> str:
        loop = asyncio.get_running_loop()
        while True:
            try:
                frame = os.read(self.slot.tap, 65536)[len(VNET) :]
            except BlockingIOError:
                ready = asyncio.Event()
                loop.add_reader(self.slot.tap, ready.set)
                try:
                    await ready.wait()
                finally:
                    loop.remove_reader(self.slot.tap)
                continue
            kind, packet = struct.unpack(">H", frame[12:14])[0], frame[14:]
            if kind == 0x0806:  # the question for the guest's MAC address
                sender = packet[8:18]
                self.send(packet[:6] + b"\0\2" + ME + rules.GUEST.packed + sender, kind=0x0806)
            elif kind == 0x0800:
                proto, payload = packet[9], packet[20:]
                self.last = packet
                if proto == 1 and payload[0] == 3:
                    assert payload[1] == 13
                    return "prohibited"
                if proto == 1 and payload[0] == 0 and payload[4:6] == struct.pack(">H", self._port):
                    return "open"
                if proto in (6, 17) and struct.unpack(">H", payload[2:4])[0] == self._port:
                    return "open" if proto == 17 or payload[13] & 0x12 == 0x12 else "reset"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    with world.host.inside():
        yield world
    world.close()


@pytest.fixture(scope="module", params=["netns", "passt"])
async def slots(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Slots]:
    floor = Floor((IPv4Network("10.1.2.0/24"),), frozenset({IPv4Address(NATTED)}), (IPv4Network(DENIED_BY_US),))
    slots = Slots(request.param, floor, resolvers=[(NAME_SERVER, 53)], proxy=None)
    # A thread stays in the namespace in which it began, so these tests have threads of their own in the world.
    loop, executor = asyncio.get_running_loop(), ThreadPoolExecutor(4)
    loop.set_default_executor(executor)
    await slots.start()
    yield slots
    await slots.close()
    async with asyncio.timeout(10):
        while [fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == "/dev/net/tun"]:
            await asyncio.sleep(0.02)
        while "cvm" in world.host.run("ip -o link; nft list tables"):
            await asyncio.sleep(0.02)
    loop.set_default_executor(ThreadPoolExecutor())
    executor.shutdown()


@pytest.fixture(scope="module")
async def guest(slots: Slots) -> AsyncIterator[Guest]:
    slot = await slots.take()
    yield Guest(slot)
    slot.close()


@pytest.fixture(autouse=True)
async def default(guest: Guest) -> None:
    await guest.slot.apply(Policy())


async def test_out_and_back(guest: Guest) -> None:
    """The public internet answers, by TCP, UDP and ping."""
    assert [await guest.ask(PUBLIC, 80, protocol) for protocol in ("tcp", "udp", "icmp")] == ["open"] * 3


async def test_the_floor(guest: Guest) -> None:
    """Every block and every address of the host is refused at once, except for the operator's exceptions."""
    for address in (*DENIED.values(), HOST, "10.200.0.1", "8.8.4.4", "198.18.0.1"):
        if address in ("10.1.2.3", "127.0.0.1", "224.0.0.251", "250.1.2.3", "0.1.2.3"):
            continue
        assert await guest.ask(address) == "reset", address
        assert await guest.ask(address, protocol="udp") == "prohibited", address
    for address in ("127.0.0.1", "224.0.0.251", "0.1.2.3"):  # no router takes packets to these
        assert await guest.ask(address) in ("silence", "reset", "prohibited"), address
    assert await guest.ask("250.1.2.3") == "reset"
    assert await guest.ask("10.1.2.3") == "open"
    assert await guest.ask("10.1.3.3") == "reset"


async def test_the_hosts_neighbours(world: World, slots: Slots, guest: Guest) -> None:
    """The host's networks and routers are out of reach although their addresses are public, and so is what the operator
    denies, and the host's address behind its NAT. A network that the host joins later is out of reach too."""
    for address in (ROUTER, "45.67.89.200", NATTED, "93.184.216.34"):
        assert await guest.ask(address) == "reset", address
    assert await guest.ask(OTHER_PUBLIC) == "open"
    network = IPv4Network(f"{OTHER_PUBLIC}/24", strict=False)
    world.host.run(f"ip route add {network} dev eth0 scope link")
    try:
        async with asyncio.timeout(15):
            while await guest.ask(OTHER_PUBLIC) != "reset":
                await asyncio.sleep(0.2)
            while not slots.floor.refuses(IPv4Address(OTHER_PUBLIC)):
                await asyncio.sleep(0.2)
        assert await guest.ask(PUBLIC) == "open"
    finally:
        world.host.run(f"ip route del {network}")
        async with asyncio.timeout(15):
            while await guest.ask(OTHER_PUBLIC) != "open":
                await asyncio.sleep(0.2)


async def test_ports_that_nobody_gets(guest: Guest) -> None:
    """Mail and other resolvers are out of reach. On the gateway only the guest's own services are reached."""
    for port in (25, 53, 853):
        assert await guest.ask(PUBLIC, port) == "reset"
    assert await guest.ask(PUBLIC, 53, "udp") == "prohibited"
    assert await guest.ask(str(rules.GATEWAY), 22) == "reset"
    for port in (rules.GATE_PORT, rules.PROXY_PORT):
        assert await guest.ask(str(rules.GATEWAY), port) == "reset"


async def test_other_protocols(guest: Guest) -> None:
    """Packets of a protocol other than TCP, UDP and ping come back as prohibited."""
    for protocol in (4, 41, 50, 51):
        guest.send(guest.packet(PUBLIC, protocol, bytes(16)))
        async with asyncio.timeout(2):
            assert await guest._answer("") == "prohibited"


async def test_the_filter_agrees_with_the_policy(guest: Guest) -> None:
    """The kernel agrees with `Policy` for random policies."""
    chance = random.Random(7)
    candidates = [PUBLIC, OTHER_PUBLIC]
    blocks = [IPv4Network(f"{address}/{size}", strict=False) for address in candidates for size in (0, 1, 8, 24, 32)]
    verdicts = set()
    for _ in range(25):
        policy = Policy(
            allow_internet=chance.random() < 0.6,
            allow=tuple(chance.sample(blocks, chance.randrange(3))),
            deny=tuple(chance.sample(blocks, chance.randrange(3))),
        )
        await guest.slot.apply(policy)
        for address in candidates:
            allowed = policy.permits_address(IPv4Address(address))
            assert await guest.ask(address) == ("open" if allowed else "reset"), (policy, address)
            verdicts.add(allowed)
    assert verdicts == {True, False}


async def test_names_pin_addresses(guest: Guest) -> None:
    """A pinned address is reached, but not by QUIC. Connections to web ports go to the gate."""
    await guest.slot.apply(Policy(allow_internet=False, allow_names=("public.example.net",)))
    assert await guest.ask(PUBLIC, 8080) == "reset"
    await guest.slot.pin("public.example.net", [IPv4Address(PUBLIC)], 60)
    assert await guest.ask(PUBLIC, 8080) == "open"
    assert await guest.ask(OTHER_PUBLIC, 8080) == "reset"
    assert await guest.ask(PUBLIC, 443, "udp") == "prohibited"
    for port in (80, 443):  # the gate's socket accepts connections to any address
        assert await guest.ask(OTHER_PUBLIC, port) == "open"
    assert await guest.ask("10.9.9.9", 443) == "reset"
    ports, ack = await guest.connect(PUBLIC, 8080)
    await guest.slot.apply(Policy(allow_internet=False, allow_names=("*.example.net",)))
    assert await guest.goes_on(PUBLIC, ports, ack), "a connection that both policies allow is not cut"
    await guest.slot.apply(Policy(allow_internet=False, allow_names=("other.example.net",)))
    assert await guest.ask(PUBLIC, 8080) == "reset"


@pytest.mark.parametrize(
    "policy",
    [Policy(deny_names=("public.example.net",)), Policy(allow_internet=False, allow_names=("other.example.net",))],
    ids=["denied", "allowed"],
)
async def test_web_connections_from_before_do_not_pass_the_gate_by(guest: Guest, policy: Policy) -> None:
    """A web connection that began without the gate is cut, because only a first packet can be redirected. This holds
    also when its address belongs to an allowed name."""
    ports, ack = await guest.connect(PUBLIC, 443)
    assert await guest.goes_on(PUBLIC, ports, ack)
    await guest.slot.apply(policy)
    await guest.slot.pin("other.example.net", [IPv4Address(PUBLIC)], 60)
    assert not await guest.goes_on(PUBLIC, ports, ack)


async def test_what_both_policies_allow_is_not_cut_when_its_answer_has_expired(guest: Guest) -> None:
    """A new policy that still has a connection's name leaves the connection, but does not let new ones in."""
    name, public = "public.example.net", IPv4Address(PUBLIC)
    await guest.slot.apply(Policy(allow_internet=False, allow_names=(name,)))
    assert await guest.slot.pin(name, [public], 60)
    assert not await guest.slot.pin(name, [public], 60), "an address that is pinned for long enough is not pinned again"
    assert await guest.slot.pin(name, [public], 600)
    connections = [await guest.connect(PUBLIC, 8080) for _ in range(2)]
    guest.slot._pinned[public] = name, 0.0
    await guest.slot.apply(Policy(allow_internet=False, allow_names=(name, "other.example.net")))
    assert await guest.goes_on(PUBLIC, *connections[0])
    assert await guest.ask(PUBLIC, 8080) == "reset"
    await guest.slot.apply(Policy(allow_internet=False, allow_names=("other.example.net",)))
    assert not await guest.goes_on(PUBLIC, *connections[1])


@pytest.mark.parametrize("allowed", [False, True], ids=["forbidden", "allowed"])
async def test_a_peer_is_not_heard_under_a_policy_that_forbids_it(world: World, guest: Guest, allowed: bool) -> None:
    """A forbidden peer's UDP packets are stopped, or it could go on talking to a guest that can't answer any more."""
    with world.internet.inside():
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.bind((PUBLIC, 9100))
    with peer:
        peer.settimeout(5)
        ports = (23_456, 9100)
        guest.send(guest.packet(PUBLIC, 17, struct.pack(">HHHH", *ports, 14, 0) + b"hello\n"))
        _, address = peer.recvfrom(100)
        guest._port = ports[0]

        async def is_heard() -> bool:
            peer.sendto(b"and you", address)
            try:
                async with asyncio.timeout(1.5):
                    return await guest._answer("udp") == "open"
            except TimeoutError:
                return False

        assert await is_heard()
        await guest.slot.apply(Policy(allow_internet=False, allow=(IPv4Network(f"{PUBLIC}/32"),) if allowed else ()))
        assert [await is_heard() for _ in range(3)] == [allowed] * 3


async def test_an_end_that_the_host_does_not_see_is_none(guest: Guest) -> None:
    """A guest can't end a connection for its slot alone, to have more connections than the host allows."""
    ports, ack = await guest.connect(PUBLIC, 8080)
    guest.segment(PUBLIC, ports, 1, ack, 0x04, ttl=1)
    guest.segment(PUBLIC, ports, 1, ack, 0x04, data=bytes(1400))
    assert await guest.goes_on(PUBLIC, ports, ack)


async def test_neighbours_are_not_made_up(guest: Guest) -> None:
    """A guest is in the kernel's list of neighbours once, because that list is one for the whole host."""
    for number in range(1, 200):
        sender = ME + socket.inet_aton(f"198.19.{number}.7")
        guest.send(struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + sender + bytes(6) + rules.GATEWAY.packed, kind=0x0806)
    assert await guest.ask(PUBLIC) == "open"
    listed = (await guest.slot.run("ip", "neigh", "show", "dev", rules.TAP)).splitlines()
    assert [line.split()[0] for line in listed] == [str(rules.GUEST)]


async def test_the_host_forgets_a_slots_connections(world: World, slots: Slots) -> None:
    """A closed slot's connections leave the host's list, where they could stay for days."""
    slot = await slots.take()
    guest = Guest(slot)
    await guest.connect(PUBLIC, 8080)
    link = (await slot.run("ip", "-4", "-o", "addr", "show", rules.UPLINK)).split()[3].split("/")[0]
    listed = f"conntrack -L -f ipv4 -s {link} 2>/dev/null"
    assert bool(world.host.run(listed)) == (slots.mechanism == "netns")
    slot.close()
    async with asyncio.timeout(10):
        while world.host.run(listed):
            await asyncio.sleep(0.05)


async def test_a_late_answer_pins_nothing(guest: Guest) -> None:
    """The new policy pins no address for a name of the old one, when the answer for that name is late."""
    await guest.slot.apply(Policy(allow_internet=False, allow_names=("other.example.net",)))
    await guest.slot.pin("public.example.net", [IPv4Address(PUBLIC)], 60)
    assert await guest.ask(PUBLIC, 8080) == "reset"


async def test_a_policy_that_failed_late_leaves_no_marks(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nft dies after the filter has changed. The next policy judges the connections that were admitted meanwhile."""
    program = tmp_path / "nft"
    program.write_text(f'#!/bin/sh\n{shutil.which("nft")} "$@"\nkill -9 $$\n')
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(DriverError):
            await guest.slot.apply(Policy(deny=(IPv4Network("1.1.1.1/32"),)))
    ports, ack = await guest.connect(PUBLIC, 8080)
    await guest.slot.apply(Policy(allow_internet=False))
    assert not await guest.goes_on(PUBLIC, ports, ack)


async def test_packets_of_no_connection_go_nowhere(world: World, guest: Guest) -> None:
    """The kernel neither counts nor masquerades a packet of no connection, so the filter does not send it on."""
    world.internet.run(
        "nft add table inet seen; nft 'add chain inet seen hook1 { type filter hook prerouting priority -300; }';"
        "nft add rule inet seen hook1 tcp dport 22 counter"
    )

    def seen() -> int:
        listed = json.loads(world.internet.run("nft --json list chain inet seen hook1"))["nftables"]
        (counter,) = [
            each["counter"] for part in listed for each in part.get("rule", {}).get("expr", []) if "counter" in each
        ]
        return int(counter["packets"])

    for number in range(200):
        for flags in (0x3F, 0x04, 0x00):
            guest.segment(PUBLIC, (31_000 + number, 22), 5, 5, flags)
    assert await guest.ask(PUBLIC, 8080) == "open"
    assert seen() == 0
    assert await guest.ask(PUBLIC, 22) == "open"
    assert seen() > 0
    world.internet.run("nft delete table inet seen")


async def test_refusals_are_counted(slots: Slots) -> None:
    """Refusals are counted by destination, port, protocol and reason."""
    slot = await slots.take()
    try:
        guest = Guest(slot)
        for _ in range(3):
            assert await guest.ask("192.168.1.1", 443) == "reset"
        await guest.ask("192.168.1.1", protocol="icmp")
        slot.refused("rebound.example.net", 0, "dns", "floor")
        found = {(each.destination, each.port, each.protocol): each for each in await slot.refusals()}
        assert {key: (each.reason, each.count) for key, each in found.items()} == {
            ("192.168.1.1", 443, "tcp"): ("floor", 3),
            ("192.168.1.1", 0, "icmp"): ("floor", 1),
            ("rebound.example.net", 0, "dns"): ("floor", 1),
        }
    finally:
        slot.close()


@pytest.mark.parametrize("bandwidth", [8, 0])
async def test_bandwidth_is_limited(world: World, slots: Slots, bandwidth: int) -> None:
    """A sandbox sends and receives no more than its limit and a burst. Without a limit it does both faster."""
    slots.bandwidth = bandwidth
    try:
        slot = await slots._make()
    finally:
        slots.bandwidth = 0
    with world.internet.inside():
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        peer.bind((PUBLIC, 9200))
    peer.setblocking(False)
    loop, size, count = asyncio.get_running_loop(), 1200, 4000
    try:
        guest = Guest(slot)
        await slot.apply(Policy())
        assert await guest.ask(PUBLIC, 9000, "udp") == "open"  # the gateway knows the guest's MAC address from now on
        packet = guest.packet(PUBLIC, 17, struct.pack(">HHHH", 23_457, 9200, size + 8, 0) + bytes(size))
        begun, sent, received = loop.time(), 0, 0
        for number in range(count):
            guest.send(packet)
            if number % 50 == 0:
                await asyncio.sleep(0)
        sending = loop.time() - begun
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    data, address = await loop.sock_recvfrom(peer, 65536)
                    sent += len(data)
        begun = loop.time()
        for _ in range(count):
            with suppress(BlockingIOError):
                peer.sendto(bytes(size), address)
            with suppress(BlockingIOError):
                received += len(os.read(slot.tap, 65536))
        while loop.time() - begun < 1:
            try:
                received += len(os.read(slot.tap, 65536))
            except BlockingIOError:
                await asyncio.sleep(0.005)
        receiving = loop.time() - begun
    finally:
        peer.close()
        slot.close()
    if bandwidth:
        # The kernel's filter lets a second's worth pass at once.
        assert 100_000 < sent < 256 * 1024 + 1_000_000 * (1 + sending) * 1.1
        assert 100_000 < received < 256 * 1024 + 1_000_000 * receiving * 1.1
    elif slots.mechanism == "netns":  # passt drops what its own buffers do not hold
        assert sent > 3_000_000
        assert received > 3_000_000


async def test_a_thousand_refusals_do_not_pile_up(slots: Slots) -> None:
    """At most 500 refusals are remembered, because a guest could cause any number."""
    slot = await slots.take()
    try:
        guest = Guest(slot)
        for number in range(1000):
            guest.send(guest.packet(f"10.9.{number >> 8}.{number & 255}", 17, struct.pack(">HHHH", 9, 9, 8, 0)))
            slot.refused(f"{number}.example.net", 0, "dns", "floor")
        assert len(await slot.refusals()) == 500
    finally:
        slot.close()


async def test_a_policy_that_the_filter_refuses_changes_nothing(guest: Guest) -> None:
    """After a policy that the filter refuses, the old policy holds as a whole."""
    await guest.slot.apply(Policy(allow_internet=False))
    with pytest.raises(DriverError):
        await guest.slot.apply(Policy(allow=("no block",)))  # type: ignore[arg-type]
    assert guest.slot.policy == Policy(allow_internet=False)
    assert await guest.ask(PUBLIC) == "reset"


async def test_an_nft_that_hangs(slots: Slots, guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is ended after its time, the old policy holds, and other networks work meanwhile."""
    await guest.slot.apply(Policy(allow_internet=False))
    program = tmp_path / "nft"
    program.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 60\n")
    program.chmod(0o755)
    other = await slots.take()
    try:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            for limit in ("COMMAND_TIMEOUT", "MAKE_TIMEOUT"):
                patched.setattr(f"kernel_gateway.network.slot.{limit}", 2.0)
            hanging = asyncio.create_task(guest.slot.apply(Policy()))
            assert await Guest(other).ask(PUBLIC, 8080) == "open"
            with pytest.raises(DriverError, match="did not end in 2 s"):
                await hanging
        async with asyncio.timeout(10):  # the network of the next machine is made meanwhile, and hangs too
            while any(Path(f"/proc/{pid}").exists() for pid in (tmp_path / "pids").read_text().split()):
                await asyncio.sleep(0.05)
        assert guest.slot.policy == Policy(allow_internet=False)
        assert await guest.ask(PUBLIC, 8080) == "reset"
        await guest.slot.apply(Policy())
        assert await guest.ask(PUBLIC, 8080) == "open"
    finally:
        other.close()


async def test_the_hosts_addresses_are_followed(world: World, slots: Slots, guest: Guest) -> None:
    """An address that the host gets later is out of reach too."""
    assert await guest.ask(OTHER_PUBLIC) == "open"
    world.host.run(f"ip addr add {OTHER_PUBLIC}/32 dev lo")
    try:
        async with asyncio.timeout(15):
            while await guest.ask(OTHER_PUBLIC) != "reset":
                await asyncio.sleep(0.2)
            while IPv4Address(OTHER_PUBLIC) not in slots.floor.host:
                await asyncio.sleep(0.2)
    finally:
        world.host.run(f"ip addr del {OTHER_PUBLIC}/32 dev lo")
        async with asyncio.timeout(15):
            while IPv4Address(OTHER_PUBLIC) in slots.floor.host:
                await asyncio.sleep(0.2)


async def test_the_hosts_table_is_put_back(world: World, slots: Slots, guest: Guest) -> None:
    """A firewall that starts flushes all tables. The host's table comes back after some seconds."""
    world.host.run("nft flush ruleset")
    async with asyncio.timeout(15):
        while ("cellvm_" in world.host.run("nft list tables")) != (slots.mechanism == "netns"):
            await asyncio.sleep(0.2)
    assert await guest.ask(PUBLIC, 8080) == "open"


async def test_slots_go_on_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that can't be made is logged, and is tried again."""
    slots = Slots("netns", Floor(), resolvers=[], proxy=None)
    made = iter([OSError("no more processes"), "first", ValueError("strange"), "second"])

    async def make() -> str:
        if isinstance(found := next(made), Exception):
            raise found
        return found

    monkeypatch.setattr(slots, "_make", make)
    task = asyncio.create_task(slots._refill())
    async with asyncio.timeout(10):
        while len(slots._spare) < 2:
            await asyncio.sleep(0.05)
    task.cancel()


async def test_every_block_is_in_the_world() -> None:
    """The test's list of denied addresses has one address of each block."""
    assert {IPv4Network(block) for block in DENIED} == set(BLOCKS)
    assert all(IPv4Address(address) in IPv4Network(block) for block, address in DENIED.items())


async def test_without_its_programs_there_is_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When nft is missing the network is off, and the reason is told."""
    monkeypatch.setenv("PATH", str(tmp_path))
    mechanism, why = await choose("auto")
    assert mechanism == "off"
    assert "nft" in why


async def test_root_that_may_not_filter_has_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When root may not filter (in a container, say), the network is off with the programs' own reason."""
    for program in ("conntrack", "ip", "nft", "nsenter", "unshare", "pasta"):
        (tmp_path / program).write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    mechanism, why = await choose("auto")
    assert mechanism == "off"
    assert why.count("Operation not permitted") == 2


async def test_auto_avoids_a_host_that_forwards_nothing(world: World) -> None:
    """When Docker's firewall drops forwarded packets, passt is chosen."""
    assert await choose("auto") == ("netns", "")
    world.host.run(
        "nft add table ip filter; nft 'add chain ip filter F { type filter hook forward priority 0; policy drop; }'"
    )
    try:
        mechanism, why = await choose("auto")
        assert mechanism == "passt"
        assert "ip filter" in why
    finally:
        world.host.run("nft delete table ip filter")
