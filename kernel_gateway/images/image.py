"""Guest images: from Debian packages and pinned wheels to what a machine boots from.

Built by mmdebstrap with `rootfs/customize.sh` as its hook, as root. Each result lies in a directory named by the hash
of all that went into it, made beside and renamed at the end, because an interrupted build must leave nothing that looks
finished. What was downloaded is kept, whatever happens: the next build goes on from there.
"""

import asyncio
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kernel_gateway.images.cache import SUITE, Cache
from kernel_gateway.images.templates import Template, rootfs_dir

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
SEAL, CHECKED = "files.json", "checked.json"
"""What a directory's files must be, and which ones were found to be so."""

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

    A file is read once after it was written or copied, and then only when its inode has changed.
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
        ended_by: the signal that ends it: SIGKILL for what runs behind `ALONE`.

    Raises:
        BuildError: it failed.
    """
    last: list[str] = []
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
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


def image_key(template: Template, ca_bundle: Path | None) -> str:
    rootfs = rootfs_dir()
    return content_hash(
        rootfs / "debian.txt",
        rootfs / "customize.sh",
        rootfs / "requirements.lock",
        ca_bundle.read_bytes() if ca_bundle else b"",
        SUITE,
        repr((AGENT_PACKAGES, template.debian, template.python)),
    )


async def build_image(template: Template, cache: Cache, ca_bundle: Path | None, step: Progress) -> Path:
    """The folder with `root.erofs`, `boot/` and `packages`, built if the cache has it not.

    Raises:
        BuildError: a step failed.
    """
    directory = cache.root / "images" / image_key(template, ca_bundle)
    if directory.is_dir():
        if not (why := await asyncio.to_thread(damage, directory)):
            return cache.use(directory)
        log.warning("the image is built again, because it is damaged: %s", why)
        cache.drop(directory)
    rootfs = rootfs_dir()
    wheels = cache.root / "wheels" / content_hash(rootfs / "requirements.lock")
    step("download Debian and Python packages")
    with finished(directory) as work:
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(download_wheels(rootfs / "requirements.lock", wheels, step))
                both.create_task(_debian(template, work, cache, wheels, ca_bundle, step))
        except* (BuildError, OSError) as failed:
            raise failed.exceptions[0] from None
        shutil.rmtree(work / "tmp")
        booted = [*(work / "boot/boot").glob("vmlinuz-*"), work / "boot/bin/busybox"]
        modules = modules_in_order(work / "boot/lib/modules")
        await asyncio.to_thread(seal, work, [work / "root.erofs", *booted, *modules])
    return cache.use(directory)


async def _debian(
    template: Template, work: Path, cache: Cache, wheels: Path, ca_bundle: Path | None, step: Progress
) -> None:
    """Make the tree of the guest and what lies beside it, in `work`. The hook waits for the wheels."""
    rootfs, is_root = rootfs_dir(), os.geteuid() == 0
    debs = cache.root / "debs" / SUITE
    debs.mkdir(exist_ok=True)
    debs.touch()
    (work / "tmp").mkdir()
    packages = [line for line in (rootfs / "debian.txt").read_text().split("\n") if line and line[0] != "#"]
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc", "info")]
    await run(
        [
            *(ALONE if is_root else DIES_WITH_US),
            "mmdebstrap", "--mode=unshare", "--variant=minbase", f"--include={','.join(packages + template.debian)}",
            *excluded,
            # Packages are kept outside, in the cache.
            "--skip=essential/unlink,cleanup/apt/cache",
            '--setup-hook=mkdir -p "$1/var/cache/apt/archives" && mount --bind "$DEBS" "$1/var/cache/apt/archives"',
            f"--customize-hook={rootfs / 'customize.sh'}", "--format=null", SUITE,
        ],
        {
            "OUT": str(work),
            "DEBS": str(debs),
            "WHEELS": str(wheels),
            "PYTHON_PACKAGES": " ".join((*AGENT_PACKAGES, *template.python)),
            "CA_BUNDLE": str(ca_bundle or ""),
            "TMPDIR": str(work / "tmp"),
        },
        step,
        ended_by=signal.SIGKILL if is_root else signal.SIGTERM,
    )  # fmt: skip


async def download_wheels(lock: Path, directory: Path, step: Progress) -> None:
    """Fill a folder with every wheel of the lock file, hashes checked. An interrupted download is continued."""
    if directory.is_dir():
        text, wheels = lock.read_text(), list(directory.glob("*.whl"))
        known = set(re.findall(r"sha256:([0-9a-f]{64})", text))
        wanted = len(re.findall(r"^[A-Za-z0-9._-]+(?:\[.*?\])?==", text, re.MULTILINE))
        if len(wheels) == wanted and {await asyncio.to_thread(_sha256, wheel) for wheel in wheels} <= known:
            directory.touch()
            return
        log.warning("Python packages are downloaded again, because a file in %s is damaged", directory)
        shutil.rmtree(directory)
    part = directory.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    platforms = [word for platform in WHEEL_PLATFORMS for word in ("--platform", platform)]
    # pip moves what it has downloaded only at the end: until then its own cache keeps each file that is whole.
    await run(
        [
            *DIES_WITH_US, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
            "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
            "--abi", "abi3", "--abi", "none", *platforms, "--cache-dir", str(part / "pip"), "--dest", str(part),
            "--requirement", str(lock),
        ],
        {"PIP_NO_CACHE_DIR": "0"},
        step,
    )  # fmt: skip
    shutil.rmtree(part / "pip", ignore_errors=True)
    part.rename(directory)


# -- the initramfs


def build_initrd(image: Path, cache: Cache) -> Path:
    """The first file system: busybox, the kernel modules, our init and the agent."""
    rootfs, agent = rootfs_dir(), Path(__file__).parents[2] / "guest_agent"
    key = content_hash(image.name, agent, rootfs / "init", rootfs / "main", repr(MODULES))
    directory = cache.root / "initrd" / key
    if directory.is_dir():
        if not damage(directory):
            return cache.use(directory) / INITRD
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
    for file in sorted(agent.glob("*.py")):
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
