"""What a sandbox may reach: the floor, which holds for everybody, and the owner's policy above it. Pure.

The floor refuses every address that is not on the public internet, the host itself, and the networks that the host is
in. Only the operator makes exceptions. Above the floor the policy decides: `allow` wins over `deny`, and `deny` wins
over the default. The default is everything, or nothing when `allow_internet` is false.

An entry of a policy can be written in one way only. An entry that some programs read as an address (`127.1`,
`010.0.0.1`, `0x7f.1`), or that is no valid name (a NUL, a user before an @), is refused, not interpreted.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Network, collapse_addresses, ip_address

from kernel_gateway.errors import InvalidRequest

MAX_ENTRIES = 500
"""Entries of a policy, both lists together."""
MAX_ENTRY = 255
"""Characters of an entry."""
MAX_NAME = 253

DENIED = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # "this network"; Linux takes 0.0.0.0 for itself
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' networks, and cloud metadata here and there
        "127.0.0.0/8",
        "168.63.129.16/32",  # looks public; a cloud's control address
        "169.254.0.0/16",  # link-local: cloud metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks; our own links
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
"""Blocks that no sandbox reaches: IANA's special-purpose registry, and addresses that clouds have made special."""
LOCAL = ("localhost", "local", "internal", "lan", "home", "home.arpa", "corp", "intranet", "private")
"""Zones that mean something only near the host: multicast DNS, the clouds' metadata, and what companies and routers
call their own networks. None of them is delegated on the internet."""
ITSELF = (IPv4Network("0.0.0.0/8"), IPv4Network("127.0.0.0/8"))
"""Blocks in DENIED by which every host reaches itself. Nobody can make exceptions to them."""


def without_itself(block: IPv4Network) -> list[IPv4Network]:
    """The parts of a block that an operator can take out of the floor."""
    left = [block]
    for own in ITSELF:
        kept = [each for each in left if not each.overlaps(own)]
        wider = [each for each in left if each.overlaps(own) and own.subnet_of(each)]
        left = [*kept, *(part for each in wider for part in each.address_exclude(own))]
    return sorted(left)


@dataclass(frozen=True, slots=True)
class Floor:
    """The addresses that are refused to every sandbox of the server.

    `exceptions` are the operator's blocks, taken out of `blocks`; they hold nothing of ITSELF. `host` has the host's
    own addresses, which are refused in any case. `near` has the blocks that are refused besides DENIED: the networks
    that the host is in, and those that the operator denies. `zones` are local besides LOCAL.
    """

    exceptions: tuple[IPv4Network, ...] = ()
    host: frozenset[IPv4Address] = frozenset()
    near: tuple[IPv4Network, ...] = ()
    zones: tuple[str, ...] = ()

    @property
    def blocks(self) -> list[IPv4Network]:
        """What is refused but for the exceptions: blocks that do not overlap."""
        return list(collapse_addresses((*DENIED, *self.near)))

    def refuses(self, address: IPv4Address) -> bool:
        """Whether no sandbox may reach an address."""
        if address in self.host:
            return True
        is_blocked = any(address in block for block in (*DENIED, *self.near))
        return is_blocked and not any(address in block for block in self.exceptions)

    def refuses_name(self, name: str) -> bool:
        """Whether a name is local. Such a name is never looked up and never given to a proxy.

        Single labels are local, because a company's resolver completes them. Other internal names are looked up like
        any name, and then their addresses are judged.
        """
        return "." not in name or any(name == zone or name.endswith(f".{zone}") for zone in (*LOCAL, *self.zones))

    def refuses_all(self, block: IPv4Network) -> bool:
        """Whether no sandbox may reach anything in a block."""
        # Counting is enough, because these are disjoint, and if two blocks overlap, one holds the other.
        refused = collapse_addresses((*self.blocks, *map(IPv4Network, self.host)))
        if sum(min(each, block, key=_size).num_addresses for each in refused if each.overlaps(block)) < _size(block):
            return False
        excepted = [min(each, block, key=_size) for each in self.exceptions if each.overlaps(block)]
        return all(sum(address in each for address in self.host) == _size(each) for each in excepted)


