"""nftables rules as text. Pure.

A slot's filter lives in the slot's own namespace and sees every packet of its guest. A packet is refused at once with
a reset or an ICMP error, and counted by destination and reason. The policy judges each packet until it has admitted
the connection; then the connection's `ct mark` is the policy's generation. So a new policy cuts what it forbids.
"""

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network

from kernel_gateway.drivers import GUEST_MAC
from kernel_gateway.network.policy import Floor, Policy

TAP, UPLINK = "tap0", "uplink"
GUEST, GATEWAY = IPv4Address("198.19.0.2"), IPv4Address("198.19.0.1")
GATEWAY_MAC = "02:63:76:00:00:01"
"""All addresses are the same in every slot, because a guest wakes from its template's snapshot with them configured."""
DNS_PORT, PROXY_PORT, GATE_PORT = 53, 3128, 8043
LINKS = IPv4Network("198.18.0.0/16")
"""Addresses of the links between host and slots, four for each link. Nothing outside the host sees them."""
HOST_SIDE = "cvm"
"""Beginning of the name of a link's end on the host; a number follows."""
NEW_CONNECTIONS = "100/second burst 400 packets"
NEW_QUERIES = "300/second burst 300 packets"
"""Packets for the resolver's socket. The resolver itself takes fewer."""
MAX_CONNECTIONS = 2000
MAX_HOST_CONNECTIONS = 2500
"""The limit in the host's list of connections, which all share. It is higher because the host forgets them later."""
MEGABIT = 125_000
"""Bytes in a million bits."""
LEAST_BURST, BURST = 256 * 1024, 0.05
"""Bytes, and seconds of the rate, that may pass at once. A frame of a guest may have 64 KiB, so fewer would stop it."""
PINS = 4096
"""Addresses of allowed names that a slot remembers."""
REFUSALS_KEPT = 500
REASONS = {1: "floor", 2: "policy", 3: "mail", 4: "dns", 5: "limit", 6: "protocol"}


def elements(blocks: Iterable[IPv4Network | IPv4Address]) -> str:
    """A set's `elements`; an empty text without any."""
    listed = ", ".join(str(block) for block in blocks)
    return f"elements = {{ {listed} }};" if listed else ""


def _burst(bandwidth: int) -> int:
    return max(LEAST_BURST, int(bandwidth * MEGABIT * BURST))


def shaping(bandwidth: int) -> str:
    """Batch of `tc` that makes what goes to the guest wait, so that it comes with no more than this rate.

    Args:
        bandwidth: Mbit a second; 0 for no limit.
    """
    if not bandwidth:
        return ""
    return f"qdisc add dev {TAP} root tbf rate {bandwidth}mbit burst {_burst(bandwidth)} latency 100ms\n"


