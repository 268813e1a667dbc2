"""Settings: their sources, refused values, and their place in help and documentation."""

import argparse
import re
from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from kernel_gateway.network.policy import Floor
from kernel_gateway.settings import Settings, SettingsError, flag, variable

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [each.name for each in fields(Settings)]


def load(flags: dict[str, str] | None = None, **environment: str) -> Settings:
    return Settings.load(flags or {}, {f"CELLVM_{name}": value for name, value in environment.items()})


def test_a_flag_wins_over_its_variable_and_that_over_the_default() -> None:
    """A flag wins over a variable, and a variable over the default. This holds for numbers and for empty texts."""
    assert load().port == 8888
    assert load(PORT="9000").port == 9000
    assert load({"port": "9001"}, PORT="9000").port == 9001
    assert load({"ca_bundle": ""}, CA_BUNDLE="/x").ca_bundle == ""
    assert load(CA_BUNDLE="").ca_path is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"), ("port", "-1"), ("port", "eighty"), ("port", ""), ("port", "8_0"), ("port", "1e3"),
        ("port", "9" * 5000), ("port", "٣"), ("port", " 80"), ("pool_size", "-1"), ("pool_size", "1001"),
        ("max_sandboxes", "0"), ("max_sandboxes", "10001"), ("isolation", "docker"), ("isolation", ""),
        ("bandwidth", "-1"), ("bandwidth", "100001"),
        ("log_level", "loud"), ("shutdown_timeout", "601"), ("shutdown_timeout", "1.5"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(name: str, value: str) -> None:
    """The message names the flag, or the variable if the value came from the variable."""
    with pytest.raises(SettingsError, match=re.escape("--" + name.replace("_", "-"))):
        Settings.load({name: value}, {})
    with pytest.raises(SettingsError, match=f"CELLVM_{name.upper()}"):
        Settings.load({}, {f"CELLVM_{name.upper()}": value})


def test_limits_are_allowed_themselves() -> None:
    """A range includes its smallest and its largest number."""
    assert load(PORT="0", MAX_SANDBOXES="1", POOL_SIZE="0").port == 0
    assert load(PORT="65535", MAX_SANDBOXES="10000", POOL_SIZE="1000").pool_size == 1000


def test_settings_of_the_network_are_read_strictly() -> None:
    """Blocks, resolvers and a proxy are read, or the refusal names the flag."""
    good = load(
        EGRESS_ALLOW="10.1.0.0/16, 192.168.7.9", DNS="9.9.9.9, 10.0.0.53:5353", UPSTREAM_PROXY="http://proxy:8080"
    )
    assert good.egress_exceptions == (IPv4Network("10.1.0.0/16"), IPv4Network("192.168.7.9/32"))
    assert good.resolvers == [("9.9.9.9", 53), ("10.0.0.53", 5353)]
    assert good.proxy == ("proxy", 8080)
    assert good.guest_env["https_proxy"] == "http://198.19.0.1:3128"
    assert load(PIP_INDEX="https://index.example/simple").guest_env == {"PIP_INDEX_URL": "https://index.example/simple"}
    for text in (
        "10.1.2.3/16",
        "10.1",
        "::1",
        "example.com",
        "10.0.0.0/33",
        "127.0.0.0/8",
        "0.0.0.0/32",
        "127.8.0.0/16",
    ):
        with pytest.raises(SettingsError, match="--egress-allow"):
            _ = load(EGRESS_ALLOW=text).egress_exceptions
    wide = Floor(load(EGRESS_ALLOW="0.0.0.0/0").egress_exceptions)
    refused = ("0.0.0.0", "0.255.255.255", "127.0.0.1", "127.255.255.255")
    assert all(wide.refuses(IPv4Address(address)) for address in refused), "no exception covers the host itself"
    assert not any(wide.refuses(IPv4Address(address)) for address in ("1.0.0.0", "10.1.2.3", "126.9.9.9", "128.0.0.0"))
    floor = load(EGRESS_DENY="45.67.89.0/24,8.8.8.8", PUBLIC_ADDRESS="93.184.215.99, 8.8.4.4").floor
    assert floor.near == (IPv4Network("45.67.89.0/24"), IPv4Network("8.8.8.8/32"))
    assert floor.host == {IPv4Address("93.184.215.99"), IPv4Address("8.8.4.4")}
    assert load(LOCAL_ZONES=".Corp.example.com., ads").floor.zones == ("corp.example.com", "ads")
    for name, text in (
        ("local-zones", "*.example.com"),
        ("egress-deny", "45.67.89.1/24"),
        ("egress-deny", "example.com"),
        ("public-address", "8.8.4.0/24"),
    ):
        with pytest.raises(SettingsError, match=f"--{name}"):
            _ = load(**{name.replace("-", "_").upper(): text}).floor
    for text in ("example.com", "9.9.9.9:x", "9.9.9.9:70000", "::1"):
        with pytest.raises(SettingsError, match="--dns"):
            _ = load(DNS=text).resolvers
    for text in ("proxy:3128", "https://proxy:3128", "http://", "http://proxy:x", "http://me:secret@proxy:3128"):
        with pytest.raises(SettingsError, match="--upstream-proxy"):
            _ = load(UPSTREAM_PROXY=text).proxy


def test_a_switch_needs_no_value() -> None:
    """A yes-or-no setting may stand alone as a flag, or have a value. Other words are refused."""
    parser = argparse.ArgumentParser()
    Settings.add_flags(parser)
    for words, meant in (
        (["--allow-insecure-emulation"], True),
        (["--allow-insecure-emulation", "no"], False),
        ([], False),
    ):
        assert Settings.load(vars(parser.parse_args(words)), {}).allow_insecure_emulation is meant
    with pytest.raises(SettingsError, match="yes or no"):
        load(ALLOW_INSECURE_EMULATION="perhaps")


def test_every_setting_is_in_help() -> None:
    """`--help` lists each setting's flag, variable and meaning."""
    parser = argparse.ArgumentParser(prog="cellvm serve")
    Settings.add_flags(parser)
    text = " ".join(parser.format_help().split())
    for each in fields(Settings):
        assert re.search(rf"{flag(each)} \[?VALUE", text)
        assert f"[{variable(each)}]" in text
        assert each.metadata["doc"].split()[0] in text


def test_every_flag_is_parsed_to_its_setting() -> None:
    """The value of a flag arrives in the setting of that name."""
    parser = argparse.ArgumentParser()
    Settings.add_flags(parser)
    given = vars(parser.parse_args(["--max-sandboxes", "7", "--data-dir=/d", "--isolation", "unisolated"]))
    assert set(given) == set(NAMES)
    settings = Settings.load(given, {"CELLVM_MAX_SANDBOXES": "9"})
    assert (settings.max_sandboxes, settings.data_dir, settings.isolation) == (7, "/d", "unisolated")


def test_every_setting_is_in_the_documentation() -> None:
    """The table of docs/settings.md has a row for each setting, with its variable, and no other rows."""
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(\w+)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert rows == [(flag(each), variable(each)) for each in fields(Settings)]


def test_where_things_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and cache follow the XDG variables, and the settings win over them."""
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg/cache")
    assert (load().data_path, load().cache_path) == (Path("/xdg/data/cellvm"), Path("/xdg/cache/cellvm"))
    assert load(DATA_DIR="/mine").data_path == Path("/mine")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert load().data_path == Path.home() / ".local/share/cellvm"


def test_names_of_the_server() -> None:
    """They are those of --allow-host, --host and --domain, in small letters. An address is no name."""
    assert load(DOMAIN="Box.Example.com:8443").hosts == {"127.0.0.1", "box.example.com"}
    assert load(ALLOW_HOST="A.example,b.example.").hosts == {"127.0.0.1", "localhost", "a.example", "b.example"}
    assert load(ALLOW_HOST="a.example,*").hosts is None
    for wrong in ("https://a.example", "a.example:443", "*.example.com", "a b"):
        with pytest.raises(SettingsError, match="--allow-host"):
            _ = load(ALLOW_HOST=wrong).hosts
