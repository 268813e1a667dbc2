"""Policies: how entries are read, how wrong ones are refused, and what a policy permits."""

import re
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernel_gateway.errors import InvalidRequest
from kernel_gateway.network.policy import DENIED, LOCAL, MAX_ENTRIES, MAX_ENTRY, MAX_NAME, Floor, Policy, parse_policy
from kernel_gateway.network.rules import REASONS

ADDRESSES = st.integers(0, 2**32 - 1).map(IPv4Address)
BLOCKS = st.builds(lambda address, length: IPv4Network((address, length), strict=False), ADDRESSES, st.integers(0, 32))
LABELS = st.from_regex("[A-Za-z][A-Za-z0-9-]{0,9}[A-Za-z]|[A-Za-z]", fullmatch=True)
NAMES = st.builds(
    lambda star, labels: star + ".".join(labels), st.sampled_from(["", "*."]), st.lists(LABELS, min_size=1, max_size=4)
)
ENTRIES = st.lists(BLOCKS.map(str) | ADDRESSES.map(str) | NAMES, max_size=8)
NEARLY = st.text("0123456789abcdefxX.:/*@-_%[]\\ \0\n", max_size=24)
"""Text of the characters that entries are made of."""


def parse(
    allow: list[str] | None = None, deny: list[str] | None = None, *, internet: bool = True, floor: Floor | None = None
) -> Policy:
    return parse_policy(
        allow_internet=internet, allow_out=allow or [], deny_out=deny or [], floor=Floor() if floor is None else floor
    )


def refusal(allow: list[str] | None = None, deny: list[str] | None = None, *, floor: Floor | None = None) -> str:
    """The message and the hint that a policy is refused with."""
    with pytest.raises(InvalidRequest) as caught:
        parse(allow, deny, floor=floor)
    return f"{caught.value} | {caught.value.hint}"


# -- entries


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ("1.1.1.1", "1.1.1.1"),
        ("1.1.1.1/32", "1.1.1.1"),
        ("1.1.1.0/24", "1.1.1.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("255.255.255.255", "255.255.255.255"),
        ("example.com", "example.com"),
        ("Example.COM.", "example.com"),
        ("*.Example.com", "*.example.com"),
        ("*.com", "*.com"),
        ("localhost", "localhost"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("r3---sn.example.com", "r3---sn.example.com"),
        ("1.2.3.4.example", "1.2.3.4.example"),
        ("3com.com", "3com.com"),
        ("a.0xg", "a.0xg"),
        ("a" * 63 + ".com", "a" * 63 + ".com"),
        (".".join(["a" * 49] * 5) + ".abc.", ".".join(["a" * 49] * 5) + ".abc"),
        ("::/0", "::/0"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("2001:db8::1/128", "2001:db8::1"),
        ("::ffff:1.2.3.4", "::ffff:102:304"),
    ],
)
def test_entries_and_their_normal_form(entry: str, shown: str) -> None:
    """A right entry is accepted and shown in its normal form."""
    assert parse(deny=[entry]).deny_out == (shown,)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "has 0 characters"),
        ("x" * (MAX_ENTRY + 1), "has 256 characters"),
        ("1.2.3.4/24", "'1.2.3.4/24' is not where its block begins; did you mean 1.2.3.0/24?"),
        ("2001:db8::1/64", "did you mean 2001:db8::/64?"),
        ("1.2.3.0/33", "'1.2.3.0/33' holds a path, or is not a block"),
        ("1.2.3.0/", "not a block"),
        ("1.2.3.0/024", "not a block"),
        ("1.2.3.0/-1", "not a block"),
        ("1.2.3.0/255.255.255.0", "not a block"),
        ("1.2.3.0/0.0.0.255", "not a block"),
        ("2001:db8::/129", "not a block"),
        ("010.0.0.1", "'010.0.0.1' is not an address as it must be written"),
        ("127.1", "not an address as it must be written"),
        ("0x7f.1", "not an address as it must be written"),
        ("0x7f000001", "not an address as it must be written"),
        ("0X7F.0.0.0x1", "not an address as it must be written"),
        ("2130706433", "not an address as it must be written"),
        ("256.1.1.1", "not an address as it must be written"),
        ("1.2.3.4.", "not an address as it must be written"),
        ("1.2.3.4.5", "not an address as it must be written"),
        ("example.0x", "not an address as it must be written"),
        ("*.1", "not an address as it must be written"),
        ("example.com:443", "holds a port"),
        ("1.2.3.4:80", "holds a port"),
        ("[::1]", "not an IPv6 address as it must be written"),
        ("fe80::1%eth0", "not an IPv6 address as it must be written"),
        ("1::2::3", "not an IPv6 address as it must be written"),
        ("https://example.com", "is a URL"),
        ("example.com/", "holds a path"),
        ("user@example.com", "holds a user's name"),
        ("user:key@example.com", "holds a user's name"),
        ("evil\0.example.com", r"'evil\x00.example.com' holds a blank or a control character"),
        ("example.com\n", "holds a blank or a control character"),
        (" example.com", "holds a blank or a control character"),
        ("a b", "holds a blank or a control character"),
        ("bücher.example", "is not ASCII | write the name in punycode"),
        ("example。com", "is not ASCII"),
        ("\u212aelvin.example", "is not ASCII"),
        ("１.2.3.4", "is not ASCII"),
        ("\ud800", r"'\ud800' is not ASCII"),
        ("*", "is not a name"),
        ("*.", "is not a name"),
        ("a.*.com", "is not a name"),
        ("*a.com", "is not a name"),
        ("*.*.com", "is not a name"),
        (".", "is not a name"),
        (".com", "is not a name"),
        ("a..com", "is not a name"),
        ("a.com..", "is not a name"),
        ("-a.com", "is not a name"),
        ("a-.com", "is not a name"),
        ("_dns.com", "is not a name"),
        ("a" * 64 + ".com", "is not a name"),
        (".".join(["a" * 49] * 5) + ".abcd", "is not a name"),
        ("a\\b.com", "is not a name"),
    ],
)
def test_entries_that_are_refused(entry: str, says: str) -> None:
    """Each refusal names the list and the entry, and says what is wrong with it."""
    assert says in refusal(deny=["example.com", entry])
    assert refusal(deny=["example.com", entry]).startswith("network.denyOut[1]: ")
    assert refusal(allow=[entry]).startswith("network.allowOut[0]: ")


