"""Guest images: from Debian packages and pinned wheels to what a machine boots from.

Built by mmdebstrap with `rootfs/customize.sh` as its hook, as root. Each result lies in a directory named by the hash
of all that went into it, made beside and renamed at the end, because an interrupted build must leave nothing that looks
finished. What was downloaded is kept, whatever happens: the next build goes on from there.
"""

import asyncio
import calendar
import gzip
import hashlib
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kernel_gateway.images.cache import ENTRY, SUITE, Cache, in_thread
from kernel_gateway.images.templates import Template, rootfs_dir
from kernel_gateway.private import foreign

log = logging.getLogger(__name__)

AGENT_PACKAGES = ("ipykernel", "msgspec", "pyzmq")
"""Python packages of every guest: the agent and the kernel."""
MODULES = (
    "virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "virtio_net", "ext4", "crc32c_generic", "erofs",
    "overlay",
)  # fmt: skip
"""Kernel modules that the initramfs loads, with all they need."""
WHEEL_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
)  # fmt: skip

INITRD = "initrd.cpio.gz"
AGENT = Path(__file__).parents[2] / "guest_agent"
DIES_WITH_US = ("setpriv", "--pdeathsig=TERM", "--")
"""The prefix of a command that ends when this process is killed."""
ALONE = (
    "setpriv",
    "--pdeathsig=KILL",
    "--",
    "unshare",
    "--mount",
    "--mount-proc",
    "--pid",
    "--fork",
    "--kill-child",
    "--",
)
"""The same for root, in namespaces of its own. With their first process go all others, and all mounts.

`unshare` blocks every signal that asks, so it is killed, and it takes the rest with it.
"""
LIBRARY = "plotly.min.js"
"""The guests' own plotly.js, which lies beside the image of a template with plotly. The web page draws with it."""
SEAL, CHECKED = "files.json", "checked.json"
"""What a directory's files must be, and which ones were found to be so."""

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|APT_CONFIG|SSL_CERT_(FILE|DIR)|(https?|ftp|all|no)_proxy", re.IGNORECASE
)
"""Variables that tools get from the server's environment: what they find the way with, and none of its secrets."""
PIP = re.compile("PIP_.*")
STAMP = "%Y%m%d%H%M%S"

Progress = Callable[[str], None]


class BuildError(Exception):
    """A build step failed; the text says which, and what it printed last."""


