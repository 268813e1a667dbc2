"""What a sandbox may reach: the floor nobody goes below, and the owner's policy above it. Pure.

The floor refuses every address that is not on the public internet, and the host itself. Only the operator makes
exceptions. Above it a policy decides, in this order: `allow` wins over `deny`, `deny` over the default, and the default
is everything, or nothing when `allow_internet` is false.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

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
"""Blocks that no sandbox reaches (IANA's special-purpose registry, and what clouds have made special)."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What is refused to every sandbox of the server.

    `exceptions` are the operator's, taken out of DENIED. `host` are the host's own addresses, refused in any case.
    """

    exceptions: tuple[IPv4Network, ...] = ()
    host: frozenset[IPv4Address] = frozenset()

    def refuses(self, address: IPv4Address) -> bool:
        """Whether no sandbox may reach it."""
        if address in self.host:
            return True
        return any(address in block for block in DENIED) and not any(address in block for block in self.exceptions)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner of a sandbox allows it, above the floor.

    Names are in lower case without a dot at the end; `*.example.com` is every name below example.com, not itself.
    """

    allow_internet: bool = True
    allow: tuple[IPv4Network, ...] = ()
    allow_names: tuple[str, ...] = ()
    deny: tuple[IPv4Network, ...] = ()
    deny_names: tuple[str, ...] = ()

    @property
    def has_names(self) -> bool:
        """Whether it matters by which name an address was found."""
        return bool(self.allow_names or self.deny_names)

    def permits_address(self, address: IPv4Address) -> bool:
        """Whether an address may be reached by itself, whatever name it was found by."""
        if any(address in block for block in self.allow):
            return True
        return self.allow_internet and not any(address in block for block in self.deny)

    def permits_name(self, name: str) -> bool | None:
        """Whether a name may be reached: yes or no when a rule names it; None when its addresses decide."""
        if any(_matches(name, pattern) for pattern in self.allow_names):
            return True
        if any(_matches(name, pattern) for pattern in self.deny_names):
            return False
        return None


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something a sandbox wanted to reach and may not, and how often.

    Args:
        destination: an address, or a name.
        port: 0 where there is none (a name that was not resolved, a ping).
        protocol: tcp, udp, icmp or dns.
        reason: "floor" (never reachable: private, special, the host), "policy" (the owner's rules), "mail" (25/tcp),
            "dns" (another resolver than the sandbox's), "limit" (too many connections), "protocol" (nothing but tcp,
            udp and ping passes).
        count: how often, since the sandbox was created.
        last: the last time, in seconds since 1970.
    """

    destination: str
    port: int
    protocol: str
    reason: str
    count: int
    last: float
