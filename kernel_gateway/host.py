"""What this host has for a server: programs, KVM, jail, network, space. `cellvm doctor` tells it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from kernel_gateway import certificates
from kernel_gateway.drivers.cgroup import CONTROLLERS
from kernel_gateway.drivers.jail import JailError, check_users, claims_directory, found_groups, tried, working_view
from kernel_gateway.images.build import qemu_version
from kernel_gateway.images.cache import DAY, Cache
from kernel_gateway.images.image import BuildError, Progress, built_at, newest_images, run
from kernel_gateway.kvm import Verdict
from kernel_gateway.network.policy import Floor
from kernel_gateway.network.rules import MAX_HOST_CONNECTIONS as CONNECTIONS
from kernel_gateway.settings import IN_CLEAR, Settings

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "mkfs.ext4": "e2fsprogs",
    "mount": "mount",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "pasta": "passt",
}
"""Programs that building and running need, and the Debian package of each."""
NEEDED_DISK = 6 * 1024**3
"""Free bytes in the cache directory that a first build needs."""


OLD = 30
"""Days after which an image is told to be old."""


def missing_packages(qemu: str) -> list[str]:
    """Debian packages whose programs are not there."""
    programs = {(qemu if name.startswith("qemu") else name): package for name, package in PROGRAMS.items()}
    return [package for program, package in programs.items() if shutil.which(program) is None]


async def install_packages(qemu: str, step: Progress) -> None:
    """Install what is missing with apt, as root; sources are used as they are, never edited.

    Raises:
        BuildError: not root, or apt failed; says what to run.
    """
    packages = missing_packages(qemu)
    if not packages:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() or not shutil.which("apt-get"):
        raise BuildError(f"missing: {', '.join(packages)}. As root, run:\n  {' '.join(command)}")
    step(f"install {', '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    waiting = ["-o", "DPkg::Lock::Timeout=600"]  # another installation may be at work
    await run(["apt-get", *waiting, "update"], quiet, step)
    try:
        await run([*command, *waiting], quiet, step)
    except BuildError as error:
        if "dpkg --configure -a" not in str(error):
            raise
        step("finish an installation that was interrupted")
        await run(["dpkg", "--configure", "-a"], quiet, step)
        await run([*command, *waiting], quiet, step)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `level` is ok, warn or fail; `meaning` says what it means for you and what to do."""

    level: str
    what: str
    meaning: str


def examine(
    settings: Settings, disk_mb: int, kvm: Verdict | str, network: tuple[str, str], floor: Floor
) -> Iterator[Finding]:
    """Look at everything a server needs.

    Args:
        disk_mb: MiB that a sandbox's disk may take.
        kvm: what became of the real guest on KVM, or why it was not tried.
        network: the mechanism that sandboxes' networks would have, and what did not work (`network.slots.choose`).
        floor: what no sandbox reaches, with the host's own addresses and networks (`network.slots.found_floor`).
    """
    missing = missing_packages(settings.qemu)
    if missing:
        command = f"apt-get install --no-install-recommends {' '.join(missing)}"
        yield Finding(
            "fail", f"missing packages: {', '.join(missing)}", f"run `{command}` as root, or `make serve` does"
        )
    else:
        yield Finding("ok", f"QEMU {qemu_version(settings.qemu)} and the build tools are there", "")
    yield kvm_finding(kvm)
    yield from _jail(settings)
    yield from _network(settings, *network, floor)
    yield from _space(settings)
    yield promised(settings, disk_mb)
    yield _cache(settings)
    yield from _images(settings)
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) // 1024
    level = "ok" if available > 4096 else "warn"
    yield Finding(
        level, f"{available} MiB of memory available", "a template holds about 0.7 GB, each sandbox 0.1 GB and up"
    )
    yield swap(memory)
    if not Path("/proc/self/fd").is_dir():
        yield Finding("fail", "/proc is not mounted", "machines get their files through /proc/self/fd")
    yield _port(settings)
    yield from _clear(settings)
    yield from _names(settings)


def swap(memory: Mapping[str, str]) -> Finding:
    """What it means for sandboxes that this host swaps, from /proc/meminfo."""
    size = int(memory["SwapTotal"].split()[0]) // 1024
    if not size:
        return Finding("ok", "no swap", "what sandboxes have in memory is never written to a disk")
    meaning = (
        "memory of sandboxes and keys may be written to its disk, and a busy host is slow: encrypt it, or `swapoff`"
    )
    return Finding("warn", f"{size} MiB of swap", meaning)