def slot(floor: Floor, bandwidth: int = 0) -> str:
    """The whole filter of a new slot. It lets nothing out until `policy` has been applied.

    Args:
        bandwidth: Mbit a second that may come from the guest; 0 for no limit. What is over it is dropped, because
            nothing outside of the guest can make it wait. The kernel lets a second's worth and the burst pass at once.
    """
    rate = f"{bandwidth * MEGABIT} bytes/second burst {_burst(bandwidth)} bytes"
    limited = f"limit rate over {rate} drop" if bandwidth else ""
    refusals = "\n".join(f"    chain refuse_{name} {{ meta mark set {n} goto refuse; }}" for n, name in REASONS.items())
    return f"""
table netdev slot {{
    chain from_guest {{
        type filter hook ingress device "{TAP}" priority 0; policy drop;
        {limited}
        ether saddr != {GUEST_MAC} drop
        # The guest sends only as itself, because each sender is an entry in the list of neighbours that all share.
        arp htype 1 arp ptype ip arp saddr ip {GUEST} arp saddr ether {GUEST_MAC} accept
        # A packet that ends a connection here must end it on the host, too, or it would live on there uncounted.
        ip ttl < 2 drop
        ip hdrlength > 5 drop
        tcp flags & rst == rst meta length > 128 drop
        ip saddr {GUEST} accept
    }}
}}
table inet slot {{
    set floor {{ type ipv4_addr; flags interval; auto-merge; {elements(floor.blocks)} }}
    set excepted {{ type ipv4_addr; flags interval; auto-merge; {elements(floor.exceptions)} }}
    set host {{ type ipv4_addr; {elements(sorted(floor.host))} }}
    set allowed {{ type ipv4_addr; flags interval; auto-merge; }}
    set denied {{ type ipv4_addr; flags interval; auto-merge; }}
    set pinned {{ type ipv4_addr; flags timeout; size {PINS}; }}
    set kept {{ type ipv4_addr; size {PINS}; }}
    set open {{ type ipv4_addr; flags dynamic; }}
    set refused {{
        type mark . ipv4_addr . inet_proto . inet_service; flags dynamic, timeout; timeout 1d; size {REFUSALS_KEPT};
        counter;
    }}
    set refused_other {{
        type mark . ipv4_addr . inet_proto; flags dynamic, timeout; timeout 1d; size {REFUSALS_KEPT}; counter;
    }}
    chain input {{
        type filter hook input priority 0; policy drop;
        iifname != "{TAP}" drop
        ct state invalid, untracked drop
        udp dport {DNS_PORT} ip daddr {GATEWAY} limit rate over {NEW_QUERIES} drop
        udp dport {DNS_PORT} ip daddr {GATEWAY} accept
        ct state established accept
        limit rate over {NEW_CONNECTIONS} goto refuse_limit
        ct status dnat tcp dport {GATE_PORT} accept
        ip daddr != {GATEWAY} goto refuse_floor
        tcp dport {{ {DNS_PORT}, {PROXY_PORT} }} accept
        icmp type echo-request accept
        goto refuse_floor
    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname "{UPLINK}" oifname "{TAP}" ct state established, related goto answers
        iifname != "{TAP}" drop
        ct state invalid, untracked drop
        ip daddr @host goto refuse_floor
        ip daddr @floor ip daddr != @excepted goto refuse_floor
        meta l4proto != {{ tcp, udp, icmp }} goto refuse_protocol
        meta l4proto icmp icmp type != echo-request goto refuse_protocol
        meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto refuse_dns
        tcp dport 25 goto refuse_mail
        goto owner
    }}
    chain owner {{
        goto refuse_policy
    }}
    chain answers {{
        drop
    }}
    chain admit {{
        ct state new limit rate over {NEW_CONNECTIONS} goto refuse_limit
        ct state new add @open {{ ip saddr ct count over {MAX_CONNECTIONS} }} goto refuse_limit
    }}
{refusals}
    chain refuse {{
        meta l4proto {{ tcp, udp }} update @refused {{ meta mark . ip daddr . meta l4proto . th dport counter }}
        meta l4proto tcp reject with tcp reset
        meta l4proto != udp update @refused_other {{ meta mark . ip daddr . meta l4proto counter }}
        reject with icmp admin-prohibited
    }}
    chain redirected {{
        type nat hook prerouting priority dstnat;
        iifname "{TAP}" jump gate
    }}
    chain gate {{
    }}
    chain masqueraded {{
        type nat hook postrouting priority srcnat;
        oifname "{UPLINK}" masquerade
    }}
}}
"""


def policy(
    wanted: Policy,
    generation: int,
    *,
    to_gate: bool,
    pinned: Mapping[IPv4Address, float] | None = None,
    kept: Iterable[IPv4Address] = (),
) -> str:
    """Replace a slot's policy.

    Args:
        generation: a number that no earlier policy had, from 1.
        to_gate: all web traffic passes through the gate, because the way out is a proxy.
        pinned: addresses of names that both this policy and the one before allow, and for how many seconds.
        kept: present and past addresses of such names. Connections to them go on; new ones need a pin.
    """
    gate = ""
    if wanted.has_names or to_gate:
        # Traffic that an address rule allows needs no name, but may need the proxy.
        allowed = "" if to_gate else "add rule inet slot gate ip daddr @allowed return\n"
        gate = (
            "add rule inet slot gate ip daddr @host return\n"
            "add rule inet slot gate ip daddr @floor ip daddr != @excepted return\n"
            f"{allowed}add rule inet slot gate tcp dport {{ 80, 443 }} redirect to :{GATE_PORT}\n"
        )
    judged = _judged(wanted, generation, "daddr", "dport", "goto admitted", "goto refuse_policy", to_gate=to_gate)
    # Answers are judged, too, because a peer that is forbidden now could go on sending over UDP.
    answers = _judged(wanted, generation, "saddr", "sport", "accept", "drop", to_gate=to_gate)
    lines = [
        "flush chain inet slot owner",
        "flush chain inet slot answers",
        "flush chain inet slot gate",
        "flush set inet slot allowed",
        "flush set inet slot denied",
        "flush set inet slot pinned",
        "flush set inet slot kept",
        "add chain inet slot admitted",
        "flush chain inet slot admitted",
        *_fill("allowed", wanted.allow),
        *_fill("denied", wanted.deny),
        *_fill("kept", kept),
        "add rule inet slot admitted jump admit",
        f"add rule inet slot admitted ct mark set {generation} accept",
        *([f"add element inet slot pinned {{ {_timed(pinned)} }}"] if pinned else []),
        *(f"add rule inet slot owner {rule}" for rule in judged),
        *(f"add rule inet slot answers {rule}" for rule in answers),
    ]
    return "\n".join(lines) + "\n" + gate


