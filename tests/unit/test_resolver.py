"""The resolver of one sandbox, on loopback, between a hostile guest and made-up resolvers."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gateway.network.policy import Floor, Policy
from kernel_gateway.network.resolver import Limits, Resolver, read_query

PUBLIC, OTHER, PRIVATE = "93.184.215.14", "8.8.8.8", "10.0.0.7"


def bound(kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


Answer = Callable[[dns.message.Message], dns.message.Message | bytes | None]


def answering(*records: str, rcode: dns.rcode.Rcode = dns.rcode.NOERROR, soa: str = "") -> Answer:
    """An upstream that gives these records (`name ttl type data`) to every question."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query)
        response.set_rcode(rcode)
        for record in records:
            name, ttl, kind, data = record.split(" ", 3)
            response.find_rrset(
                response.answer, dns.name.from_text(name), dns.rdataclass.IN, dns.rdatatype.from_text(kind), create=True
            ).update(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
        if soa:
            response.authority.append(dns.rrset.from_text(soa, 60, "IN", "SOA", "ns. mail. 1 2 3 4 5"))
        response.additional.append(dns.rrset.from_text("planted.example.", 60, "IN", "A", PUBLIC))
        return response

    return answer


def holding(*records: str) -> Answer:
    """An upstream that knows these records and no others. It follows aliases, and has NXDOMAIN for other names."""
    known: dict[tuple[dns.name.Name, dns.rdatatype.RdataType], dns.rrset.RRset] = {}
    for record in records:
        name, kind, data = record.split(" ", 2)
        rrset = dns.rrset.from_text(name, 60, "IN", kind, data)
        known.setdefault((rrset.name, rrset.rdtype), rrset).update(rrset)

    def answer(query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query)
        name, kind = query.question[0].name, query.question[0].rdtype
        while (alias := known.get((name, dns.rdatatype.CNAME))) and kind != dns.rdatatype.CNAME:
            response.answer.append(alias)
            name = alias[0].target
        if found := known.get((name, kind)):
            response.answer.append(found)
            return response
        if not any(each.is_subdomain(name) for each, _ in known):
            response.set_rcode(dns.rcode.NXDOMAIN)
        soas = [rrset for (zone, each), rrset in known.items() if each == dns.rdatatype.SOA and name.is_subdomain(zone)]
        response.authority += sorted(soas, key=lambda rrset: len(rrset.name))[-1:]
        return response

    return answer


INTERNET = (
    "example. NS ns.example.",
    "example. SOA ns.example. mail.example. 1 2 3 4 5",
    f"ns.example. A {PUBLIC}",
    f"a.example. A {PUBLIC}",
)
INSIDE = (
    # As domain controllers serve it: the zone and its servers have private addresses.
    "corp.example. NS dc.corp.example.",
    "corp.example. SOA dc.corp.example. admin.corp.example. 1 2 3 4 5",
    f"corp.example. A {PRIVATE}",
    f"dc.corp.example. A {PRIVATE}",
    f"db.corp.example. A {PRIVATE}",
    "db.corp.example. TXT secret",
    "corp.example. MX 10 mail.corp.example.",
    f"web.corp.example. A {PUBLIC}",
    "_ldap._tcp.dc._msdcs.corp.example. SRV 0 100 389 dc.corp.example.",
    # As a company copies its public zone inside, and adds to it: the servers are public.
    "copy.example. NS ns.example.",
    "copy.example. SOA ns.example. mail.example. 1 2 3 4 5",
    f"copy.example. A {PRIVATE}",
    "_ldap._tcp.copy.example. SRV 0 100 389 dc.corp.example.",
    # As an attacker points into these.
    "to-service.a.example. CNAME _ldap._tcp.dc._msdcs.corp.example.",
    "to-host.a.example. CNAME db.corp.example.",
    "to-nothing.a.example. CNAME nothing.corp.example.",
)
INSIDE_KINDS = ("SRV", "TXT", "NS", "SOA", "MX", "CAA", "NAPTR", "CNAME")


def silent(query: dns.message.Message) -> None:
    return None


@dataclass
class Upstream:
    """A resolver on loopback, over UDP and TCP on one port. It keeps its questions and where they came from."""

    answer: Answer
    asked: list[tuple[str, str]] = field(default_factory=list)
    queries: list[dns.message.Message] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)
    address: tuple[str, int] = ("127.0.0.1", 0)
    over_tcp: int = 0
    truncates: bool = False

    def reply(self, data: bytes) -> bytes | None:
        query = dns.message.from_wire(data)
        self.queries.append(query)
        self.asked.append((query.question[0].name.to_text(), dns.rdatatype.to_text(query.question[0].rdtype)))
        answer = self.answer(query)
        return answer.to_wire(max_size=65535) if isinstance(answer, dns.message.Message) else answer

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Upstream"]:
        upstream = self

        class Udp(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                upstream.ports.add(addr[1])
                reply = upstream.reply(data)
                if upstream.truncates and reply is not None:
                    short = dns.message.make_response(dns.message.from_wire(data))
                    short.flags |= dns.flags.TC
                    reply = short.to_wire()
                if reply is not None:
                    self.transport.sendto(reply, addr)

        async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream.over_tcp += 1
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            reply = upstream.reply(data) or b""
            writer.write(len(reply).to_bytes(2, "big") + reply)
            writer.close()

        server = await asyncio.start_server(tcp, "127.0.0.1", 0)
        self.address = server.sockets[0].getsockname()
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Udp, local_addr=self.address)
        try:
            yield self
        finally:
            transport.close()
            server.close()
            await server.wait_closed()


