"""Parts of the image builder that need no build: the archive, hashes, kernel modules and templates."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from kernel_gateway.__main__ import refresh_images
from kernel_gateway.images import image
from kernel_gateway.images.cache import Cache
from kernel_gateway.images.image import (
    LIBRARY,
    BuildError,
    Cpio,
    build_image,
    built_at,
    content_hash,
    copy_library,
    dependencies,
    drop_damaged,
    finished,
    image_key,
    library,
    locked,
    modules_in_order,
    newest_image,
    python_packages,
    without_comments,
)
from kernel_gateway.images.templates import Template, Templates, rootfs_dir
from tests.fakes import eventually


def parse(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A newc archive read by hand: name → (mode, content)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = at + 110 + name_size
        start += -start % 4
        if name == b"TRAILER!!!\0":
            assert start == len(archive)
            return found
        assert name[:-1].decode() not in found, "twice"
        assert fields[2:4] == [0, 0], "owned by root"
        found[name[:-1].decode()] = (mode, archive[start : start + size])
        at = start + size + -size % 4


def test_the_archive_reads_back() -> None:
    """Files of every length modulo four are archived. Each of their folders comes once, and before its files."""
    archive = Cpio()
    contents = {"init": b"#!x", "a/b/c1": b"", "a/b/c2": b"1", "a/d": b"22", "module/" + "x" * 99: b"333" * 1000}
    for name, content in contents.items():
        archive.add(name, content, 0o755 if name == "init" else 0o644)
    found = parse(archive.close())
    assert {name: content for name, (mode, content) in found.items() if stat.S_ISREG(mode)} == contents
    assert [name for name, (mode, _) in found.items() if stat.S_ISDIR(mode)] == ["a", "a/b", "module"]
    order = list(found)
    assert order.index("a") < order.index("a/b") < order.index("a/b/c1")
    assert stat.S_IMODE(found["init"][0]) == 0o755
    assert stat.S_IMODE(found["a/d"][0]) == 0o644


def test_the_same_content_is_the_same_archive() -> None:
    """The archive contains no time and no counter, so it can be cached by a hash of its sources."""
    archives = []
    for _ in range(2):
        archive = Cpio()
        archive.add("a/b", b"1")
        archives.append(archive.close())
    assert archives[0] == archives[1]


def test_a_hash_sees_every_part(tmp_path: Path) -> None:
    """Another text, order, split, file content or file name gives another hash."""
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.py").write_text("1")
    hashes = [
        content_hash("ab"),
        content_hash("a", "b"),
        content_hash("b", "a"),
        content_hash("", "ab"),
        content_hash(tmp_path / "a.py"),
        content_hash(tmp_path / "b.py"),
        content_hash(tmp_path / "folder"),
    ]
    (tmp_path / "folder/x.py").write_text("2")
    hashes.append(content_hash(tmp_path / "folder"))
    assert len(set(hashes)) == len(hashes)
    assert content_hash("ab") == content_hash(b"ab") == hashes[0]


TEMPLATE = Template(id="t", description="", vcpus=1, memory_mb=1, disk_mb=1, debian=["tree"], python=["numpy"])


@pytest.fixture
def rootfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recipes, which a test may change."""
    shutil.copytree(rootfs_dir(), tmp_path / "rootfs")
    monkeypatch.setattr(image, "rootfs_dir", lambda: tmp_path / "rootfs")
    return tmp_path / "rootfs"


@pytest.mark.parametrize("name", ["customize.sh", "debian.txt"])
def test_comments_change_no_image(rootfs: Path, name: str) -> None:
    """A comment or a blank line more is the same image. Another line, order or interpreter is another one."""
    file, before = rootfs / name, image_key(TEMPLATE, None)
    whole = file.read_text()
    first, rest = whole.split("\n", 1)
    file.write_text(f"{first}\n# a comment\n\n   # another\n#\n{rest}\n\n")
    assert image_key(TEMPLATE, None) == before
    for other in (f"{whole}more\n", f"#!/bin/other\n{whole}", whole.replace("\nc", "\nd")):
        file.write_text(other)
        assert image_key(TEMPLATE, None) != before