def kvm_finding(kvm: Verdict | str) -> Finding:
    """What a verdict on KVM means, or that there is none for this reason."""
    slow = "sandboxes run emulated (TCG): correct, 5 to 20 times slower, and not a security boundary by QEMU's word"
    if isinstance(kvm, str):
        return Finding("warn", f"KVM was not tried: {kvm}", "run `cellvm doctor` again when that has changed")
    if kvm.works:
        return Finding("ok", "KVM: the real guest boots on it", "sandboxes are hardware-isolated and run at full speed")
    return Finding("warn", f"no KVM: {kvm.why}", slow)


def _cache(settings: Settings) -> Finding:
    if not settings.cache_path.is_dir():
        return Finding("ok", f"no cache yet at {settings.cache_path}", "the first start builds it")
    size = sum(entry.size for entry in Cache(settings.cache_path).entries())
    return Finding("ok", f"{size / 2**30:.1f} GiB in the cache {settings.cache_path}", "`cellvm cache list` shows what")


def _images(settings: Settings) -> Iterator[Finding]:
    """How old the images are that servers would use. Debian's security updates of later days are not in them."""
    for path in newest_images(settings.cache_path):
        try:
            days = (time.time() - built_at(path)) / DAY
        except (OSError, ValueError) as error:
            yield Finding("warn", f"{path}: {error}", "the next start builds it again")
            continue
        meaning = "`cellvm build --refresh` takes Debian's security updates since; then start the server again"
        old = days > OLD
        yield Finding("warn" if old else "ok", f"the image {path.name} is {days:.0f} days old", meaning if old else "")


def _jail(settings: Settings) -> Iterator[Finding]:
    is_root = os.geteuid() == 0
    try:
        claims_directory()
        if is_root:
            check_users()
    except JailError as error:
        yield Finding("fail", f"no place to claim users for machines: {error}", "a server can't start")
    try:
        working_view(settings.qemu, kvm=False).close()
    except JailError as error:
        why = "one that broke out could read what everybody may read, and reach the host's network"
        yield Finding("warn", f"machines can't have a view of their own: {error}", why)
        apart = False
    else:
        yield Finding("ok", "a view of their own for machines", "they see QEMU's own files, and no network of the host")
        apart = True
    if is_root:
        yield Finding("ok", "root", "each machine runs as an unprivileged user of its own")
    elif apart:
        why = "all machines run as you, in user namespaces: they see the list of processes, not each other"
        yield Finding("warn", "not root", why)
    else:
        why = "all machines run as you: one that broke out could reach the others, your files and your processes"
        yield Finding("warn", "not root", why)
    groups = found_groups()
    if groups is None:
        why = "no limits of memory, processors and threads: run as root, or as a systemd service with Delegate=yes"
        yield Finding("warn", "no control group can be written", why)
        return
    if why := tried(groups, "cellvm-doctor"):
        yield Finding("warn", f"control groups can't be made: {why}", "no limits of memory, processors and threads")
        return
    missing = [name for name in CONTROLLERS if name not in groups.controllers]
    what = f"control groups, version {groups.version}: {', '.join(groups.controllers)}"
    if missing:
        yield Finding("warn", what, f"machines have no limits of {', '.join(missing)}")
    else:
        yield Finding("ok", what, "each machine's memory, processors and threads are limited")


def _network(settings: Settings, mechanism: str, why: str, floor: Floor) -> Iterator[Finding]:
    if mechanism == "off":
        level = "ok" if settings.network == "off" else "warn"
        yield Finding(level, "sandboxes have no network", why)
        return
    meaning = "public addresses only, through a filter for each" + (f"; {why}" if why else "")
    yield Finding("ok", f"internet for sandboxes by {mechanism}", meaning)
    yield _floor(settings, floor)
    if floor.zones:
        what = f"no sandbox looks up names below {', '.join(floor.zones)}"
        yield Finding("ok", what, "these zones are this host's own by /etc/resolv.conf, or by --local-zones")
    for name in sorted(installs_from(settings)):
        if floor.refuses_name(name):
            meaning = "pip or apt in sandboxes fail; --local-zones names other zones, or an index by its address"
            yield Finding("warn", f"no sandbox looks up {name}, because it is a local name", meaning)
            continue
        refused = [address for address in addresses_of(name) if floor.refuses(address)]
        if not refused:
            continue
        what = f"here {name} is {refused[0]}, which no sandbox reaches"
        if floor.host.intersection(refused):
            yield Finding("warn", what, "pip or apt in sandboxes fail: it is this host itself, which stays closed")
        else:
            allow = ",".join(f"{address}/32" for address in refused)
            meaning = f"pip or apt in sandboxes fail; --egress-allow {allow} lets them, if that address is meant"
            yield Finding("warn", what, meaning)
    if mechanism == "netns" and (most := connections_of_host()) and most < settings.max_sandboxes * CONNECTIONS:
        yield Finding(
            "warn",
            f"the host keeps {most} connections in its list, {settings.max_sandboxes} sandboxes may have more",
            f"when it is full nobody on this host connects any more: sysctl net.netfilter.nf_conntrack_max="
            f"{2 * settings.max_sandboxes * CONNECTIONS}, or a smaller --max-sandboxes",
        )