def content_hash(*parts: bytes | str | Path) -> str:
    """Sixteen hex digits that change when any part does; a Path stands for the file's or folder's content."""
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "big") + data)

    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
                add(file.name.encode())
                add(file.read_bytes())
        else:
            add(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


@contextmanager
def finished(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory` that takes its name when the block succeeds, and vanishes when it does not."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        work.chmod(0o755)
        yield work
        work.rename(directory)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def seal(directory: Path, files: Iterable[Path]) -> None:
    """Note what these files of a directory are, so that `damage` notices when they are not."""
    digests = {str(file.relative_to(directory)): _sha256(file) for file in files}
    (directory / SEAL).write_bytes(msgspec.json.encode(digests))


def damage(directory: Path) -> str:
    """What is wrong with a sealed directory; empty when nothing is.

    A file is read once after it was written or copied, and then only when its inode has changed. A file that another
    user could write is of no use, whatever it holds.
    """
    try:
        digests = msgspec.json.decode((directory / SEAL).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError) as error:
        return f"{directory / SEAL}: {error}"
    try:
        checked = msgspec.json.decode((directory / CHECKED).read_bytes(), type=dict[str, list[int]])
    except (OSError, msgspec.MsgspecError):
        checked = {}
    found = {}
    for name, digest in digests.items():
        try:
            status = (directory / name).stat()
            if why := foreign(status) or foreign(directory.stat()):
                return f"{directory / name}: it {why}"
            found[name] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            if checked.get(name) != found[name] and _sha256(directory / name) != digest:
                return f"{directory / name}: its content has changed"
        except OSError as error:
            return f"{directory / name}: {error.strerror}"
    if found != checked and os.access(directory, os.W_OK):
        (directory / CHECKED).write_bytes(msgspec.json.encode(found))
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


async def run(
    command: list[str], env: dict[str, str], step: Progress, *, ended_by: signal.Signals = signal.SIGTERM
) -> None:
    """Run a program, passing its lines `step: …` on. Cancelling ends it, and waits until it has cleaned up.

    Args:
        env: its environment, besides what is PASSED_ON.
        ended_by: the signal that ends it: SIGKILL for what runs behind `ALONE`.

    Raises:
        BuildError: it failed.
    """
    last: list[str] = []
    process = await asyncio.create_subprocess_exec(
        *command, env={**_inherited(PASSED_ON), **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async for data in process.stdout:
            line = data.decode("utf-8", "replace").rstrip()
            if line.startswith("step: "):
                step(line.removeprefix("step: "))
            last = [*last[-20:], line]
    except BaseException:
        # In a session of its own, so that Ctrl-C reaches only us: the tool is told once, and cleans up behind itself.
        process.send_signal(ended_by)
        await process.wait()
        raise
    if await process.wait():
        raise BuildError(f"{command[0]} failed with status {process.returncode}:\n" + "\n".join(last))


def _inherited(names: re.Pattern[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if names.fullmatch(name)}


def without_comments(file: Path) -> list[str]:
    """A file's lines, but for blank ones and those that begin with `#` (`#!` counts), because they change no image."""
    return [line for line in file.read_text().splitlines() if not re.match(r"\s*(#(?!!)|$)", line)]


def locked(packages: Iterable[str]) -> str:
    """The part of the guests' lock file that holds these packages and all that they need.

    Raises:
        BuildError: the lock file has no such package.
    """
    pins, needed_by = {}, {}
    for block in re.split(r"^(?=\S)", (rootfs_dir() / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]:
        name = block.partition("==")[0]
        pins[name], _, others = block.partition("    # via ")
        needed_by[name] = set(others.strip().split(", "))
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", package)[0]).lower() for package in packages}
    if unknown := wanted - pins.keys():
        raise BuildError(
            f"rootfs/requirements.lock has no {', '.join(sorted(unknown))}: add what is missing to "
            "rootfs/requirements.in, and run `make lock`"
        )
    while more := {name for name, others in needed_by.items() if others & wanted} - wanted:
        wanted |= more
    return "".join(pin for name, pin in pins.items() if name in wanted)


def python_packages(template: Template) -> list[str]:
    """What a template's virtual environment is asked to hold."""
    return [*AGENT_PACKAGES, *template.python]


def image_key(template: Template, ca_bundle: Path | None) -> str:
    """The name of a template's image.

    Raises:
        BuildError: the lock file lacks a package of the template.
    """
    rootfs = rootfs_dir()
    packages = python_packages(template)
    beside = (LIBRARY,) if "plotly" in packages else ()
    return content_hash(
        "\n".join(without_comments(rootfs / "customize.sh")),
        locked(packages),
        ca_bundle.read_bytes() if ca_bundle else b"",
        SUITE,
        repr((without_comments(rootfs / "debian.txt"), template.debian, packages, *beside)),
    )


def newest_image(template: Template, cache: Cache, ca_bundle: Path | None) -> Path | None:
    """The folder of a template's newest image; None if the cache has none.

    Two images of one key differ, because Debian's packages are those of the day. Each has a name of its own, so that
    nothing that was made from one is taken for the other's.
    """
    key = image_key(template, ca_bundle)
    return next((path for path in newest_images(cache.root) if path.name[-16:] == key), None)


def newest_images(root: Path) -> list[Path]:
    """The newest image of each key in a cache directory."""
    folder = root / "images"
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if ENTRY.fullmatch(path.name)]
    # A later one replaces an earlier one; names without a time are the oldest.
    return list(
        {path.name[-16:]: path for path in sorted(found, key=lambda path: (len(path.name), path.name))}.values()
    )


def library(root: Path) -> Path | None:
    """The newest plotly.js that lies beside an image in a cache directory."""
    found = (image / LIBRARY for image in sorted(newest_images(root), key=built_at, reverse=True))
    return next((path for path in found if path.is_file()), None)


def built_at(image: Path) -> float:
    """When an image was built, in seconds since 1970."""
    stamp = image.name.rpartition("-")[0]
    return calendar.timegm(time.strptime(stamp, STAMP)) if stamp else (image / "packages").stat().st_mtime


async def build_image(
    template: Template, cache: Cache, ca_bundle: Path | None, step: Progress, *, anew: bool = False
) -> Path:
    """The folder with `root.erofs`, `boot/`, `packages` and perhaps LIBRARY, built if the cache has it not.

    Args:
        anew: build one in any case, of the Debian packages of today.

    Raises:
        BuildError: a step failed.
    """
    found = newest_image(template, cache, ca_bundle)
    if found is not None and not anew:
        if not (why := await in_thread(damage, found)):
            return cache.use(found)
        log.warning("the image is built again, because it is damaged: %s", why)
        cache.drop(found)
    name = f"{time.strftime(STAMP, time.gmtime())}-{image_key(template, ca_bundle)}"
    directory = cache.root / "images" / name
    requirements = locked(python_packages(template))
    wheels = cache.root / "wheels" / content_hash(requirements)
    step("download Debian and Python packages")
    with finished(directory) as work:
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(download_wheels(requirements, wheels, step))
                both.create_task(_debian(template, work, cache, wheels, ca_bundle, step))
        except* (BuildError, OSError) as failed:
            raise failed.exceptions[0] from None
        shutil.rmtree(work / "tmp")
        booted = [*(work / "boot/boot").glob("vmlinuz-*"), work / "boot/bin/busybox"]
        modules = modules_in_order(work / "boot/lib/modules")
        beside = await in_thread(copy_library, wheels, work)
        await in_thread(seal, work, [work / "root.erofs", *booted, *modules, *beside])
    return cache.use(directory)


def copy_library(wheels: Path, directory: Path) -> list[Path]:
    """Copy plotly.js out of its wheel, if there is one, and return the copy."""
    made = directory / LIBRARY
    for wheel in wheels.glob("plotly-*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            made.write_bytes(packed.read(f"plotly/package_data/{LIBRARY}"))
        return [made]
    return []


async def _debian(
    template: Template, work: Path, cache: Cache, wheels: Path, ca_bundle: Path | None, step: Progress
) -> None:
    """Make the tree of the guest and what lies beside it, in `work`. The hook waits for the wheels."""
    rootfs, is_root = rootfs_dir(), os.geteuid() == 0
    debs = cache.root / "debs" / SUITE
    debs.mkdir(exist_ok=True)
    debs.touch()
    (work / "tmp").mkdir()
    packages = without_comments(rootfs / "debian.txt") + template.debian
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc", "info")]
    command = [
        *(ALONE if is_root else DIES_WITH_US),
        "mmdebstrap", "--mode=unshare", "--variant=minbase", f"--include={','.join(packages)}", *excluded,
        # Packages are kept outside, in the cache.
        "--skip=essential/unlink,cleanup/apt/cache",
        '--setup-hook=mkdir -p "$1/var/cache/apt/archives" && mount --bind "$DEBS" "$1/var/cache/apt/archives"',
        f"--customize-hook={rootfs / 'customize.sh'}", "--format=null", SUITE,
    ]  # fmt: skip
    env = {
        "OUT": str(work),
        "DEBS": str(debs),
        "WHEELS": str(wheels),
        "PYTHON_PACKAGES": " ".join(python_packages(template)),
        "CA_BUNDLE": str(ca_bundle or ""),
        "TMPDIR": str(work / "tmp"),
    }
    ended_by = signal.SIGKILL if is_root else signal.SIGTERM
    try:
        await run(command, env, step, ended_by=ended_by)
    except BuildError:
        damaged = await in_thread(drop_damaged, debs)
        if not damaged:
            raise
        log.warning("Debian packages are downloaded again, because they are damaged: %s", ", ".join(damaged))
        await run(command, env, step, ended_by=ended_by)


def drop_damaged(debs: Path) -> list[str]:
    """Delete the Debian packages that can't be unpacked, and tell which.

    apt checks what it downloads. Afterwards it takes every file of the right size for whole, so such a package would
    fail each build.
    """
    damaged = []
    for file in sorted(debs.glob("*.deb")):
        for part in ("--ctrl-tarfile", "--fsys-tarfile"):
            if subprocess.run(
                ["dpkg-deb", part, file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ).returncode:
                file.unlink()
                damaged.append(file.name)
                break
    return damaged


async def download_wheels(requirements: str, directory: Path, step: Progress) -> None:
    """Fill a folder with the wheels of a lock file's text, hashes checked. An interrupted download is continued."""
    if directory.is_dir():
        wheels = list(directory.glob("*.whl"))
        known = set(re.findall(r"sha256:([0-9a-f]{64})", requirements))
        wanted = len(re.findall(r"^\S+==", requirements, re.MULTILINE))
        if len(wheels) == wanted and {await in_thread(_sha256, wheel) for wheel in wheels} <= known:
            directory.touch()
            return
        log.warning("Python packages are downloaded again, because a file in %s is damaged", directory)
        shutil.rmtree(directory)
    part = directory.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    (part / "requirements.txt").write_text(requirements)
    platforms = [word for platform in WHEEL_PLATFORMS for word in ("--platform", platform)]
    # pip moves what it has downloaded only at the end: until then its own cache keeps each file that is whole.
    await run(
        [
            *DIES_WITH_US, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
            "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
            "--abi", "abi3", "--abi", "none", *platforms, "--cache-dir", str(part / "pip"), "--dest", str(part),
            "--requirement", str(part / "requirements.txt"),
        ],
        {**_inherited(PIP), "PIP_NO_CACHE_DIR": "0"},
        step,
    )  # fmt: skip
    shutil.rmtree(part / "pip", ignore_errors=True)
    part.rename(directory)


# -- the initramfs


def _initrd_directory(image: Path, cache: Cache) -> Path:
    rootfs = rootfs_dir()
    key = content_hash(image.name, AGENT, rootfs / "init", rootfs / "main", repr(MODULES))
    return cache.root / "initrd" / key


def initrd_there(image: Path, cache: Cache) -> Path | None:
    """The first file system of an image, if the cache has it whole."""
    directory = _initrd_directory(image, cache)
    return None if not directory.is_dir() or damage(directory) else cache.use(directory) / INITRD


def build_initrd(image: Path, cache: Cache) -> Path:
    """The first file system: busybox, the kernel modules, our init and the agent."""
    if found := initrd_there(image, cache):
        return found
    rootfs, directory = rootfs_dir(), _initrd_directory(image, cache)
    if directory.is_dir():
        cache.drop(directory)
    archive = Cpio()
    archive.add("init", (rootfs / "init").read_bytes(), 0o755)
    archive.add("main", (rootfs / "main").read_bytes(), 0o755)
    archive.add("bin/busybox", (image / "boot/bin/busybox").read_bytes(), 0o755)
    order = []
    for module in modules_in_order(image / "boot/lib/modules"):
        order.append(module.name)
        archive.add(f"modules/{module.name}", module.read_bytes())
    archive.add("modules/order", "".join(f"{name}\n" for name in order).encode())
    for file in sorted(AGENT.glob("*.py")):
        archive.add(f"agent/guest_agent/{file.name}", file.read_bytes())
    with finished(directory) as work:
        (work / INITRD).write_bytes(gzip.compress(archive.close(), 6, mtime=0))
        (work / INITRD).chmod(0o644)  # machines' users read it, whatever the umask
        seal(work, [work / INITRD])
    return cache.use(directory) / INITRD


def modules_in_order(directory: Path) -> list[Path]:
    """Files of MODULES and of all they need, each after what it needs; built-in ones are left out."""
    (version,) = directory.iterdir()
    files = {file.name.split(".ko")[0].replace("-", "_"): file for file in version.rglob("*.ko")}
    ordered: list[Path] = []

    def add(name: str) -> None:
        file = files.get(name.replace("-", "_"))
        if file is not None and file not in ordered:
            for needed in dependencies(file):
                add(needed)
            ordered.append(file)

    for module in MODULES:
        add(module)
    return ordered


def dependencies(module: Path) -> list[str]:
    """What a kernel module says it needs (its `depends=` line)."""
    data = module.read_bytes()
    start = data.find(b"depends=")
    names = data[start + 8 : data.find(b"\0", start)].decode() if start >= 0 else ""
    return [name for name in names.split(",") if name]


class Cpio:
    """Writes a "newc" archive, the format of an initramfs (kernel: Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._known: set[str] = set()

    def add(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A file, with the folders it lies in."""
        for parent in reversed(Path(name).parents):
            if str(parent) not in (".", *self._known):
                self._known.add(str(parent))
                self._entry(str(parent), b"", stat.S_IFDIR | 0o755)
        self._entry(name, content, stat.S_IFREG | mode)

    def close(self) -> bytes:
        self._entry("TRAILER!!!", b"", 0)
        return bytes(self._data)

    def _entry(self, name: str, content: bytes, mode: int) -> None:
        fields: Iterable[int] = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._data += bytes(-len(self._data) % 4) + content
        self._data += bytes(-len(self._data) % 4)