@dataclass
class World:
    """A resolver, its settings, and the calls that it has made."""

    upstreams: list[Upstream]
    policy: Policy = field(default_factory=Policy)
    floor: Floor = field(default_factory=Floor)
    limits: Limits = field(default_factory=Limits)
    pinned: list[tuple[str, list[str], float]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    now: float = 1000.0
    filter_fails: bool = False
    reader: Executor = field(default_factory=lambda: ThreadPoolExecutor(1))

    async def pin(self, name: str, addresses: list[IPv4Address], seconds: float) -> bool:
        if self.filter_fails:
            raise RuntimeError("no filter")
        self.pinned.append((name, [str(each) for each in addresses], seconds))
        return True

    @asynccontextmanager
    async def run(self) -> AsyncIterator["World"]:
        async with AsyncExitStack() as stack:
            for upstream in self.upstreams:
                await stack.enter_async_context(upstream.serve())
            self.resolver = Resolver(
                upstreams=[upstream.address for upstream in self.upstreams],
                floor=lambda: self.floor,
                policy=lambda: self.policy,
                pin=self.pin,
                refused=lambda name, reason: self.refused.append((name, reason)),
                reader=self.reader,
                limits=self.limits,
                clock=lambda: self.now,
            )
            udp, tcp = bound(socket.SOCK_DGRAM), bound(socket.SOCK_STREAM)
            self.address, self.tcp_address = udp.getsockname(), tcp.getsockname()
            self.resolver.start(udp, tcp)
            with udp, tcp:
                try:
                    yield self
                finally:
                    self.resolver.close()
                    await asyncio.sleep(0)
                    self.reader.shutdown()

    async def send(self, *datagrams: bytes) -> None:
        """Send these from one socket, without waiting for answers."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(self.address)
            for data in datagrams:
                await asyncio.get_running_loop().sock_sendall(sock, data)

    async def raw(self, data: bytes, timeout: float = 20.0) -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(self.address)
            await loop.sock_sendall(sock, data)
            async with asyncio.timeout(timeout):
                return await loop.sock_recv(sock, 65536)

    async def ask(self, name: str, kind: str = "A", **options: Any) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **options)
        answer = dns.message.from_wire(await self.raw(query.to_wire()))
        assert query.is_response(answer)
        assert answer.flags & dns.flags.RA
        assert not answer.additional
        return answer


def told(answer: dns.message.Message) -> list[str]:
    return sorted(line for rrset in answer.answer for line in rrset.to_text().splitlines())


async def test_a_name_is_asked_for_anew() -> None:
    """The guest gets the records it asked for. The upstream resolver sees only the question of the guest's bytes."""
    upstream = Upstream(answering(f"Example.com. 90000 A {PUBLIC}", "planted.example. 60 A 8.8.8.8"))
    async with World([upstream]).run() as world:
        query = dns.message.make_query(
            "eXample.com", "A", use_edns=0, payload=4096, options=[dns.edns.ECSOption("10.1.2.0", 24)], want_dnssec=True
        )
        answer = dns.message.from_wire(await world.raw(query.to_wire()))
        assert answer.question[0].name.labels[0] == b"eXample"
        assert told(answer) == [f"eXample.com. 3600 IN A {PUBLIC}"]
        assert answer.payload == 1232
        (asked,) = upstream.queries
        assert asked.id != query.id
        assert (asked.options, asked.payload, asked.ednsflags) == ((), 1232, 0)
        assert upstream.asked == [("example.com.", "A")]
        assert world.pinned == []
        assert world.refused == []


async def test_each_query_has_a_number_and_a_port_of_its_own() -> None:
    """Each query has a number and a port of its own, so only somebody who sees it can answer it."""
    upstream = Upstream(answering(f"a.example. 60 A {PUBLIC}"))
    async with World([upstream]).run() as world:
        await asyncio.gather(*(world.ask("a.example") for _ in range(20)))
        assert len({query.id for query in upstream.queries}) >= 19
        assert len(upstream.ports) >= 15


async def test_aliases_are_followed_and_strays_dropped() -> None:
    """The answer has the chain of aliases and then the records at its end."""
    records = ["a.example. 30 CNAME b.example.", "b.example. 60 CNAME c.example.", f"c.example. 60 A {PUBLIC}"]
    async with World([Upstream(answering(*records, f"d.example. 60 A {OTHER}"))]).run() as world:
        answer = await world.ask("a.example")
        assert [rrset.name.to_text() for rrset in answer.answer] == ["a.example.", "b.example.", "c.example."]
        assert world.resolver.gave("a.example", IPv4Address(PUBLIC))
        assert not world.resolver.gave("c.example", IPv4Address(PUBLIC))
        assert not world.resolver.gave("a.example", IPv4Address(OTHER))
    circle = ["a.example. 30 CNAME b.example.", "b.example. 60 CNAME a.example."]
    async with World([Upstream(answering(*circle))]).run() as world:
        assert not [rrset for rrset in (await world.ask("a.example")).answer if rrset.rdtype == dns.rdatatype.A]


async def test_a_name_that_does_not_exist_says_for_how_long() -> None:
    """Negative answers keep their SOA record."""
    async with World([Upstream(holding(*INTERNET))]).run() as world:
        answer = await world.ask("no.example")
        assert answer.rcode() == dns.rcode.NXDOMAIN
        assert [rrset.rdtype for rrset in answer.authority] == [dns.rdatatype.SOA]


async def test_other_records_pass() -> None:
    """Mail servers, texts and services are looked up."""
    records = ["a.example. MX 10 m.example.", 'a.example. TXT "hello"', "a.example. SRV 1 2 3 s.example."]
    upstream = Upstream(holding(*INTERNET, *records))
    async with World([upstream]).run() as world:
        for kind, record in zip(("MX", "TXT", "SRV"), records, strict=True):
            assert told(await world.ask("a.example", kind)) == [record.replace("a.example.", "a.example. 60 IN")]
        assert [kind for _, kind in upstream.asked].count("NS") == 2, "a zone is judged once"
        world.now += 301
        await world.ask("a.example", "TXT")
        assert [kind for _, kind in upstream.asked].count("NS") == 4
    for servers in ((), ("example. NS ns.lan.",), ("example. NS gone.example.",)):
        async with World([Upstream(holding(*records, *servers))]).run() as world:
            assert (await world.ask("a.example", "TXT")).rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize(
    "name",
    [
        *("db.corp.example", "dc.corp.example", "corp.example", "_ldap._tcp.dc._msdcs.corp.example"),
        *("copy.example", "_ldap._tcp.copy.example", "to-service.a.example", "to-host.a.example"),
    ],
)
async def test_zones_of_the_inside_are_not_told(name: str) -> None:
    """Of a zone that the host's resolver serves from the inside no records but usable addresses are told, under no
    name. One zone of its servers or the zone itself at a private address is enough."""
    async with World([Upstream(holding(*INTERNET, *INSIDE))]).run() as world:
        for kind in (*INSIDE_KINDS, "A"):
            if (name, kind) in (("to-service.a.example", "CNAME"), ("to-host.a.example", "CNAME")):
                continue
            answer = await world.ask(name, kind)
            assert (answer.rcode(), answer.answer, answer.authority) == (dns.rcode.NXDOMAIN, [], []), kind
            assert world.refused.pop() == (name, "floor")
        assert told(await world.ask("web.corp.example")) == [f"web.corp.example. 60 IN A {PUBLIC}"]
        assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]


