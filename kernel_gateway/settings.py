"""Settings: each field's flag, environment variable, default and meaning in one place."""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kernel_gateway.network.policy import Floor, parse_zone, without_itself

ISOLATIONS = ("auto", "qemu-kvm", "qemu-tcg", "unisolated")
GUEST_PROXY = "http://198.19.0.1:3128"
"""Where sandboxes find the gate, when there is an upstream proxy behind it."""
IN_CLEAR = "set --tls-cert, or listen on 127.0.0.1 and put a proxy with TLS in front"
NETWORKS = ("auto", "netns", "passt", "off")


def _xdg(name: str, fallback: str) -> str:
    return os.path.join(os.environ.get(name) or os.path.join(Path.home(), fallback), "cellvm")


def setting(default: Any, doc: str, **kind: Any) -> Any:
    return field(default=default, metadata={"doc": doc, **kind})


class SettingsError(Exception):
    """A setting has a value it can't have; the text names the setting and its flag."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of `cellvm serve`. A flag wins over its environment variable, `CELLVM_` and the name in capitals."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8888, "Port to listen on; 0 picks a free one.", low=0, high=65535)
    data_dir: str = setting("", "Where keys, the journal and the sandboxes' disks are. Default: ~/.local/share/cellvm.")
    cache_dir: str = setting("", "Where images and snapshots are kept. Default: ~/.cache/cellvm.")
    cache_days: int = setting(
        14, "Days after which a start deletes from the cache what no server has used; 0 keeps all.", low=0, high=3650
    )
    api_key: str = setting("", "A key to accept besides those made by `cellvm keys`.", secret=True)
    templates: str = setting("", "Templates to offer, separated by commas. Default: all there are.")
    template_dir: str = setting("", "Folder of template files. Default: those that come with CellVM.")
    pool_size: int = setting(3, "Machines kept ready for the first template (code_interpreter).", low=0, high=1000)
    max_timeout: int = setting(
        3600, "Seconds that a request may let a sandbox live; beyond, it answers 400.", low=300, high=30 * 86400
    )
    max_sandboxes: int = setting(20, "Sandboxes there may be at once; beyond, creates answer 503.", low=1, high=10000)
    max_sandboxes_per_key: int = setting(
        0, "Sandboxes that one key may have at once; beyond, creates answer 429. 0: all there are.", low=0, high=10000
    )
    max_paused_per_key: int = setting(
        100, "Paused sandboxes that one key may have; beyond, pauses answer 429.", low=1, high=100_000
    )
    max_snapshots_per_key: int = setting(
        100, "Snapshots that one key may have; beyond, taking one answers 429.", low=1, high=100_000
    )
    max_checkpoints_mb: int = setting(
        2048, "MiB of disk that the checkpoints of one sandbox may take; the oldest make room.", low=1, high=10_000_000
    )
    max_creates_per_minute: int = setting(
        600, "Sandboxes that one key may create within a minute; beyond, creates answer 429.", low=1, high=1000000
    )
    max_requests: int = setting(
        1000, "Requests of one key that are answered at once; beyond, they answer 429.", low=1, high=100000
    )
    max_held_mb: int = setting(
        64, "MiB that may wait in the server for one key; beyond, requests answer 429.", low=1, high=100000
    )
    max_held_total_mb: int = setting(
        1024, "MiB that may wait in the server for all keys; beyond, requests answer 503.", low=1, high=1000000
    )
    isolation: str = setting(
        "auto", "auto, qemu-kvm, qemu-tcg, or unisolated (no boundary at all).", choices=ISOLATIONS
    )
    qemu: str = setting("qemu-system-x86_64", "The QEMU program.")
    ca_bundle: str = setting(
        "/etc/ssl/certs/ca-certificates.crt", "CA certificates copied into guests; empty keeps Debian's own."
    )
    extra_ca: str = setting("", "File of CA certificates (PEM) that guests trust besides those of --ca-bundle.")
    network: str = setting(
        "auto", "How sandboxes reach the internet: auto, netns (root), passt, or off (not at all).", choices=NETWORKS
    )
    egress_allow: str = setting(
        "", "Exceptions to the addresses no sandbox may reach: CIDR blocks, separated by commas. Default: none."
    )
    egress_deny: str = setting(
        "", "More addresses that no sandbox may reach: CIDR blocks, separated by commas. Default: none."
    )
    public_address: str = setting(
        "", "Addresses under which others reach this host (NAT), separated by commas; no sandbox may. Default: none."
    )
    dns: str = setting("", "Resolvers that sandboxes' names are looked up with. Default: those of /etc/resolv.conf.")
    local_zones: str = setting(
        "", "Zones that sandboxes never look up, separated by commas. Default: search domains of /etc/resolv.conf."
    )
    upstream_proxy: str = setting("", "HTTP proxy that sandboxes' web traffic goes through, as http://host:port.")
    bandwidth: int = setting(
        0, "Mbit a second that each sandbox may send, and may receive; 0 for no limit.", low=0, high=100_000
    )
    pip_index: str = setting("", "Package index for pip in sandboxes, as a URL. Default: pip's own.")
    webhook_allow: str = setting(
        "",
        "Receivers of webhooks that are on no public network: CIDR blocks, separated by commas. They may use http and "
        "any port. Default: none.",
    )
    domain: str = setting("localhost", "Services in sandboxes are reached as PORT-SANDBOX.DOMAIN.")
    allow_host: str = setting(
        "",
        "Names that clients may call the server by, besides IP addresses, localhost and --domain, separated by commas; "
        "* allows all.",
    )
    strip_headers: str = setting(
        "", "Headers that services in sandboxes do not get, separated by commas; X-Corp-* means all that begin so."
    )
    allow_insecure_emulation: bool = setting(
        False, "Listen beyond this machine though sandboxes are emulated (TCG): QEMU calls that no security boundary."
    )
    kernel_idle_timeout: int = setting(
        3600, "Seconds that a kernel made by a Jupyter client lives on unused and unconnected.", low=60, high=30 * 86400
    )
    mcp_idle_timeout: int = setting(
        1800, "Seconds that a sandbox made by an MCP client lives on after its last call.", low=60, high=3600
    )
    kernel_max_life: int = setting(
        7 * 86400,
        "Seconds after which a kernel made by a Jupyter client ends, whatever it does; 0 for never.",
        low=0,
        high=366 * 86400,
    )
    max_connections: int = setting(
        256, "WebSockets that one key may have open at once; beyond, upgrades answer 429.", low=1, high=100000
    )
    max_message_mb: int = setting(64, "Largest WebSocket message that clients may send, in MiB.", low=1, high=64)
    cors_origins: str = setting(
        "", "Origins whose web pages may use the server, as https://host:port, separated by commas. Default: none."
    )
    base_url: str = setting("/", "Path under which the server lives, for a proxy that passes on one path only.")
    tls_cert: str = setting("", "Certificate file (PEM, with its chain); with it the server speaks HTTPS.")
    tls_key: str = setting("", "The certificate's key file, if it is not in the same file.")
    shutdown_timeout: int = setting(
        10, "Seconds that running requests get when the server is stopped.", low=0, high=600
    )
    at_shutdown: str = setting(
        "pause",
        "What a server that is stopped does with its sandboxes: pause, where it can, or end.",
        choices=("pause", "end"),
    )
    log_level: str = setting("info", "debug, info, warning or error.", choices=("debug", "info", "warning", "error"))

    @property
    def boots_machines(self) -> bool:
        """Whether sandboxes are virtual machines, which need programs, images and a cache."""
        return self.isolation != "unisolated"

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir or _xdg("XDG_DATA_HOME", ".local/share"))

    @property
    def base_path(self) -> str:
        """`base_url` as a prefix: empty, or with a slash in front and none behind."""
        return "/" + self.base_url.strip("/") if self.base_url.strip("/") else ""

    @property
    def origins(self) -> frozenset[str]:
        return frozenset(
            origin.strip().rstrip("/").lower() for origin in self.cors_origins.split(",") if origin.strip()
        )

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names that a request may call the server by, in small letters; None for all there are.

        Raises:
            SettingsError: an entry is no name.
        """
        for name in _listed(self.allow_host):
            if not re.fullmatch(r"[*]|[A-Za-z0-9_.-]+", name):
                raise SettingsError(
                    f"--allow-host takes names as box.example.com, without scheme and port, not {name!r}"
                )
        own = (self.host, self.domain_name)
        named = frozenset(name.lower().rstrip(".") for name in (*own, *_listed(self.allow_host)))
        return None if "*" in named else named

    @property
    def domain_name(self) -> str:
        """The domain without its port, in small letters."""
        return self.domain.partition(":")[0].strip(".").lower()

    @property
    def egress_exceptions(self) -> tuple[IPv4Network, ...]:
        """Blocks that sandboxes may reach though they are on no public network.

        Raises:
            SettingsError: an entry is no IPv4 block, or holds nothing but addresses that mean the host itself.
        """
        blocks = _blocks("--egress-allow", self.egress_allow)
        for block in blocks:
            if not without_itself(block):
                raise SettingsError(f"--egress-allow {block}: these addresses mean the host itself, which stays closed")
        return tuple(part for block in blocks for part in without_itself(block))

    @property
    def webhook_exceptions(self) -> tuple[IPv4Network, ...]:
        """Blocks of addresses that webhooks may be sent to though they are on no public network.

        Raises:
            SettingsError: an entry is no IPv4 block.
        """
        return tuple(_blocks("--webhook-allow", self.webhook_allow))

    @property
    def floor(self) -> Floor:
        """The operator's part of what no sandbox reaches. The host's addresses and networks are added to it.

        Raises:
            SettingsError: an entry is no IPv4 block, no IPv4 address, or no zone.
        """
        try:
            public = frozenset(map(IPv4Address, _listed(self.public_address)))
        except ValueError as error:
            raise SettingsError(f"--public-address takes IPv4 addresses as 8.8.4.4: {error}") from None
        try:
            zones = tuple(map(parse_zone, _listed(self.local_zones)))
        except ValueError as error:
            raise SettingsError(f"--local-zones takes names as corp.example.com: {error}") from None
        return Floor(self.egress_exceptions, public, tuple(_blocks("--egress-deny", self.egress_deny)), zones)

    @property
    def resolvers(self) -> list[tuple[str, int]]:
        """Where names are looked up, as addresses and ports; empty for what the host itself uses.

        Raises:
            SettingsError: an entry is no address with an optional port.
        """
        found = []
        for text in _listed(self.dns):
            address, _, port = text.partition(":")
            try:
                found.append((str(IPv4Address(address)), int(port or 53)))
                if not 0 < found[-1][1] < 65536:
                    raise ValueError(f"no port {port}")
            except ValueError as error:
                raise SettingsError(f"--dns takes IPv4 addresses as 9.9.9.9 or 10.0.0.53:5353: {error}") from None
        return found

    @property
    def proxy(self) -> tuple[str, int] | None:
        """Host and port of the upstream proxy.

        Raises:
            SettingsError: it is not an address of the form http://host:port.
        """
        if not self.upstream_proxy:
            return None
        parts = urlsplit(self.upstream_proxy)
        try:
            port = parts.port or 3128
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port or parts.username is not None or parts.query:
            raise SettingsError("--upstream-proxy takes an address as http://proxy.example:3128")
        return parts.hostname, port

    @property
    def guest_env(self) -> dict[str, str]:
        """What every process in every sandbox is told of the network it is in."""
        env = {"PIP_INDEX_URL": self.pip_index} if self.pip_index else {}
        if self.proxy:
            env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), GUEST_PROXY)
            env |= dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1")
        return env

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir or _xdg("XDG_CACHE_HOME", ".cache"))

    @property
    def ca_path(self) -> Path | None:
        path = Path(self.ca_bundle)
        return path if self.ca_bundle and path.is_file() else None

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """One flag for every setting."""
        for each in fields(cls):
            # A switch may stand alone on the command line; a variable has a value.
            switch: dict[str, Any] = {"nargs": "?", "const": "yes"} if each.type in (bool, "bool") else {}
            parser.add_argument(flag(each), metavar="VALUE", dest=each.name, help=f"{help_text(each)}", **switch)

    @classmethod
    def load(cls, given: Mapping[str, str | None], environment: Mapping[str, str]) -> "Settings":
        """Flags over environment over defaults.

        Raises:
            SettingsError: a value is not what the setting takes.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            text = given.get(each.name)
            source = flag(each)
            if text is None:
                text, source = environment.get(variable(each)), variable(each)
            if text is not None:
                values[each.name] = _parse(each, text, source)
        return cls(**values)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _blocks(source: str, text: str) -> list[IPv4Network]:
    try:
        return [IPv4Network(part) for part in _listed(text)]
    except ValueError as error:
        raise SettingsError(f"{source} takes IPv4 blocks as 10.20.0.0/16: {error}") from None


def _parse(each: "Field[Any]", text: str, source: str) -> Any:
    kind = each.metadata
    if each.type is int or each.type == "int":
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not kind["low"] <= int(text) <= kind["high"]:
            raise SettingsError(f"{source} takes a number from {kind['low']} to {kind['high']}, not {text!r}")
        return int(text)
    if each.type is bool or each.type == "bool":
        if text.lower() not in ("yes", "true", "1", "no", "false", "0", ""):
            raise SettingsError(f"{source} takes yes or no, not {text!r}")
        return text.lower() in ("yes", "true", "1")
    if "choices" in kind and text not in kind["choices"]:
        raise SettingsError(f"{source} takes one of {', '.join(kind['choices'])}, not {text!r}")
    return text


def flag(each: "Field[Any]") -> str:
    return "--" + each.name.replace("_", "-")


def variable(each: "Field[Any]") -> str:
    return "CELLVM_" + each.name.upper()


def help_text(each: "Field[Any]") -> str:
    """What a setting does, its default, and its variable."""
    default = "" if each.default in ("", False) else f" Default: {each.default}."
    return f"{each.metadata['doc']}{default} [{variable(each)}]"
