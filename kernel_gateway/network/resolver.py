"""Names for one sandbox. A guest's question is judged, asked anew, and only then answered.

    guest ── UDP, TCP ── Resolver ── a query of our own ── the host's resolvers

The guest is hostile. Only the question of its bytes is passed on, parsed and written anew. An answer is rebuilt from
the chain of aliases and the records asked for, and from no others. An address that no sandbox may reach is never in an
answer. So a public name can't be made to mean a private address, and the guest does not see the host's own network.
Of a zone that the host's resolvers know from the inside, the guest learns nothing but addresses that it may reach: its
names, whether they exist or not, are refused alike.

A refused name gets NXDOMAIN, because programs then give up at once; after REFUSED they try again for seconds. Tunnels
through DNS stay possible wherever names are resolved.
"""

import asyncio
import itertools
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from kernel_gateway.network.hello import Malformed, parse_host, reverse_address
from kernel_gateway.network.policy import Floor, Policy

log = logging.getLogger(__name__)

T = TypeVar("T")
PAYLOAD = 1232
"""Bytes of a UDP answer that no network cuts into pieces."""
MAX_QUERY = 512
"""Bytes of a guest's question: enough for a name and some options. A long list of options would take long to read."""
MAX_DATAGRAM = 4096
MAX_ANSWER, MAX_RECORDS = 4 * 1024, 100
"""Bytes of an answer over TCP, and records of any answer. A larger answer is not read."""
MAX_CHAIN = 12
MAX_TTL, MIN_PIN, SLACK = 3600, 60, 60
"""Seconds. The resolver remembers an address a little longer (SLACK) than the guest may keep it."""
PIN_COST = 4
"""Number of questions that cost the host as much as one change of the filter."""
DEBT = 2
"""Bursts that a guest may owe before its waiting work is dropped. It may owe some, because many names at once are
normal."""
MAX_DEPTH = 12
"""Labels of a name in which its zone is looked for. No zone is deeper."""
MAX_SERVERS = 3
"""Name servers of a zone whose addresses are judged."""
ZONES, ZONE_KEPT = 1024, 300.0
"""Zones whose verdict is remembered, and for how many seconds."""
ACCEPT_PAUSE = 0.5
REMEMBERED = 4096
"""Pairs of name and address that a slot's resolver remembers to have given."""

_KINDS = {
    dns.rdatatype.from_text(kind) for kind in "A CAA CNAME DNSKEY DS MX NAPTR NS PTR SOA SRV SSHFP TLSA TXT".split()
}
"""Types that are looked up. The others are left out because some take long to read and nobody misses them."""
_EMPTY = {dns.rdatatype.AAAA, dns.rdatatype.HTTPS, dns.rdatatype.SVCB}
"""Types that are answered without records, because IPv6 is off and the other two hold addresses as hints."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one guest may use, and how long each step may take, in seconds."""

    under_way: int = 64
    per_second: float = 100.0
    burst: float = 100.0
    connections: int = 8
    idle: float = 10.0
    attempt: float = 2.0
    total: float = 6.0


class Unanswered(Exception):
    """There is no answer that can be used."""