@pytest.mark.parametrize("kind", ["A", "TXT", "SRV", "PTR"])
async def test_nobody_learns_which_names_of_the_inside_exist(kind: str) -> None:
    """A name of the inside that does not exist is answered and counted as one that does, directly and by an alias. The
    operator's exception opens the zone."""
    async with World([Upstream(holding(*INTERNET, *INSIDE))]).run() as world:
        for there, missing in (
            ("db.corp.example", "nothing.corp.example"),
            ("to-host.a.example", "to-nothing.a.example"),
        ):
            answers = [await world.ask(name, kind) for name in (there, missing)]
            for answer in answers:
                assert (answer.rcode(), answer.answer, answer.authority) == (dns.rcode.NXDOMAIN, [], [])
            assert answers[0].flags == answers[1].flags
            assert world.refused == [(there, "floor"), (missing, "floor")]
            world.refused.clear()
        assert (await world.ask("nothing.a.example", kind)).authority, "a public zone's answer is told as it is"
        assert world.refused == []
        world.floor = Floor(exceptions=(IPv4Network("10.0.0.0/8"),))
        world.now += 301
        assert told(await world.ask("db.corp.example")) == [f"db.corp.example. 60 IN A {PRIVATE}"]
        assert (await world.ask("nothing.corp.example", kind)).authority