def _floor(settings: Settings, floor: Floor) -> Finding:
    """What no sandbox reaches of this host's surroundings, besides what is private everywhere."""
    public = sorted(address for address in floor.host if address.is_global)
    listed = ", ".join(map(str, (*public, *floor.near))) or "private and special addresses"
    what = f"no sandbox reaches {listed}"
    if public:
        return Finding("ok", what, "the host's public addresses, its networks, and --egress-deny")
    is_local = settings.host in ("127.0.0.1", "::1", "localhost")
    meaning = "this host has no public address; if others reach it by one (NAT, a cloud), name it by --public-address"
    return Finding("ok" if is_local else "warn", what, meaning)


def connections_of_host() -> int | None:
    """How many connections the host's kernel keeps track of; None where it does not say."""
    try:
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    except (OSError, ValueError):
        return None


def installs_from(settings: Settings) -> set[str]:
    """Hosts that packages come from on this machine, as far as its tools tell."""
    ask = (
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        [sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.url)"],
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"],
    )
    found = settings.pip_index.split()
    for command in ask:
        try:
            found += subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            continue  # no such tool here
    return {host for url in found if (host := urlsplit(url).hostname)}


def addresses_of(name: str) -> list[IPv4Address]:
    """What this machine's own resolver says."""
    try:
        said = subprocess.run(["getent", "ahostsv4", name], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({IPv4Address(line.split()[0]) for line in said.splitlines()})


def _space(settings: Settings) -> Iterator[Finding]:
    for path in (settings.cache_path, settings.data_path):
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        level = "ok" if free > NEEDED_DISK else "fail"
        meaning = "" if level == "ok" else f"a first build needs {NEEDED_DISK >> 30} GiB; choose another directory"
        yield Finding(level, f"{free >> 30} GiB free at {path}", meaning)
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_RDWR))
    except OSError as error:
        yield Finding("fail", f"no nameless files in {path}: {error.strerror}", "choose another --data-dir")


def promised(settings: Settings, disk_mb: int) -> Finding:
    """What all sandboxes together may ask of the disk, beside what it has."""
    path = next(each for each in (settings.data_path, *settings.data_path.parents) if each.exists())
    free, most = shutil.disk_usage(path).free, settings.max_sandboxes * disk_mb << 20
    level = "ok" if most <= free else "warn"
    meaning = (
        "" if level == "ok" else "on a full disk the greatest user is ended; lower --max-sandboxes to exclude that"
    )
    return Finding(level, f"{settings.max_sandboxes} sandboxes may fill {most >> 30} GiB of disk", meaning)


def _clear(settings: Settings) -> Iterator[Finding]:
    if not (settings.tls_cert or _is_loopback(settings.host)):
        yield Finding("warn", f"--host {settings.host} without TLS: keys cross the network in clear", IN_CLEAR)


def _names(settings: Settings) -> Iterator[Finding]:
    """Whether the names of sandboxes lead here, and how long the certificate is good for them."""
    domain = settings.domain_name
    name = f"8000-sandbox.{domain}"
    if certificates.resolves(name):
        yield Finding("ok", f"names below {domain} resolve", f"services are reached as PORT-SANDBOX.{settings.domain}")
    else:
        meaning = "browsers and curl know names below localhost by themselves; for others install libnss-myhostname"
        if not f".{domain}".endswith(".localhost"):
            meaning = f"let *.{domain} lead to this server, in DNS"
        yield Finding("warn", f"names below {domain} do not resolve on this machine", meaning)
    if not settings.tls_cert:
        return
    try:
        certificate = certificates.read(Path(settings.tls_cert))
    except (OSError, ValueError) as error:
        yield Finding("fail", f"--tls-cert {settings.tls_cert} can't be read: {error}", "")
        return
    left = certificates.days_left(certificate)
    if f"*.{domain}" not in certificates.names(certificate):
        meaning = f"programs that use names refuse it; `cellvm certs --domain {settings.domain}` makes one"
        yield Finding("warn", f"the certificate is not for *.{domain}", meaning)
    level = "fail" if left < 0 else "warn" if left < certificates.RENEW else "ok"
    what = f"the certificate is good for {left:.0f} more days" if left >= 0 else "the certificate is no longer valid"
    yield Finding(level, what, "" if level == "ok" else "renew it: `cellvm certs`, if it is of that command")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _port(settings: Settings) -> Finding:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((settings.host, settings.port))
        except OSError as error:
            return Finding("warn", f"{settings.host}:{settings.port}: {error.strerror}", "choose another --port")
    return Finding("ok", f"{settings.host}:{settings.port} is free", "")