def test_what_an_image_is_named_by(rootfs: Path, tmp_path: Path) -> None:
    """Packages and certificates count. Of the lock file only what the template needs counts, and no remark in it."""
    (tmp_path / "ca.pem").write_text("certificate")
    keys = [
        image_key(TEMPLATE, None),
        image_key(TEMPLATE, tmp_path / "ca.pem"),
        image_key(msgspec.structs.replace(TEMPLATE, debian=[]), None),
        image_key(msgspec.structs.replace(TEMPLATE, python=[]), None),
    ]
    lock = rootfs / "requirements.lock"
    whole = lock.read_text()
    for old, new in (("\npandas==", "\npandas==9"), ("    # via ipython\n", "    # via ipython, pandas\n")):
        assert old in whole
        lock.write_text(whole.replace(old, new))
        assert image_key(TEMPLATE, None) == keys[0]
    lock.write_text(whole.replace("\nnumpy==", "\nnumpy==9"))
    keys.append(image_key(TEMPLATE, None))
    assert len(set(keys)) == len(keys)


LOCK = """a==1 \\
    --hash=sha256:aa
    # via -r rootfs/requirements.in
b-b==2 \\
    --hash=sha256:bb \\
    --hash=sha256:b2
    # via a, c
c==3 \\
    --hash=sha256:cc
    # via b-b
d==4 \\
    --hash=sha256:dd
    # via -r rootfs/requirements.in, a-d
"""


def test_what_a_package_needs(rootfs: Path) -> None:
    """The part of the lock file is complete, through circles too, and holds nothing else."""
    (rootfs / "requirements.lock").write_text(LOCK)
    pins = ["a==1 \\\n    --hash=sha256:aa\n", "b-b==2 \\\n    --hash=sha256:bb \\\n    --hash=sha256:b2\n"]
    pins.append("c==3 \\\n    --hash=sha256:cc\n")
    assert locked(["a"]) == "".join(pins)
    assert locked(["B_b[extra]>=1"]) == "".join(pins[1:])
    assert locked(["d"]) == "d==4 \\\n    --hash=sha256:dd\n"
    assert locked([]) == ""
    with pytest.raises(BuildError, match=r"requirements\.lock has no e, f: add what is missing .* `make lock`"):
        locked(["a", "f", "e"])


def test_the_lock_file_is_whole() -> None:
    """All packages of all templates make the whole file: each pin is needed, and each need has a pin."""
    wanted = without_comments(rootfs_dir() / "requirements.in")
    pins = [line for line in (rootfs_dir() / "requirements.lock").read_text().splitlines() if "==" in line]
    assert [line for line in locked(wanted).splitlines() if "==" in line] == pins
    few = locked(image.AGENT_PACKAGES)
    assert "ipython==" in few
    assert "numpy==" not in few