class Budget:
    """What a guest's questions may still cost. It grows with time. It may fall below zero; then no question fits."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._left = limits.burst
        self._counted_at = clock()
        self._lock = threading.Lock()  # because the reader's thread calls `charge`

    @property
    def is_spent(self) -> bool:
        return self._left < -DEBT * self._limits.burst

    def admits(self) -> bool:
        """Whether one more question fits in now. If it does, it is charged."""
        with self._lock:
            now = self._clock()
            self._left = min(self._limits.burst, self._left + (now - self._counted_at) * self._limits.per_second)
            self._counted_at = now
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def charge(self, cost: float) -> None:
        with self._lock:
            self._left -= cost


class Resolver:
    """The resolver of one slot.

    Args:
        upstreams: addresses and ports of the resolvers to ask, the best first.
        floor, policy: return the floor and the policy that are in force.
        pin: called before the answer for a name that a rule allows is sent, with the name, its addresses, and the
            seconds for which the filter must let them through. It returns whether the filter had to be changed.
        refused: called with a name and "floor" or "policy", or with "*" and "limit" for a question over the limit.
        reader: a thread that reads strangers' answers one after the other; nothing else should wait for it.
    """

    def __init__(
        self,
        *,
        upstreams: list[tuple[str, int]],
        floor: Callable[[], Floor],
        policy: Callable[[], Policy],
        pin: Callable[[str, list[IPv4Address], float], Awaitable[bool]],
        refused: Callable[[str, str], None],
        reader: Executor,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._upstreams = upstreams
        self._floor = floor
        self._policy = policy
        self._pin = pin
        self._refused = refused
        self._reader = reader
        self._limits = limits
        self._clock = clock
        self._budget = Budget(limits, clock)
        self._given: dict[tuple[str, IPv4Address], float] = {}
        self._zones: dict[str, tuple[bool | None, float]] = {}
        self._listening: list[socket.socket] = []
        self._queries: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()

    def start(self, udp: socket.socket, tcp: socket.socket) -> None:
        """Answer on two bound sockets, the second one listening. The caller closes them after `close`."""
        loop = asyncio.get_running_loop()
        for sock, ready in ((udp, self._receive), (tcp, self._accept)):
            sock.setblocking(False)
            loop.add_reader(sock, ready, sock)
            self._listening.append(sock)

    def close(self) -> None:
        """Stop answering at once. May be called again."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)
        self._listening.clear()
        for task in (*self._queries, *self._connections):
            task.cancel()

    def gave(self, name: str, address: IPv4Address) -> bool:
        """Whether the guest was told lately that this name has this address."""
        return self._given.get((name, address), 0.0) > self._clock()

    async def addresses(self, name: str) -> list[IPv4Address]:
        """All addresses of a name, not judged; none if it does not resolve."""
        try:
            answer = await self._ask(dns.name.from_text(name), dns.rdatatype.A)
        except (Unanswered, dns.exception.DNSException):
            return []
        return _addresses(rebuild(answer)[0])

    # -- from the guest

    def _receive(self, udp: socket.socket) -> None:
        """Read one datagram. The next one waits until the loop has done its other work."""
        try:
            data, guest = udp.recvfrom(MAX_QUERY)
        except OSError:
            return
        if not self._budget.admits() or len(self._queries) >= self._limits.under_way:
            self._refused("*", "limit")
            return

        async def answer() -> None:
            response = await self.respond(data)
            if response is not None:
                udp.sendto(await self._spend(_write, response, min(max(response.request_payload, 512), PAYLOAD)), guest)

        self._begin(self._queries, answer)

    def _accept(self, tcp: socket.socket) -> None:
        try:
            guest, _ = tcp.accept()
        except BlockingIOError:
            return
        except OSError:
            # The server may be out of descriptors. The socket stays ready, so this would repeat without end.
            loop = asyncio.get_running_loop()
            loop.remove_reader(tcp)
            loop.call_later(ACCEPT_PAUSE, lambda: tcp in self._listening and loop.add_reader(tcp, self._accept, tcp))
            return
        if len(self._connections) >= self._limits.connections:
            guest.close()
            self._refused("*", "limit")
            return
        guest.setblocking(False)
        self._begin(self._connections, lambda: self._converse(guest), guest)

    async def _converse(self, guest: socket.socket) -> None:
        """Queries of one connection, one after the other."""
        while self._budget.admits():
            async with asyncio.timeout(self._limits.idle):
                size = int.from_bytes(await _receive_exactly(guest, 2), "big")
                if size > MAX_QUERY:
                    return
                data = await _receive_exactly(guest, size)
            response = await self.respond(data)
            if response is None:
                return
            wire = await self._spend(_write, response, 65535)
            async with asyncio.timeout(self._limits.idle):
                await asyncio.get_running_loop().sock_sendall(guest, len(wire).to_bytes(2, "big") + wire)
        self._refused("*", "limit")

    def _begin(
        self,
        tasks: set[asyncio.Task[None]],
        work: Callable[[], Coroutine[Any, Any, None]],
        guest: socket.socket | None = None,
    ) -> None:
        async def guarded() -> None:
            try:
                await work()
            except (OSError, TimeoutError, EOFError, Unanswered):
                pass  # the guest has gone, is too slow, or has used up its budget
            except Exception as error:  # noqa: BLE001  a guest must not reach the loop's handler
                log.warning("a sandbox's query failed: %s %.200r", type(error).__name__, error)

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if guest is not None:
                guest.close()  # here, because a task that is cancelled early never runs

        task = asyncio.get_running_loop().create_task(guarded())
        tasks.add(task)
        task.add_done_callback(ended)

    async def _spend(self, work: Callable[..., T], *args: Any) -> T:
        """Do work that strangers can make long, outside the event loop. A millisecond costs as much as a question.

        An answer of 4 KB can take a second to read, for example if its names have a hundred labels. Then the guest's
        budget is used up, so its waiting work is dropped.

        Raises:
            Unanswered: the guest has used up its budget.
        """

        def charged() -> T:
            if self._budget.is_spent:
                raise Unanswered
            began = time.thread_time()
            try:
                return work(*args)
            finally:
                self._budget.charge((time.thread_time() - began) * 1000)

        return await asyncio.get_running_loop().run_in_executor(self._reader, charged)

    # -- what is answered

    async def respond(self, data: bytes) -> dns.message.Message | None:
        """The answer to a query, given its bytes; None if there must be none."""
        query = read_query(data)
        if query is None or query.flags & dns.flags.QR:
            return query
        response = _response(query)
        (question,) = query.question
        if query.edns > 0:
            response.set_rcode(dns.rcode.BADVERS)
        elif question.rdclass != dns.rdataclass.IN or _is_meta(question.rdtype) or question.name == dns.name.root:
            response.set_rcode(dns.rcode.REFUSED)
        elif question.rdtype not in _KINDS | _EMPTY:
            response.set_rcode(dns.rcode.NOTIMP)
        else:
            try:
                await self._resolve(question, response)
            except Unanswered:
                response.set_rcode(dns.rcode.SERVFAIL)
            except Exception as error:  # noqa: BLE001  the guest gets an answer even if the filter fails
                log.warning("a sandbox's query failed: %s %.200r", type(error).__name__, error)
                response = _response(query)
                response.set_rcode(dns.rcode.SERVFAIL)
        return response

    async def _resolve(self, question: dns.rrset.RRset, response: dns.message.Message) -> None:
        try:
            name = read_name(question.name)
            reason = judge_name(name, self._floor(), self._policy())
        except Malformed:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return
        if reason is not None:
            response.set_rcode(dns.rcode.NXDOMAIN)
            if question.rdtype not in _EMPTY:  # every program asks for these beside A; A is counted
                self._refused(name, reason)
            return
        if question.rdtype in _EMPTY:
            return
        answer = await self._ask(dns.name.from_text(name), question.rdtype)
        records, authority = rebuild(answer)
        floor = self._floor()
        found = _addresses(records) if question.rdtype == dns.rdatatype.A else []
        addresses = [address for address in found if not floor.refuses(address)]
        aliases = _aliases(records)
        if leads_inside(aliases, floor) or (found and not addresses):
            is_refused = True
        else:
            # An address may be told whoever knows it. All else may be the host's view of its own network.
            is_refused = not addresses and not await self._are_public([name, *map(read_name, aliases)])
        if is_refused:
            self._refused(name, "floor")
            response.set_rcode(dns.rcode.NXDOMAIN)
            return
        response.set_rcode(answer.rcode())
        response.answer, response.authority = records, authority
        if addresses:
            await self._tell_addresses(name, addresses, response)

    async def _tell_addresses(self, name: str, addresses: list[IPv4Address], response: dns.message.Message) -> None:
        """Leave only these addresses in a response, and pin them if a rule allows the name."""
        last = response.answer.pop()
        kept = [record for record in last if IPv4Address(record.address) in addresses]
        response.answer.append(dns.rrset.from_rdata_list(last.name, last.ttl, kept))
        seconds = max(min(rrset.ttl for rrset in response.answer), MIN_PIN)
        if self._policy().permits_name(name) and await self._pin(name, addresses, seconds):
            self._budget.charge(PIN_COST)
        self._remember(name, addresses, seconds + SLACK)

    def _remember(self, name: str, addresses: list[IPv4Address], seconds: float) -> None:
        for address in addresses:
            self._given.pop((name, address), None)  # the newest come last
            self._given[name, address] = self._clock() + seconds
        while len(self._given) > REMEMBERED:
            del self._given[next(iter(self._given))]

    # -- zones

    async def _are_public(self, names: list[str]) -> bool:
        """Whether everybody on the internet may ask for all of these names; no, if that can't be found out in time."""
        try:
            async with asyncio.timeout(self._limits.total):
                for name in dict.fromkeys(names):
                    if not await self._is_public(name):
                        return False
        except (TimeoutError, Unanswered, dns.exception.DNSException):
            return False
        return True

    async def _is_public(self, name: str) -> bool:
        """Whether the zone that holds a name is one of the internet. Its zone is the first above it with name servers.

        Raises:
            Unanswered: no resolver tells.
        """
        labels = name.split(".")[-MAX_DEPTH:]
        for zone in (".".join(labels[at:]) for at in range(len(labels))):
            verdict, until = self._zones.get(zone, (None, 0.0))
            if until <= self._clock():
                verdict = await self._judge_zone(zone)
                self._zones.pop(zone, None)  # the newest come last
                self._zones[zone] = verdict, self._clock() + ZONE_KEPT
                while len(self._zones) > ZONES:
                    del self._zones[next(iter(self._zones))]
            if verdict is not None:
                return verdict
        return False

    async def _judge_zone(self, zone: str) -> bool | None:
        """Whether a zone is one of the internet; None if no zone begins there.

        A zone that a company serves inside has name servers at inside addresses, or has such an address itself.

        Raises:
            Unanswered: no resolver tells.
        """
        asked = dns.name.from_text(zone)
        answer = await self._ask(asked, dns.rdatatype.NS)
        found = answer.get_rrset(answer.answer, asked, dns.rdataclass.IN, dns.rdatatype.NS)
        self._budget.charge(1)
        if found is None:
            return None
        try:
            servers = sorted(read_name(record.target) for record in found)[:MAX_SERVERS]
        except Malformed:
            return False
        self._budget.charge(1 + len(servers))
        floor = self._floor()
        if any(map(floor.refuses_name, servers)):
            return False
        own, *theirs = await asyncio.gather(*map(self.addresses, (zone, *servers)))
        addresses = [address for each in theirs for address in each]
        return bool(addresses) and not any(map(floor.refuses, (*own, *addresses)))

    # -- upstream

    async def _ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        """The answer of a resolver, either NOERROR or NXDOMAIN.

        Raises:
            Unanswered: no resolver gives such an answer in time.
        """
        try:
            async with asyncio.timeout(self._limits.total):
                for upstream in itertools.islice(itertools.cycle(self._upstreams), 3):
                    try:
                        async with asyncio.timeout(self._limits.attempt):
                            answer = await self._ask_one(upstream, name, kind)
                    except (OSError, EOFError, TimeoutError, Unanswered, dns.exception.DNSException, ValueError):
                        continue  # the next one may do better
                    if answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                        return answer
        except TimeoutError:
            pass
        raise Unanswered

    async def _ask_one(
        self, upstream: tuple[str, int], name: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> dns.message.Message:
        """Ask over UDP, from a port and with a number that nobody can guess, and over TCP if the answer is long."""
        query = dns.message.make_query(name, kind, use_edns=0, payload=PAYLOAD, id=secrets.randbelow(65536))
        wire = query.to_wire()
        loop = asyncio.get_running_loop()
        with _socket(upstream, socket.SOCK_DGRAM) as sock:
            await loop.sock_sendall(sock, wire)
            while True:
                answer = await self._spend(_read_answer, query, await loop.sock_recv(sock, MAX_DATAGRAM))
                if answer is not None:
                    break
        if answer.flags & dns.flags.TC:
            with _socket(upstream, socket.SOCK_STREAM, connected=False) as sock:
                await loop.sock_connect(sock, upstream)
                await loop.sock_sendall(sock, len(wire).to_bytes(2, "big") + wire)
                size = int.from_bytes(await _receive_exactly(sock, 2), "big")
                if size > MAX_ANSWER:
                    raise Unanswered
                answer = await self._spend(_read_answer, query, await _receive_exactly(sock, size))
        if answer is None or answer.flags & dns.flags.TC:
            raise Unanswered
        return answer


# -- pure


def read_query(data: bytes) -> dns.message.Message | None:
    """A guest's query with exactly one question, or else the error to answer with, or None if there must be no answer.

    Answers are not answered, because they could go back and forth for ever. A query too short for an id is not, either.
    """
    if len(data) < 12:
        return None
    number, flags, questions, answers, authorities, additionals = struct.unpack("!6H", data[:12])
    if flags & dns.flags.QR:
        return None
    opcode = dns.opcode.from_flags(flags)
    if opcode != dns.opcode.QUERY:
        return _error(number, flags, dns.rcode.NOTIMP)
    if (questions, answers, authorities) != (1, 0, 0) or additionals > 1 or flags & dns.flags.TC:
        return _error(number, flags, dns.rcode.FORMERR)
    try:
        query = dns.message.from_wire(data)
    except (dns.exception.DNSException, ValueError):
        return _error(number, flags, dns.rcode.FORMERR)
    if query.additional or query.had_tsig or len(query.question) != 1:
        return _error(number, flags, dns.rcode.FORMERR)
    return query


def read_name(name: dns.name.Name) -> str:
    """A question's name in the form in which names are judged.

    Raises:
        Malformed: it is no name of a host or a service, or it is an address.
    """
    if any(b"." in label for label in name.labels):
        raise Malformed("a dot within a label")
    host = parse_host(b".".join(name.labels[:-1]).decode("latin-1"))
    if not isinstance(host, str):
        raise Malformed("an address")
    return host


def leads_inside(aliases: list[dns.name.Name], floor: Floor) -> bool:
    """Whether an alias is a name that nobody may ask for. The host's resolvers follow it into their own network."""
    try:
        return any(_is_refused(read_name(alias), floor) for alias in aliases)
    except Malformed:
        return True


def _is_refused(name: str, floor: Floor) -> bool:
    """Whether the floor refuses a name, or the address that a reverse name is about.

    Raises:
        Malformed: nobody can look the name up.
    """
    address = reverse_address(name)
    return floor.refuses_name(name) or (address is not None and floor.refuses(address))


def _aliases(records: list[dns.rrset.RRset]) -> list[dns.name.Name]:
    return [each.target for rrset in records if rrset.rdtype == dns.rdatatype.CNAME for each in rrset]


def judge_name(name: str, floor: Floor, policy: Policy) -> str | None:
    """The reason why a name is not looked up, or None.

    Raises:
        Malformed: nobody can look the name up.
    """
    if _is_refused(name, floor):
        return "floor"
    verdict = policy.permits_name(name)
    # With address rules a name is resolved to see where it leads; the filter decides then.
    if verdict is False or (verdict is None and not policy.allow_internet and not policy.allow):
        return "policy"
    return None


def _is_meta(kind: dns.rdatatype.RdataType) -> bool:
    """Whether a type is not a type of records: ANY, zone transfers, types of the protocol itself."""
    return kind == 0 or dns.rdatatype.is_metatype(kind)


def rebuild(answer: dns.message.Message) -> tuple[list[dns.rrset.RRset], list[dns.rrset.RRset]]:
    """Answer and authority sections of an answer, with only what was asked for.

    They hold the chain of aliases from the question's name to the records. If there are no records, they hold the SOA
    record, because it says for how long that is so.
    """
    (question,) = answer.question
    name = question.name
    chain: list[dns.rrset.RRset] = []
    for _ in range(MAX_CHAIN):
        found = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, question.rdtype)
        alias = answer.get_rrset(answer.answer, name, dns.rdataclass.IN, dns.rdatatype.CNAME)
        if found:
            return [_bounded(each) for each in (*chain, found)], []
        if not alias:
            break
        chain.append(alias)
        name = alias[0].target
    soa = [each for each in answer.authority if each.rdtype == dns.rdatatype.SOA][:1]
    return [_bounded(each) for each in chain], [_bounded(each) for each in soa]