def parse_zone(text: str) -> str:
    """A zone's name in lower case, without dots at its ends.

    Raises:
        ValueError: the text is no such name.
    """
    name = text.strip(".").lower()
    if not _NAME.fullmatch(name) or name.startswith("*") or len(name) > MAX_NAME:
        raise ValueError(f"{text!r} is no name of a zone")
    return name


def _size(block: IPv4Network) -> int:
    return block.num_addresses


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner of a sandbox allows it, above the floor.

    Names are in lower case without a dot at the end; `*.example.com` is every name below example.com, not itself.
    `allow_out` and `deny_out` are the entries it was made of. They are for display only.
    """

    allow_internet: bool = True
    allow: tuple[IPv4Network, ...] = ()
    allow_names: tuple[str, ...] = ()
    deny: tuple[IPv4Network, ...] = ()
    deny_names: tuple[str, ...] = ()
    allow_out: tuple[str, ...] = field(default=(), compare=False)
    deny_out: tuple[str, ...] = field(default=(), compare=False)

    @property
    def restricts(self) -> bool:
        """Whether the policy refuses anything that the floor does not."""
        return not self.allow_internet or bool(self.deny or self.deny_names)

    @property
    def has_names(self) -> bool:
        """Whether the policy has rules about names."""
        return bool(self.allow_names or self.deny_names)

    def permits_address(self, address: IPv4Address) -> bool:
        """Whether an address may be reached under any name, or none."""
        if any(address in block for block in self.allow):
            return True
        return self.allow_internet and not any(address in block for block in self.deny)

    def permits_name(self, name: str) -> bool | None:
        """Whether a name may be reached, if a rule names it; None if its addresses decide."""
        if any(_matches(name, pattern) for pattern in self.allow_names):
            return True
        if any(_matches(name, pattern) for pattern in self.deny_names):
            return False
        return None


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


@dataclass(frozen=True, slots=True)
class Refusal:
    """A destination that a sandbox tried to reach and may not.

    Args:
        destination: an address, or a name.
        port: 0 if there is none (a name that was not resolved, a ping).
        protocol: tcp, udp, icmp or dns.
        reason: "floor" (never reachable: private, special, the host), "policy" (the owner's rules), "mail" (25/tcp),
            "dns" (another resolver than the sandbox's), "limit" (too many connections), "protocol" (nothing but tcp,
            udp and ping passes).
        count: how often it was refused since the sandbox was created.
        last: when it was last refused, in seconds since 1970.
    """

    destination: str
    port: int
    protocol: str
    reason: str
    count: int
    last: float


# -- policies as people write them

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}(?:/(?:3[0-2]|[12]?[0-9]))?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?")
_MAPPED = IPv6Network("::ffff:0:0/96")
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\.?")
_FAULTS = [
    (r"[^\x00-\x7f]", "is not ASCII", "write the name in punycode: xn--…"),
    (r"[\x00-\x20\x7f]", "holds a blank or a control character", None),
    (r"://", "is a URL", "name the host alone: example.com"),
    (r"@", "holds a user's name", "name the host alone: example.com"),
    (r"/", "holds a path, or is not a block as it must be written", "a host is example.com, a block 192.0.2.0/24"),
    (r":", "holds a port, or is not an IPv6 address as it must be written", "a policy is about all ports of a host"),
    # Browsers and libc take a name for an address if its last label is a number.
    (
        r"(?:\A|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?\Z",
        "is not an address as it must be written",
        "four numbers from 0 to 255 without zeros in front: 192.0.2.7",
    ),
]
"""Faults of an entry that is neither an address nor a block: a pattern, the fault, a hint."""


def parse_policy(*, allow_internet: bool, allow_out: list[str], deny_out: list[str], floor: Floor) -> Policy:
    """A policy of entries as a client wrote them: IPv4 addresses, CIDR blocks, names, `*.` and a name.

    Raises:
        InvalidRequest: an entry is not valid, or it allows what no sandbox may reach; the text names the entry.
    """
    count = len(allow_out) + len(deny_out)
    if count > MAX_ENTRIES:
        raise InvalidRequest(
            f"network.allowOut and network.denyOut may have {MAX_ENTRIES} entries together, not {count}",
            hint="a block is one entry, and so is *.example.com",
        )
    allow = _parse_all("network.allowOut", allow_out)
    for number, entry in enumerate(allow):
        if isinstance(entry, IPv6Network):
            raise _wrong(f"network.allowOut[{number}]", allow_out[number], "can't be allowed: IPv6 is off in sandboxes")
        if isinstance(entry, IPv4Network) and floor.refuses_all(entry):
            raise _wrong(
                f"network.allowOut[{number}]",
                allow_out[number],
                "can't be allowed: it is private, special or the host's own",
                "only the operator of the server makes exceptions, with --egress-allow",
            )
    deny = _parse_all("network.denyOut", deny_out)
    denied = _blocks([_unmapped(entry) for entry in deny])
    allow_internet = allow_internet and not any(block.prefixlen == 0 for block in denied)
    return Policy(
        allow_internet=allow_internet,
        allow=_blocks(allow),
        allow_names=_names(allow),
        deny=denied if allow_internet else (),  # without the internet these change nothing
        deny_names=_names(deny),
        allow_out=_shown(allow),
        deny_out=_shown(deny),
    )


Entry = IPv4Network | IPv6Network | str
"""A name is a string. An address is a block of one address."""


def _parse_all(where: str, entries: list[str]) -> list[Entry]:
    return [_parse(f"{where}[{number}]", entry) for number, entry in enumerate(entries)]


def _parse(where: str, entry: str) -> Entry:
    if not 0 < len(entry) <= MAX_ENTRY:
        raise _wrong(where, entry, f"has {len(entry)} characters; it needs 1 to {MAX_ENTRY}")
    if _IPV4.fullmatch(entry):
        return _block(where, entry, IPv4Network(entry, strict=False))
    if _IPV6.fullmatch(entry):
        try:
            return _block(where, entry, IPv6Network(entry, strict=False))
        except ValueError:
            pass  # the code below says what is wrong with it
    for pattern, fault, hint in _FAULTS:
        if re.search(pattern, entry):
            raise _wrong(where, entry, fault, hint)
    name = entry.removesuffix(".").lower()
    if not _NAME.fullmatch(entry) or len(name) > MAX_NAME:
        raise _wrong(
            where,
            entry,
            f"is not a name: it needs labels of 1 to 63 letters, digits, inner hyphens, {MAX_NAME} characters in all",
            "a star may only stand in front, for whole labels: *.example.com; everything is 0.0.0.0/0",
        )
    return name


def _block(where: str, entry: str, block: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """The block that was read from an entry.

    Raises:
        InvalidRequest: the block does not begin at the entry's address.
    """
    address = entry.partition("/")[0]
    if ip_address(address) != block.network_address:
        raise _wrong(
            where,
            entry,
            f"is not where its block begins; did you mean {block}?",
            f"{address} without a length is that address alone",
        )
    return block


def _unmapped(entry: Entry) -> Entry:
    """The IPv4 block of an IPv4-mapped IPv6 block. A guest can reach it by the mapped address even if IPv6 is off."""
    if isinstance(entry, IPv6Network) and entry.subnet_of(_MAPPED):
        return IPv4Network((int(entry.network_address) & 0xFFFFFFFF, entry.prefixlen - _MAPPED.prefixlen))
    return entry


def _blocks(entries: Iterable[Entry]) -> tuple[IPv4Network, ...]:
    return tuple(collapse_addresses(entry for entry in entries if isinstance(entry, IPv4Network)))


def _names(entries: Iterable[Entry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for entry in entries if isinstance(entry, str)))


def _shown(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Each entry once, in its normal form: a block of one address is that address."""
    return tuple(dict.fromkeys(entry if isinstance(entry, str) else _written(entry) for entry in entries))


def _written(block: IPv4Network | IPv6Network) -> str:
    return str(block.network_address if block.num_addresses == 1 else block)


def _wrong(where: str, entry: str, fault: str, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{where}: {repr(entry[:100])[:100]} {fault}", hint=hint)
