"""The findings of `cellvm doctor` about the network."""

import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway import host
from kernel_gateway.host import Finding, _images, _network, promised, swap
from kernel_gateway.network.policy import Floor
from kernel_gateway.settings import Settings


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose names lead to two addresses, one of them private."""
    program = tmp_path / "getent"
    program.write_text("#!/bin/sh\necho 10.9.8.7 STREAM $2\necho 10.9.8.7 DGRAM\necho 93.184.215.14 STREAM $2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


OWN = Floor(host=frozenset({IPv4Address("45.67.89.1")}), near=(IPv4Network("45.67.89.0/24"),))


def found(**settings: Any) -> list[Finding]:
    wanted = Settings(pip_index="https://index.example.net/simple", **settings)
    floor = replace(OWN, exceptions=wanted.egress_exceptions)
    return list(_network(wanted, "netns", "", floor))


@pytest.mark.usefixtures("resolver")
def test_names_of_denied_addresses_are_noticed() -> None:
    """If the host's resolver gives a name a denied address, doctor suggests the exception."""
    (index,) = [each for each in found() if "index.example.net" in each.what]
    assert index.level == "warn"
    assert "10.9.8.7" in index.what
    assert "--egress-allow 10.9.8.7/32 " in index.meaning
    assert [each.level for each in found(egress_allow="10.9.0.0/16")] == ["ok", "ok"]


@pytest.mark.usefixtures("resolver")
def test_what_is_closed_round_the_host_is_told() -> None:
    """Doctor lists the host's public addresses and networks. Without any it asks for the one behind the NAT, as a
    warning where the server listens beyond the machine."""
    assert [each.what for each in found() if "45.67.89.1, 45.67.89.0/24" in each.what]
    for listens, level in (("127.0.0.1", "ok"), ("0.0.0.0", "warn")):
        private = Floor(host=frozenset({IPv4Address("10.0.0.5")}))
        (finding,) = [
            each for each in _network(Settings(host=listens), "netns", "", private) if each.what.startswith("no")
        ]
        assert (finding.level, "--public-address" in finding.meaning) == (level, True)


def test_local_zones_are_told() -> None:
    """Doctor names the zones that no sandbox looks up, and warns if packages come from one of them."""
    floor = Floor(zones=("example.net",))
    told = list(_network(Settings(pip_index="https://index.example.net/simple"), "netns", "", floor))
    assert [each.level for each in told if "example.net" in each.what] == ["ok", "warn"]


@pytest.mark.parametrize(("total", "level"), [("0 kB", "ok"), ("2097148 kB", "warn")])
def test_swap_is_told(total: str, level: str) -> None:
    """Doctor warns of swap, because it writes the memory of sandboxes to a disk."""
    assert swap({"SwapTotal": f"    {total}"}).level == level


def test_the_age_of_images_is_told(tmp_path: Path) -> None:
    """Doctor tells how old the newest image of each recipe is, and warns of one that lacks a month of updates."""
    names = ("0123456789abcdef", "20250101000000-0123456789abcdef", "20240101000000-fedcba9876543210")
    for name in (*names, time.strftime("%Y%m%d%H%M%S-fedcba9876543210", time.gmtime())):
        (tmp_path / "images" / name).mkdir(parents=True)
    old, young = _images(Settings(cache_dir=str(tmp_path)))
    assert (old.level, "--refresh" in old.meaning, names[1] in old.what) == ("warn", True, True)
    assert (young.level, "is 0 days old" in young.what) == ("ok", True)


def test_no_network_is_said() -> None:
    """A network that can't work is a warning with its reason. A network that was switched off is fine."""
    (finding,) = _network(Settings(), "off", "netns: no nft", OWN)
    assert (finding.level, finding.meaning) == ("warn", "netns: no nft")
    (finding,) = _network(Settings(network="off"), "off", "switched off", OWN)
    assert finding.level == "ok"


def test_an_index_on_the_host_itself_can_not_be_excepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor suggests no exception for the host's own address, because it would not help."""
    (tmp_path / "getent").write_text("#!/bin/sh\necho 45.67.89.1 STREAM $2\n")
    (tmp_path / "getent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (index,) = [each for each in found() if "index.example.net" in each.what]
    assert (index.level, "--egress-allow" in index.meaning) == ("warn", False)


@pytest.mark.usefixtures("resolver")
def test_more_sandboxes_than_the_host_can_count_connections_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor warns, because all sandboxes share the host's list of connections."""
    monkeypatch.setattr(host, "connections_of_host", lambda: 65_536)
    assert not [each for each in found(max_sandboxes=20) if "connections" in each.what]
    (finding,) = [each for each in found(max_sandboxes=40) if "connections" in each.what]
    assert "nf_conntrack_max=200000" in finding.meaning


def test_what_is_promised_is_told(tmp_path: Path) -> None:
    """Doctor adds up the disks of all sandboxes, and warns if the host has less."""
    settings = Settings(data_dir=str(tmp_path / "not" / "yet"), max_sandboxes=4)
    assert promised(settings, 1) == Finding("ok", "4 sandboxes may fill 0 GiB of disk", "")
    much = promised(settings, 1 << 30)
    assert (much.level, much.what) == ("warn", "4 sandboxes may fill 4194304 GiB of disk")
    assert "--max-sandboxes" in much.meaning


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "tls_cert": "cert.pem"}, False),
        ({"host": "box.example.com"}, True),
    ],
)
def test_keys_in_clear_are_noticed(settings: dict[str, Any], warns: bool) -> None:
    """Doctor warns of a server that other machines reach without TLS."""
    assert [each.level for each in host._clear(Settings(**settings))] == ["warn"] * warns