def test_damaged_debian_packages_are_dropped(tmp_path: Path) -> None:
    """A package that can't be unpacked goes, though its size is right. Whole ones and other files stay."""
    (tmp_path / "tree/DEBIAN").mkdir(parents=True)
    (tmp_path / "tree/DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.net>\nDescription: x\n"
    )
    (tmp_path / "tree/file").write_bytes(os.urandom(10_000))
    debs = tmp_path / "debs"
    debs.mkdir()
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", debs / "whole.deb"], check=True, capture_output=True)
    whole = (debs / "whole.deb").read_bytes()
    (debs / "zeros.deb").write_bytes(bytes(len(whole)))
    (debs / "half.deb").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    (debs / "flipped.deb").write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    (debs / "head.deb").write_bytes(whole[:140] + bytes([whole[140] ^ 1]) + whole[141:])
    (debs / "lock").touch()
    assert drop_damaged(debs) == ["flipped.deb", "half.deb", "head.deb", "zeros.deb"]
    assert sorted(path.name for path in debs.iterdir()) == ["lock", "whole.deb"]


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    """A build that fails leaves nothing that looks finished. A build that succeeds appears as a whole."""
    target = tmp_path / "images/key"

    def fail() -> None:
        with finished(target) as work:
            (work / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(target.parent.iterdir()) == []
    with finished(target) as work:
        assert not target.exists()
        (work / "whole").write_text("x")
    assert [path.name for path in target.parent.iterdir()] == ["key"]
    assert (target / "whole").exists()


async def test_running_a_tool() -> None:
    """A tool's steps are passed on, and its failure has its last output."""
    steps: list[str] = []
    await image.run(["sh", "-c", 'echo "step: one"; echo noise; echo "step: $X"'], {"X": "two"}, steps.append)
    assert steps == ["one", "two"]
    with pytest.raises(image.BuildError, match=r"sh failed with status 3:\n.*broken"):
        await image.run(["sh", "-c", "echo broken >&2; exit 3"], {}, steps.append)


async def test_a_tool_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools of a build run code of strangers, so they get only the variables that show them the way."""
    monkeypatch.setenv("CELLVM_API_KEY", "e2b_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@index.example/simple")
    told: list[str] = []
    await image.run(["sh", "-c", "env | sed 's/^/step: /'"], {"OUT": "/out"}, told.append)
    assert not [line for line in told if "secret" in line]
    assert {"OUT=/out", "https_proxy=http://proxy.example:3128", f"PATH={os.environ['PATH']}"} <= set(told)


async def test_every_build_is_an_image_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that was damaged, and one that is built anew, get another name than the one before, because snapshots
    of the one before do not fit them. The other one stays for servers that run."""

    async def nothing(*_: object) -> None:
        """No wheels are needed."""

    async def built(template: Template, work: Path, *_: object) -> None:
        (work / "tmp").mkdir()
        (work / "root.erofs").write_bytes(os.urandom(100))
        module(work / "boot/lib/modules/6.1.0", "erofs")
        (work / "boot/bin").mkdir()
        (work / "boot/bin/busybox").touch()

    monkeypatch.setattr(image, "download_wheels", nothing)
    monkeypatch.setattr(image, "_debian", built)
    real_gmtime, moments = time.gmtime, itertools.count(1_800_000_000)
    monkeypatch.setattr("kernel_gateway.images.image.time.gmtime", lambda: real_gmtime(next(moments)))
    cache = Cache(tmp_path)

    async def build(*, anew: bool = False) -> Path:
        return await build_image(TEMPLATE, cache, None, lambda _: None, anew=anew)

    first = await build()
    assert await build() == first
    (first / "root.erofs").write_bytes(b"damaged")
    second = await build()
    assert second != first
    assert not first.exists()
    third = await build(anew=True)
    assert third not in (first, second)
    assert second.exists()
    assert await build() == third
    assert {path.name[-16:] for path in (first, second, third)} == {image_key(TEMPLATE, None)}
    cache.close()


async def test_a_refresh_builds_each_image_once(tmp_path: Path) -> None:
    """Templates with the same packages share an image, which is built once."""

    class Building:
        cache, ca_bundle = Cache(tmp_path), None
        built: ClassVar[list[tuple[str, bool]]] = []

        async def image(self, template: Template, step: Callable[[str], None], *, anew: bool) -> None:
            self.built.append((template.id, anew))

    replaced = msgspec.structs.replace
    twin, other = replaced(TEMPLATE, id="twin"), replaced(TEMPLATE, id="other", debian=[])
    await refresh_images(Building(), [TEMPLATE, twin, other], lambda _: None)  # type: ignore[arg-type]
    assert Building.built == [("twin", True), ("other", True)]


def test_the_newest_image_of_a_key_counts(tmp_path: Path) -> None:
    """Every build has a name of its own, of which the latest counts. One of an earlier version has no time in it."""
    cache = Cache(tmp_path)
    assert newest_image(TEMPLATE, cache, None) is None
    key = image_key(TEMPLATE, None)
    ages = []
    for name in (key, f"20251231235959-{key}", f"20260102030405-{key}", "20270101000000-0123456789abcdef"):
        (tmp_path / "images" / name).mkdir()
        (tmp_path / "images" / name / "packages").touch()
        found = newest_image(TEMPLATE, cache, None)
        assert found is not None
        ages.append((found.name, built_at(found)))
    assert [name for name, _ in ages] == [key, f"20251231235959-{key}", *[f"20260102030405-{key}"] * 2]
    assert ages[0][1] == pytest.approx(time.time(), abs=60)
    assert ages[2][1] - ages[1][1] == 86_400 + 3 * 3600 + 4 * 60 + 6
    assert {entry.name for entry in cache.entries()} >= {f"images/{name}" for name, _ in ages}


def module(path: Path, name: str, *needs: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    text = f"\x7fELF\0license=GPL\0depends={','.join(needs)}\0name={name}\0"
    (path / f"{name}.ko").write_bytes(text.encode())


def test_modules_come_after_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module follows its dependencies, and comes once. Built-in modules are left out."""
    kernel = tmp_path / "6.1.0"
    module(kernel / "fs", "ext4", "mbcache", "jbd2", "crc16")
    module(kernel / "fs", "jbd2", "crc16")
    module(kernel / "lib", "crc16")
    module(kernel / "fs", "mbcache")
    module(kernel / "drivers", "virtio-blk", "virtio")
    monkeypatch.setattr(image, "MODULES", ("virtio_blk", "ext4", "built_in", "jbd2"))
    names = [path.stem for path in modules_in_order(tmp_path)]
    assert names == ["virtio-blk", "mbcache", "crc16", "jbd2", "ext4"]
    assert dependencies(kernel / "fs/ext4.ko") == ["mbcache", "jbd2", "crc16"]
    assert dependencies(kernel / "lib/crc16.ko") == []


def test_the_templates_that_come_with_it() -> None:
    """Both documented templates are there with the documented size and alias."""
    templates = Templates.load(rootfs_dir() / "templates")
    assert {template.id for template in templates} >= {"code_interpreter", "base"}
    found = templates.find("code-interpreter-v1")
    assert found is templates.find("code_interpreter")
    assert found is not None
    assert (found.vcpus, found.memory_mb, found.disk_mb) == (2, 2048, 10240)
    assert templates.find("nope") is None
    assert templates.find("") is None


def test_a_template_on_request_is_built_when_it_is_named() -> None:
    """The full template is offered, but neither `serve` nor `build` makes it before somebody names it."""
    directory = rootfs_dir() / "templates"
    offered = Templates.load(directory)
    assert offered.find("code_interpreter_full") is not None
    assert {template.id for template in offered.built_unasked} == {"code_interpreter", "base"}
    named = Templates.load(directory, ["code_interpreter", "code_interpreter_full"])
    assert {template.id for template in named.built_unasked} == {"code_interpreter", "code_interpreter_full"}
    alone = Templates([Template(id="a", description="d", vcpus=1, memory_mb=1, disk_mb=1, on_request=True)])
    assert alone.built_unasked == [alone.default]  # the server is ready with the first, so it must be built


def test_the_full_template_has_what_the_usual_one_has() -> None:
    """Every package of `code_interpreter` is in `code_interpreter_full`, and the lock file has all of its own."""
    templates = Templates.load(rootfs_dir() / "templates")
    usual, full = templates.find("code_interpreter"), templates.find("code_interpreter_full")
    assert usual is not None
    assert full is not None
    assert set(full.python) > set(usual.python)
    assert set(full.debian) > set(usual.debian)
    assert (full.warm, full.exercise, full.memory_mb) == (usual.warm, usual.exercise, usual.memory_mb)
    pins = locked(python_packages(full))
    for name in ("networkx", "pypdf", "python-docx", "python-pptx", "reportlab", "statsmodels", "sympy", "pyarrow"):
        assert f"\n{name}==" in f"\n{pins}"


def test_a_template_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    """Unknown fields, missing ones and bad TOML are refused with the file's name. An unknown id is refused too."""
    good = 'id="a"\ndescription="d"\nvcpus=1\nmemory_mb=1\ndisk_mb=1\n'
    for text in ("id=", 'id="a"', good + 'made_up="x"', good.replace("vcpus=1", 'vcpus="1"')):
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(ValueError, match=r"mine\.toml"):
            Templates.load(tmp_path)
    (tmp_path / "mine.toml").write_text(good)
    assert [template.id for template in Templates.load(tmp_path, ["a"])] == ["a"]
    with pytest.raises(ValueError, match="no template 'b'; there are a"):
        Templates.load(tmp_path, ["b"])


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of a build are root's")
@pytest.mark.parametrize("how", ["cancelled", "killed"])
async def test_a_builds_tool_ends_with_us(how: str, tmp_path: Path) -> None:
    """When the build is cancelled or its process is killed, nothing of the tool is left after some seconds."""
    mark = f"31{os.getpid()}.{len(how)}"
    if how == "cancelled":
        running = asyncio.create_task(image.run([*image.ALONE, "sleep", mark], {}, print, ended_by=signal.SIGKILL))
        await eventually(lambda: of_command(mark))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 5)
    else:
        code = (
            "import asyncio; from kernel_gateway.images import image; "
            f"asyncio.run(image.run([*image.ALONE, 'sleep', '{mark}'], {{}}, print))"
        )
        parent = subprocess.Popen([sys.executable, "-c", code])
        await eventually(lambda: of_command(mark))
        parent.kill()
        parent.wait()
    await eventually(lambda: not of_command(mark))


def of_command(argument: str) -> list[str]:
    """The processes that are `sleep` with that argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == f"sleep\0{argument}\0".encode():
                found.append(path.parent.name)
    return found


def test_the_library_of_charts(tmp_path: Path) -> None:
    """plotly.js comes out of the guests' own wheel, and the newest image that has one is taken."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert copy_library(wheels, tmp_path) == []
    with zipfile.ZipFile(wheels / "plotly-7.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"plotly/package_data/{LIBRARY}", "Plotly = {}")
    assert library(tmp_path) is None
    for day, keys in (("20260101000000", "ab"), ("20260102000000", "c")):
        for key in keys:
            folder = tmp_path / "images" / f"{day}-{key * 16}"
            folder.mkdir(parents=True)
            if key != "b":
                assert copy_library(wheels, folder) == [folder / LIBRARY]
    found = library(tmp_path)
    assert found == tmp_path / "images" / f"20260102000000-{'c' * 16}" / LIBRARY
    assert found.read_text() == "Plotly = {}"