async def test_a_resolver_that_tells_nothing_of_zones() -> None:
    """Where zones can't be judged, addresses are still told, and everything else is refused in time."""

    def answer(query: dns.message.Message) -> dns.message.Message | None:
        is_address = query.question[0].rdtype == dns.rdatatype.A
        return holding(*INTERNET)(query) if is_address else None  # type: ignore[return-value]

    async with World([Upstream(answer)], limits=Limits(attempt=0.1, total=0.3)).run() as world:
        assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]
        assert (await world.ask("b.example")).rcode() == dns.rcode.NXDOMAIN
        assert world.refused == [("b.example", "floor")]


@pytest.mark.parametrize("kind", ["AAAA", "HTTPS", "SVCB"])
async def test_ipv6_and_address_hints_are_empty(kind: str) -> None:
    """Nothing is looked up, and the answer has no records, but the name exists."""
    upstream = Upstream(answering())
    async with World([upstream]).run() as world:
        answer = await world.ask("a.example", kind)
        assert (answer.rcode(), answer.answer, upstream.asked) == (dns.rcode.NOERROR, [], [])


@pytest.mark.parametrize("kind", ["ANY", "AXFR", "IXFR", "MAILB", "TYPE249", "TYPE0", "TYPE200"])
async def test_wholesale_questions_are_refused(kind: str) -> None:
    """Zone transfers and ANY ask for much with little."""
    upstream = Upstream(answering())
    async with World([upstream]).run() as world:
        query = dns.message.make_query("a.example", "A")
        wire = query.to_wire()[:-4] + dns.rdatatype.from_text(kind).to_bytes(2, "big") + b"\0\1"
        answer = dns.message.from_wire(await world.raw(wire))
        assert (answer.rcode(), upstream.asked) == (dns.rcode.REFUSED, [])