@pytest.mark.parametrize(
    "entry", ["::1", "2001:db8::/32", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "::/0"]
)
def test_ipv6_can_be_denied_only(entry: str) -> None:
    """IPv6 is off in sandboxes, so denying it in any form changes nothing and allowing it is refused."""
    assert refusal(allow=[entry]).startswith(f"network.allowOut[0]: '{entry}' can't be allowed: IPv6 is off")
    if not entry.startswith("::ffff:"):
        assert parse(deny=[entry]) == Policy()


def test_a_mapped_address_is_denied_as_what_it_is() -> None:
    """The IPv4 address is denied, because a guest can reach it by its IPv6 form."""
    assert parse(deny=["::ffff:8.8.8.8"]).deny == (IPv4Network("8.8.8.8/32"),)
    assert parse(deny=["::ffff:8.0.0.0/104"]).deny == (IPv4Network("8.0.0.0/8"),)
    assert parse(deny=["::ffff:0:0/96"]) == Policy(allow_internet=False)


def test_the_number_of_entries() -> None:
    """Both lists may have 500 entries together. More are refused before any is read, and the message has the limit."""
    half = [f"n{number}.example" for number in range(MAX_ENTRIES // 2)]
    assert len(parse(half, half).allow_names) == MAX_ENTRIES // 2
    assert "may have 500 entries together, not 501" in refusal([*half, ""], half)
    assert "may have 500 entries together, not 10000" in refusal(deny=["\0"] * 10_000)


def test_duplicates_are_merged() -> None:
    """An entry in two spellings is one entry. Blocks are joined where they meet."""
    policy = parse(["a.b", "A.B.", "1.1.1.1", "1.1.1.1/32"], ["8.8.8.0/25", "8.8.8.128/25", "8.8.8.8"])
    assert (policy.allow_names, policy.allow) == (("a.b",), (IPv4Network("1.1.1.1/32"),))
    assert policy.allow_out == ("a.b", "1.1.1.1")
    assert policy.deny == (IPv4Network("8.8.8.0/24"),)
    assert policy.deny_out == ("8.8.8.0/25", "8.8.8.128/25", "8.8.8.8")


def test_denying_everything_is_no_internet() -> None:
    """Everything may be denied in one entry or in two halves."""
    for everything in (["0.0.0.0/0"], ["0.0.0.0/1", "128.0.0.0/1"], ["0.0.0.0/0", "1.1.1.1"]):
        assert parse(deny=everything) == Policy(allow_internet=False) == parse(internet=False)
        assert parse(deny=everything).deny_out == tuple(everything)


@given(st.text(max_size=300) | NEARLY)
@example("0.0.0.0/0" + "\0")
@example("a" * 254)
def test_any_text(text: str) -> None:
    """Any text is an entry of ours or is refused with a message that names it, of bounded length."""
    said = ""
    try:
        policy = parse([text])
    except InvalidRequest as error:
        said = str(error)
    if said:
        assert re.match(r"network\.allowOut\[0\]: ['\"]", said)
        assert len(said.encode()) < 600
    else:
        assert len(policy.allow) + len(policy.allow_names) == 1


@given(NEARLY)
@example("0")
@example("0x")
@example("1.0x7")
@example("a.1")
def test_no_name_is_an_address_elsewhere(text: str) -> None:
    """libc takes none of our names for an address."""
    with suppress(InvalidRequest):
        for name in parse([text]).allow_names:
            assert len(name) <= MAX_NAME
            with pytest.raises(OSError, match="illegal IP address"):
                socket.inet_aton(name)


@given(ENTRIES)
def test_the_normal_form_means_the_same(entries: list[str]) -> None:
    """The shown entries, sent again, make the same policy and are shown the same."""
    first = parse(deny=entries)
    again = parse(deny=list(first.deny_out))
    assert (again, again.deny_out) == (first, first.deny_out)
    assert parse(deny=[entry.upper() + "." * (entry[-1:].isalpha()) for entry in entries]) == first


# -- the floor


def test_the_floor_is_documented() -> None:
    """docs/network.md lists every block, and every reason of a refusal."""
    text = (Path(__file__).parents[2] / "docs" / "network.md").read_text()
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    blocks = re.findall(r"`(\d+\.\d+\.\d+\.\d+(?:/\d+)?)`", parts["What no sandbox reaches"])
    assert {IPv4Network(block) for block in blocks} == set(DENIED)
    assert all(f"`{zone}`" in text for zone in LOCAL)
    rows = re.findall(r"^\| `(\w+)` \|", parts["What was refused"], re.MULTILINE)
    assert set(rows) - {"reason"} == set(REASONS.values())


def test_blocks_of_the_floor_are_disjoint() -> None:
    """Blocks are disjoint, because `refuses_all` relies on it."""
    assert not [pair for pair in combinations(DENIED, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize("block", DENIED, ids=str)
def test_the_floor_can_not_be_allowed(block: IPv4Network) -> None:
    """A denied block, a part of it or an address in it is 400, and the message names the entry and says why."""
    parts = {block, IPv4Network((block[-1], 32)), IPv4Network((block[0], 32))}
    for entry in {str(part) for part in parts} | {str(block[0])}:
        says = refusal(["1.1.1.1", entry])
        assert says.startswith(f"network.allowOut[1]: '{entry}' can't be allowed: it is private, special or the host's")
        assert "--egress-allow" in says
        assert parse(deny=[entry]).deny_out


def test_what_is_partly_above_the_floor_can_be_allowed() -> None:
    """A block that is partly public is a right entry, and the floor stays. A block of two denied blocks is not."""
    assert parse(["0.0.0.0/0"]).allow == (IPv4Network("0.0.0.0/0"),)
    assert parse(["10.0.0.0/7"]).allow == (IPv4Network("10.0.0.0/7"),)
    assert "can't be allowed" in refusal(["224.0.0.0/3"])


def test_the_operators_exceptions_can_be_allowed() -> None:
    """An exception, its parts and blocks around it can be allowed, but never the host itself."""
    floor = Floor(
        exceptions=(IPv4Network("10.20.0.0/16"),), host=frozenset({IPv4Address("10.20.0.1"), IPv4Address("8.8.8.8")})
    )
    for entry in ("10.20.0.0/16", "10.20.3.4", "10.0.0.0/8", "10.20.0.0/31"):
        assert parse([entry], floor=floor).allow == (IPv4Network(entry),)
    for entry in ("10.20.0.1", "10.21.0.0/16", "8.8.8.8"):
        assert "can't be allowed" in refusal([entry], floor=floor)
    assert parse(["8.8.8.8/31"], floor=floor)


def test_local_names_are_known() -> None:
    """Single labels, localhost, multicast DNS, the clouds' metadata, what networks call themselves, and the operator's
    zones are local. Names that look alike are not."""
    floor = Floor(zones=("corp.example.com",))
    local = ["db", "localhost", "a.localhost", "printer.local", "metadata.google.internal", "nas.lan", "a.home.arpa"]
    assert all(map(floor.refuses_name, [*local, "corp.example.com", "db.corp.example.com"]))
    assert not any(
        map(floor.refuses_name, ["example.com", "local.example", "internal.example.com", "notlocal.co", "lan.example"])
    )
    assert not floor.refuses_name("notcorp.example.com")


def test_the_hosts_networks_are_refused_but_for_exceptions() -> None:
    """A network near the host is as closed as a private one. An exception opens a part of it, but not the host."""
    floor = Floor(
        (IPv4Network("45.67.89.0/29"),), frozenset({IPv4Address("45.67.89.1")}), (IPv4Network("45.67.89.0/24"),)
    )
    refused = [address for address in ("45.67.88.255", "45.67.89.1", "45.67.89.2", "45.67.89.9", "45.67.90.0")
               if floor.refuses(IPv4Address(address))]  # fmt: skip
    assert refused == ["45.67.89.1", "45.67.89.9"]
    assert "can't be allowed" in refusal(["45.67.89.128/25"], floor=floor)


SMALL = st.builds(
    lambda border, offset, length: IPv4Network(((int(border) + offset) % 2**32, length), strict=False),
    st.sampled_from([block[end] for block in DENIED for end in (0, -1)]),
    st.integers(-20, 20),
    st.integers(28, 32),
)
"""Blocks of up to 16 addresses at the floor's borders."""


@given(
    SMALL,
    st.lists(SMALL, max_size=4),
    st.lists(st.integers(-20, 20), max_size=16),
    st.lists(st.tuples(st.integers(-20, 20), st.integers(28, 32)), max_size=3),
)
def test_refuses_all_is_each(
    block: IPv4Network, exceptions: list[IPv4Network], host: list[int], networks: list[tuple[int, int]]
) -> None:
    """A block is refused if each of its addresses is."""

    def beside(offset: int) -> IPv4Address:
        return IPv4Address((int(block[0]) + offset) % 2**32)

    near = tuple(IPv4Network((int(beside(offset)), length), strict=False) for offset, length in networks)
    for ours in (frozenset(map(beside, host)), frozenset(block)):
        floor = Floor(exceptions=tuple(exceptions), host=ours, near=near)
        assert floor.refuses_all(block) is all(floor.refuses(address) for address in block)


# -- what a policy permits


def holds(entries: list[str], address: IPv4Address) -> bool:
    blocks = [IPv4Network(entry) for entry in entries if entry[0].isdigit()]
    return any(address in block for block in blocks)


@given(
    st.booleans(),
    st.lists(BLOCKS.map(str), max_size=4),
    st.lists(BLOCKS.map(str), max_size=4),
    ADDRESSES,
    st.integers(0, 7),
)
def test_addresses(internet: bool, allow: list[str], deny: list[str], address: IPv4Address, which: int) -> None:
    """Allow wins over deny, deny over the default."""
    entries = [*allow, *deny]
    if which < len(entries):  # most addresses are in no block, so take one that is
        address = IPv4Network(entries[which])[0]
    open_floor = Floor(exceptions=(IPv4Network("0.0.0.0/0"),))
    policy = parse(allow, deny, internet=internet, floor=open_floor)
    expected = holds(allow, address) or (internet and not holds(deny, address))
    assert policy.permits_address(address) is expected


@pytest.mark.parametrize(
    ("name", "permitted"),
    [
        ("example.com", True),
        ("www.example.com", None),
        ("a.wild.example", True),
        ("b.a.wild.example", True),
        ("wild.example", None),
        ("notwild.example", None),
        ("bad.wild.example", True),
        ("bad.example.org", False),
        ("example.org", None),
    ],
)
def test_names(name: str, permitted: bool | None) -> None:
    """A star is every name below, not the name itself. Allow wins. Addresses decide about names without a rule."""
    policy = parse(["example.com", "*.wild.example"], ["bad.wild.example", "*.example.org"])
    assert policy.permits_name(name) is permitted


def test_what_restricts() -> None:
    """A policy that only allows restricts nothing, and neither does one about IPv6, which is off anyway."""
    assert not any(policy.restricts for policy in (Policy(), parse(["1.1.1.1", "a.b"]), parse(deny=["::/0"])))
    assert all(policy.restricts for policy in (parse(internet=False), parse(deny=["1.1.1.1"]), parse(deny=["a.b"])))