def _judged(
    wanted: Policy, generation: int, peer: str, port: str, admit: str, refuse: str, *, to_gate: bool
) -> Iterator[str]:
    """A policy's rules for packets one way, until the policy has admitted their connection.

    Args:
        peer, port: the packet's fields for address and port of the end that is not the guest.
        admit, refuse: the verdicts.
    """
    yield f"ct mark {generation} accept"
    # Only a connection's first packet is redirected to the gate. A connection that began without it must not go on.
    past_the_gate = f"tcp {port} {{ 80, 443 }} {refuse}"
    if to_gate:
        yield past_the_gate
    if wanted.allow:
        yield f"ip {peer} @allowed {admit}"
    if wanted.has_names:
        # QUIC is refused, because the gate can read names only in TCP.
        yield past_the_gate
        yield f"udp {port} 443 {refuse}"
    if wanted.allow_names:
        yield f"ip {peer} @pinned {admit}"
        yield f"ct mark != 0 ip {peer} @kept {admit}"
    if wanted.allow_internet:
        yield f"ip {peer} @denied {refuse}"
        yield admit
    else:
        yield refuse


def _fill(name: str, content: Iterable[IPv4Network | IPv4Address]) -> list[str]:
    listed = ", ".join(map(str, content))
    return [f"add element inet slot {name} {{ {listed} }}"] if listed else []


def pin(pinned: Mapping[IPv4Address, float]) -> str:
    """Let addresses of allowed names through, each for its number of seconds from now."""
    # An element's timeout starts anew only when the element is deleted and added again.
    plain = ", ".join(map(str, pinned))
    return (
        f"add element inet slot pinned {{ {plain} }}\ndelete element inet slot pinned {{ {plain} }}\n"
        f"add element inet slot pinned {{ {_timed(pinned)} }}\n"
    )


def _timed(pinned: Mapping[IPv4Address, float]) -> str:
    return ", ".join(f"{address} timeout {max(1, round(seconds))}s" for address, seconds in pinned.items())


def surroundings(floor: Floor) -> str:
    """Replace what a slot's filter knows of the host: its addresses, and the blocks that nobody reaches."""
    lines = ["flush set inet slot host", *_fill("host", sorted(floor.host))]
    return "\n".join([*lines, "flush set inet slot floor", *_fill("floor", floor.blocks)]) + "\n"


def host(table: str, *, only_ours: bool) -> str:
    """The host's side of all links. A slot can reach the internet, but neither the host itself nor another slot.

    Args:
        table: a name of the server's own, so that two servers do not share one.
        only_ours: forwarding was switched on for us, so nobody else's packets may be forwarded.
    """
    return f"""
add table inet {table}
delete table inet {table}
table inet {table} {{
    chain input {{
        type filter hook input priority -5;
        iifname "{HOST_SIDE}*" meta l4proto tcp reject with tcp reset
        iifname "{HOST_SIDE}*" reject
    }}
    set open {{ type ipv4_addr; flags dynamic; }}
    chain forward {{
        type filter hook forward priority -5;
        iifname "{HOST_SIDE}*" oifname "{HOST_SIDE}*" drop
        iifname "{HOST_SIDE}*" ip saddr != {LINKS} drop
        iifname "{HOST_SIDE}*" ct state invalid, untracked drop
        iifname "{HOST_SIDE}*" ct state new add @open {{ ip saddr ct count over {MAX_HOST_CONNECTIONS} }} drop
        iifname "{HOST_SIDE}*" accept
        oifname "{HOST_SIDE}*" ct state established, related accept
        oifname "{HOST_SIDE}*" drop
        {"meta nfproto ipv4 drop" if only_ours else ""}
    }}
    chain masqueraded {{
        type nat hook postrouting priority srcnat;
        ip saddr {LINKS} masquerade
    }}
}}
"""