async def test_private_answers_are_taken_out() -> None:
    """Private addresses of a public name are removed. Without any others the name does not exist."""
    upstream = Upstream(answering(f"a.example. 60 A {PRIVATE}", f"a.example. 60 A {PUBLIC}"))
    async with World([upstream]).run() as world:
        assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]
        assert world.refused == []
        assert not world.resolver.gave("a.example", IPv4Address(PRIVATE))
        for address in (PRIVATE, "169.254.169.254", "127.0.0.1", "0.0.0.0", "100.64.0.1"):
            upstream.answer = answering(f"a.example. 60 A {address}")
            answer = await world.ask("a.example")
            assert (answer.rcode(), answer.answer, answer.authority) == (dns.rcode.NXDOMAIN, [], [])
        assert world.refused == [("a.example", "floor")] * 5
        world.floor = Floor(exceptions=(IPv4Network("100.64.0.0/24"),), host=frozenset({IPv4Address(PUBLIC)}))
        assert told(await world.ask("a.example")) == ["a.example. 60 IN A 100.64.0.1"]
        upstream.answer = answering(f"a.example. 60 A {PUBLIC}")
        assert (await world.ask("a.example")).rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize(
    "name",
    [
        *("db", "localhost", "a.localhost", "printer.local", "metadata.google.internal", "7.0.0.10.in-addr.arpa"),
        *("printer.lan", "nas.home", "nas.home.arpa", "home.arpa", "db.corp", "wiki.intranet", "x.private"),
        *("zone.example", "deep.in.zone.example"),
    ],
)
async def test_local_names_are_never_asked_for(name: str) -> None:
    """Local names are not asked for, because a company's resolver would know them."""
    upstream = Upstream(answering(f"{name}. 60 A {PUBLIC}"))
    async with World([upstream], floor=Floor(zones=("zone.example",))).run() as world:
        for kind in ("A", "PTR", "TXT", "AAAA"):
            assert (await world.ask(name, kind)).rcode() == dns.rcode.NXDOMAIN
        assert upstream.asked == []
        assert world.refused == [(name, "floor")] * 3


@pytest.mark.parametrize(
    "name", ["8.8.8.8", "a\\.b.example", "a\\000.example", "a\\@b.example", "1.0.ip6.arpa", "*.a.example"]
)
async def test_what_is_no_name_does_not_exist(name: str) -> None:
    """The upstream resolver is not asked for a text that is no name."""
    upstream = Upstream(answering())
    async with World([upstream]).run() as world:
        assert (await world.ask(name)).rcode() == dns.rcode.NXDOMAIN
        assert upstream.asked == []


async def test_public_addresses_have_names() -> None:
    """Reverse names of public addresses are looked up."""
    zone = ("8.8.8.in-addr.arpa. NS ns.example.", f"ns.example. A {PUBLIC}")
    async with World([Upstream(holding("8.8.8.8.in-addr.arpa. PTR dns.google.", *zone))]).run() as world:
        assert told(await world.ask("8.8.8.8.in-addr.arpa", "PTR")) == ["8.8.8.8.in-addr.arpa. 60 IN PTR dns.google."]


async def test_names_obey_the_policy() -> None:
    """Denied names do not exist. Allowed ones are let through before they are told. A new policy acts at once."""
    upstream = Upstream(answering(f"a.example. 7 A {PUBLIC}", f"a.example. 7 A {PRIVATE}"))
    async with World([upstream], policy=Policy(deny_names=("a.example",))).run() as world:
        assert (await world.ask("A.Example")).rcode() == dns.rcode.NXDOMAIN
        assert (await world.ask("a.example", "AAAA")).rcode() == dns.rcode.NXDOMAIN
        assert world.refused == [("a.example", "policy")]
        assert upstream.asked == []
        world.policy = Policy(allow_internet=False, allow_names=("*.example",))
        assert told(await world.ask("a.example")) == [f"a.example. 7 IN A {PUBLIC}"]
        assert world.pinned == [("a.example", [PUBLIC], 60)]
        assert (await world.ask("other.test")).rcode() == dns.rcode.NXDOMAIN
        assert world.refused[1:] == [("other.test", "policy")]
        world.policy = Policy(allow_internet=False)
        assert (await world.ask("a.example")).rcode() == dns.rcode.NXDOMAIN
        world.policy = Policy(allow_internet=False, allow=(IPv4Network("93.0.0.0/8"),))
        assert told(await world.ask("a.example")) == [f"a.example. 7 IN A {PUBLIC}"]
        assert len(world.pinned) == 1


