"""What a host's routes and its resolv.conf say of its own network."""

from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.network import slots
from kernel_gateway.network.slots import connected, search_domains, system_resolvers


@pytest.mark.parametrize(
    ("route", "blocks"),
    [
        ({"dst": "45.67.89.0/24", "scope": "link"}, ["45.67.89.0/24"]),
        ({"dst": "45.67.89.2", "scope": "link"}, ["45.67.89.2/32"]),  # the other end of a line
        ({"dst": "default", "gateway": "45.67.90.1"}, ["45.67.90.1/32"]),
        ({"dst": "8.8.8.0/24", "gateway": "45.67.90.1"}, ["45.67.90.1/32"]),
        ({"dst": "default", "nexthops": [{"gateway": "45.67.90.1"}, {"dev": "ppp0"}]}, ["45.67.90.1/32"]),
        ({"dst": "default", "scope": "link", "dev": "ppp0"}, []),
        ({"dst": "0.0.0.0/1", "scope": "link", "dev": "tun0"}, []),  # half of everything, as VPNs route it
        ({"dst": "default", "via": {"family": "inet6", "host": "fe80::1"}}, []),
        ({"dst": "10.0.0.0/24", "scope": "link"}, []),  # closed anyway
        ({"dst": "198.18.0.4/30", "scope": "link"}, []),  # a link to a slot
        ({"type": "blackhole", "dst": "9.9.0.0/16"}, []),
    ],
)
def test_networks_near_the_host(route: dict[str, Any], blocks: list[str]) -> None:
    """Connected networks and routers are near, also as parts of a default route over several lines. The way to
    everything else is not."""
    assert connected([route]) == [IPv4Network(block) for block in blocks]


def test_zones_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search domains of resolv.conf are the host's own zones."""
    file = tmp_path / "resolv.conf"
    monkeypatch.setattr(slots, "RESOLV_CONF", file)
    assert (search_domains(), system_resolvers()) == ((), [])
    file.write_text("# search no.example\ndomain corp.example.\n\nnameserver 9.9.9.9\nsearch Corp.Example ads . b@d\n")
    assert search_domains() == ("corp.example", "ads")
    assert system_resolvers() == [("9.9.9.9", 53)]