def _bounded(rrset: dns.rrset.RRset) -> dns.rrset.RRset:
    rrset.ttl = min(rrset.ttl, MAX_TTL)
    return rrset


def _addresses(records: list[dns.rrset.RRset]) -> list[IPv4Address]:
    return [IPv4Address(each.address) for rrset in records if rrset.rdtype == dns.rdatatype.A for each in rrset]


def _read_answer(query: dns.message.Message, data: bytes) -> dns.message.Message | None:
    """An answer to our query; None if it is not one.

    Raises:
        Unanswered: it has too many records.
        dns.exception.DNSException: it can't be read.
    """
    if len(data) < 12 or data[:2] != query.id.to_bytes(2, "big"):
        return None
    if sum(struct.unpack("!4H", data[4:12])) > MAX_RECORDS:
        raise Unanswered
    answer = dns.message.from_wire(data)
    return answer if query.is_response(answer) and len(answer.question) == 1 else None


def _response(query: dns.message.Message) -> dns.message.Message:
    return dns.message.make_response(query, recursion_available=True, our_payload=PAYLOAD, pad=0)


def _error(number: int, flags: int, rcode: dns.rcode.Rcode) -> dns.message.Message:
    """An answer to a query that can't be read: a head alone."""
    response = dns.message.QueryMessage(id=number)
    response.flags = dns.flags.QR | dns.flags.RA | (flags & (dns.flags.RD | 0x7800))
    response.set_rcode(rcode)
    return response


def _write(response: dns.message.Message, size: int) -> bytes:
    """A response of at most `size` bytes. One that does not fit says so, and the guest asks again over TCP."""
    try:
        return response.to_wire(max_size=size)
    except dns.exception.TooBig:
        response.answer, response.authority = [], []
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=size)


def _socket(upstream: tuple[str, int], kind: int, *, connected: bool = True) -> socket.socket:
    """A socket for one query. The kernel chooses its port at random."""
    sock = socket.socket(socket.AF_INET6 if ":" in upstream[0] else socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        if connected:
            sock.connect(upstream)
    except BaseException:
        sock.close()
        raise
    return sock


async def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: the other end has no more.
    """
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