async def test_a_filter_that_fails_fails_the_query() -> None:
    """An answer is not given when its addresses could not be let through."""
    upstream = Upstream(answering(f"a.example. 7 A {PUBLIC}"))
    async with World([upstream], policy=Policy(allow_names=("a.example",)), filter_fails=True).run() as world:
        answer = await world.ask("a.example")
        assert (answer.rcode(), answer.answer) == (dns.rcode.SERVFAIL, [])
        assert not world.resolver.gave("a.example", IPv4Address(PUBLIC))


async def test_what_was_given_is_remembered_for_a_while() -> None:
    """An answer is remembered as long as the filter lets it through, whatever the policy."""
    async with World([Upstream(answering(f"a.example. 300 A {PUBLIC}"))]).run() as world:
        await world.ask("a.example")
        world.now += 359
        assert world.resolver.gave("a.example", IPv4Address(PUBLIC))
        world.now += 2
        assert not world.resolver.gave("a.example", IPv4Address(PUBLIC))
        assert await world.resolver.addresses("a.example") == [IPv4Address(PUBLIC)]
        assert await world.resolver.addresses("b.example") == []


async def test_the_next_resolver_is_asked() -> None:
    """The next one is asked when one is silent, fails or answers rubbish. If none answers, the query fails in time."""
    limits = Limits(attempt=0.5, total=1.25)
    good = answering(f"a.example. 60 A {PUBLIC}")
    for bad in (silent, answering(rcode=dns.rcode.SERVFAIL), answering(rcode=dns.rcode.REFUSED), lambda _: b"\0" * 12):
        async with World([Upstream(bad), Upstream(good)], limits=limits).run() as world:
            assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]
    async with World([Upstream(silent)], limits=limits).run() as world:
        assert (await world.ask("a.example")).rcode() == dns.rcode.SERVFAIL
        assert len(world.upstreams[0].asked) == 3
        assert await world.resolver.addresses("a.example") == []
    async with World([], limits=limits).run() as world:
        assert (await world.ask("a.example")).rcode() == dns.rcode.SERVFAIL


async def test_an_answer_that_comes_too_late() -> None:
    """An upstream resolver that answers after the limit fails this name in time. Other names don't wait for it."""
    limits = Limits(attempt=0.5, total=1.0)

    class Late(Upstream):
        def reply(self, data: bytes) -> bytes | None:
            answer = super().reply(data)
            if answer is not None and self.asked[-1][0] == "late.example.":
                asyncio.get_running_loop().call_later(2, answers.append, answer)
                return None
            return answer

    answers: list[bytes] = []
    good = answering(f"late.example. 60 A {PUBLIC}", f"good.example. 60 A {PUBLIC}")
    async with World([Late(good)], limits=limits).run() as world:
        late = asyncio.create_task(world.ask("late.example"))
        assert told(await world.ask("good.example")) == [f"good.example. 60 IN A {PUBLIC}"]
        assert not late.done()
        assert (await late).rcode() == dns.rcode.SERVFAIL


async def test_answers_to_other_questions_are_not_believed() -> None:
    """Answers with another number, another name or no question are ignored."""

    def forged(query: dns.message.Message) -> bytes:
        other = dns.message.make_query("b.example", "A", id=query.id)
        return answering(f"a.example. 60 A {OTHER}")(other).to_wire()  # type: ignore[union-attr]

    def misnumbered(query: dns.message.Message) -> bytes:
        query.id ^= 1
        return answering(f"a.example. 60 A {OTHER}")(query).to_wire()  # type: ignore[union-attr]

    def unasked(query: dns.message.Message) -> bytes:
        response = answering(f"a.example. 60 A {OTHER}")(query)
        response.question = []  # type: ignore[union-attr]
        return response.to_wire()  # type: ignore[union-attr]

    good = answering(f"a.example. 60 A {PUBLIC}")
    for bad in (forged, misnumbered, unasked):
        async with World([Upstream(bad), Upstream(good)], limits=Limits(attempt=0.2)).run() as world:
            assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]


async def test_long_answers_come_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long answers come over TCP from upstream, and to the guest after it asks again. Very long ones are not read."""
    records = [f"a.example. 60 A 93.184.{each}.1" for each in range(90)]
    upstream = Upstream(answering(*records), truncates=True)
    # Reading an answer takes 5 ms here, however fast the processor is.
    readings = itertools.count()
    monkeypatch.setattr("kernel_gateway.network.resolver.time.thread_time", lambda: next(readings) * 0.005)
    async with World([upstream]).run() as world:
        short = await world.ask("a.example")
        assert short.flags & dns.flags.TC
        assert short.answer == []
        assert upstream.over_tcp == 1
        assert world.resolver._budget._left < 95
        reader, writer = await asyncio.open_connection(*world.tcp_address)
        for _ in range(2):
            query = dns.message.make_query("a.example", "A").to_wire()
            writer.write(len(query).to_bytes(2, "big") + query)
            answer = dns.message.from_wire(await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big")))
            assert len(told(answer)) == 90
        writer.close()
        upstream.answer = answering(*(f"a.example. 60 A 93.184.{n}.{k}" for n in range(90) for k in range(2)))
        assert (await world.ask("a.example")).rcode() == dns.rcode.SERVFAIL


async def test_a_guest_has_its_share() -> None:
    """Queries at once, queries in a second, and connections are limited. The rest is dropped and counted."""
    async with World([Upstream(silent)], limits=Limits(under_way=3, per_second=5, burst=10, total=5)).run() as world:
        await world.send(*(dns.message.make_query(f"a{number}.example", "A").to_wire() for number in range(20)))
        async with asyncio.timeout(20):
            while len(world.refused) < 17:
                await asyncio.sleep(0.01)
        assert world.refused == [("*", "limit")] * 17
        assert len(world.resolver._queries) == 3
        world.now += 1
        assert [world.resolver._budget.admits() for _ in range(6)] == [True] * 5 + [False]
    async with World([Upstream(silent)], limits=Limits(connections=1, idle=0.2)).run() as world:
        first, first_writer = await asyncio.open_connection(*world.tcp_address)
        async with asyncio.timeout(20):
            while not world.resolver._connections:
                await asyncio.sleep(0.01)
            second, second_writer = await asyncio.open_connection(*world.tcp_address)
            assert await second.read() == b""
            assert world.refused == [("*", "limit")]
            assert await first.read() == b""  # it said nothing for too long
        first_writer.close()
        second_writer.close()


async def test_answers_that_take_long_to_read() -> None:
    """A guest pays for costly answers. Its waiting work is dropped, and other guests' questions come next."""
    suffix = ".".join("a" * 118)
    costly = dns.message.make_response(dns.message.make_query(f"x.{suffix}", "MX"))
    costly.answer.append(
        dns.rrset.from_text(f"x.{suffix}.", 60, "IN", "MX", *(f"{n} b{n}.{suffix}." for n in range(95)))
    )
    data = costly.to_wire(max_size=4096)
    begun = time.thread_time()
    dns.message.from_wire(data)
    price = time.thread_time() - begun

    def answer(query: dns.message.Message) -> bytes:
        return query.id.to_bytes(2, "big") + data[2:]

    limits = Limits(attempt=60, total=60)
    async with World([Upstream(answer)], limits=limits).run() as hostile:
        other = World([Upstream(answering(f"a.example. 60 A {PUBLIC}"))], reader=hostile.reader)
        async with other.run():
            used = time.process_time()
            await hostile.send(*(dns.message.make_query(f"x.{suffix}", "MX").to_wire() for _ in range(40)))
            async with asyncio.timeout(60):
                while not hostile.upstreams[0].asked:
                    await asyncio.sleep(0.01)
            assert told(await other.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]
            async with asyncio.timeout(60):
                while hostile.resolver._queries:
                    await asyncio.sleep(0.01)
            assert hostile.resolver._budget.is_spent
            assert time.process_time() - used < 20 * price  # forty of them, and all their answers, would be eighty


@pytest.mark.parametrize(
    ("change", "rcode"),
    [
        ({2: 0x28}, dns.rcode.NOTIMP),  # an update
        ({2: 0x20}, dns.rcode.NOTIMP),  # a notification
        ({5: 0}, dns.rcode.FORMERR),  # no question
        ({5: 2}, dns.rcode.FORMERR),
        ({7: 1}, dns.rcode.FORMERR),  # an answer is promised
        ({11: 1}, dns.rcode.FORMERR),
        ({-1: 3}, dns.rcode.REFUSED),  # another class: CHAOS
        ({-1: 255}, dns.rcode.REFUSED),
        ({12: 200}, dns.rcode.FORMERR),
    ],
)
async def test_bent_queries_get_short_answers(change: dict[int, int], rcode: dns.rcode.Rcode) -> None:
    """The answer is never longer than the query."""
    async with World([Upstream(answering())]).run() as world:
        query = bytearray(dns.message.make_query("a.example", "A").to_wire())
        for at, byte in change.items():
            query[at] = byte
        answer = await world.raw(bytes(query))
        assert answer[:2] == query[:2]
        assert answer[3] & 15 == rcode
        assert len(answer) <= len(query)


async def test_a_later_edns_is_not_spoken() -> None:
    """Version 1 is answered with BADVERS."""
    async with World([Upstream(answering())]).run() as world:
        query = dns.message.make_query("a.example", "A", use_edns=0)
        query.ednsflags |= 1 << 16
        assert dns.message.from_wire(await world.raw(query.to_wire())).rcode() == dns.rcode.BADVERS


def test_answers_are_never_answered() -> None:
    """Answers, and bytes without a whole head, get no answer."""
    answer = dns.message.make_response(dns.message.make_query("a.example", "A"))
    assert read_query(answer.to_wire()) is None
    assert read_query(b"\0" * 11) is None


WIRE = dns.message.make_query("a.example", "A", use_edns=0).to_wire()


@settings(deadline=None)
@given(st.binary(max_size=80) | st.tuples(st.integers(0, len(WIRE) - 1), st.binary(min_size=1, max_size=3)))
def test_any_bytes_are_answered_shortly_or_not_at_all(data: bytes | tuple[int, bytes]) -> None:
    """Random datagrams and bent queries raise nothing, and answers are hardly longer than queries."""
    if isinstance(data, tuple):
        at, piece = data
        data = WIRE[:at] + piece + WIRE[at + len(piece) :]
    resolver = Resolver(
        upstreams=[],
        floor=Floor,
        policy=lambda: Policy(allow_internet=False),
        pin=lambda *_: asyncio.sleep(0),
        refused=lambda name, reason: None,
        reader=ThreadPoolExecutor(1),  # not used, because nobody is asked
    )
    answer = asyncio.run(resolver.respond(data))
    if answer is not None:
        assert len(answer.to_wire()) <= len(data) + 11  # an OPT record at most


async def test_rubbish_over_the_wire_stops_nothing() -> None:
    """A query after datagrams and connections of rubbish is answered."""
    async with World([Upstream(answering(f"a.example. 60 A {PUBLIC}"))]).run() as world:
        await world.send(b"", b"\0", b"\xff" * 4000, WIRE[:-1], WIRE + b"x")
        for data in (b"", b"\0", b"\0\0", b"\xff\xff" + b"x" * 100, b"\0\x05hello", b"\0\x0c" + b"\xff" * 12):
            reader, writer = await asyncio.open_connection(*world.tcp_address)
            writer.write(data)
            writer.write_eof()
            try:
                await asyncio.wait_for(reader.read(), 20)
            except ConnectionResetError:
                pass  # closed with bytes of ours unread
            writer.close()
        assert told(await world.ask("a.example")) == [f"a.example. 60 IN A {PUBLIC}"]


async def test_closing_ends_all_that_is_under_way() -> None:
    """Queries and connections end, nothing is left, and the resolver may be closed again."""
    async with World([Upstream(silent)]).run() as world:
        reader, writer = await asyncio.open_connection(*world.tcp_address)
        query = asyncio.create_task(world.ask("a.example"))
        async with asyncio.timeout(20):
            while not (world.upstreams[0].asked and world.resolver._connections):
                await asyncio.sleep(0.01)
            world.resolver.close()
            world.resolver.close()
            assert await reader.read() == b""
            while world.resolver._queries or world.resolver._connections:
                await asyncio.sleep(0.01)
        query.cancel()
        writer.close()
