"""The jail without machines: users, the script of the view, leftovers, and control groups in a fake tree."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernel_gateway.drivers import cgroup, jail
from kernel_gateway.drivers.cgroup import ASIDE, Cgroups, Limits
from kernel_gateway.drivers.qemu_argv import Machine

LIMITS = Limits(memory=1 << 30, cpus=2.5, threads=128)
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give away")


# -- users


def test_two_servers_share_no_user(tmp_path: Path) -> None:
    """Each server holds a block of its own. A released block is taken again."""
    first, second = jail.claim(tmp_path), jail.claim(tmp_path)
    try:
        assert first.number != second.number
        assert jail.block_of(first.take()) == first.number
        assert jail.block_of(second.take()) == second.number
        assert jail.hold(tmp_path, first.number) is None
    finally:
        first.close()
        third = jail.claim(tmp_path)
        assert third.number == first.number
        third.close()
        second.close()


def test_living_machines_share_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user is given again only when it has come back, even after all have been given once."""
    monkeypatch.setattr(jail, "UIDS", 3)
    users = jail.claim(tmp_path)
    try:
        taken = [users.take() for _ in range(3)]
        assert len(set(taken)) == 3
        with pytest.raises(jail.DriverError, match="all 3 users"):
            users.take()
        users.give_back(taken[1])
        assert users.take() == taken[1]
    finally:
        users.close()


def test_no_block_reaches_beyond_its_own() -> None:
    """Blocks lie side by side, above every account and within the range. The user that tries a view is in none."""
    last = jail.FIRST_UID + jail.SERVERS * jail.UIDS - 1
    assert jail.FIRST_UID > 1 << 20
    assert last < (1 << 32) - 2
    assert [jail.block_of(uid) for uid in (jail.FIRST_UID, jail.FIRST_UID + jail.UIDS - 1, last)] == [0, 0, 1023]
    assert jail.block_of(jail.FIRST_UID + jail.UIDS) == 1
    assert {jail.block_of(uid) for uid in (0, 1000, jail.TRIAL_UID, last + 1)} == {None}


def test_the_directory_of_claims_must_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory must be ours alone and no link, because nobody else may hold our locks."""
    uid = os.geteuid() or 4242
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    place = tmp_path / f"cellvm-{uid}"
    if os.getuid():
        assert jail.claims_directory().stat().st_mode & 0o777 == 0o700
        place.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.symlink_to(elsewhere)
    with pytest.raises(jail.JailError):
        jail.claims_directory()
    place.unlink()
    place.write_text("")
    with pytest.raises(jail.JailError):
        jail.claims_directory()


def test_nobody_can_take_the_directory_of_claims_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a runtime directory the claims of a user are in that user's home, where no other user makes files."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    uid = os.geteuid() or 4242
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    place = tmp_path / f".local/state/cellvm-{uid}"
    place.mkdir(parents=True)
    os.chown(place, uid, -1)
    assert jail.claims_directory() == place


# -- leftovers


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """A starter of processes that sleep as some user."""
    started = []

    def start(uid: int, **environment: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(["sleep", "60"], user=uid, group=uid, extra_groups=[], env=os.environ | environment)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


@is_root
def test_strays_of_dead_servers_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """A process of a block that nobody holds is ended. Processes of a held block, or of no block, are not."""
    # These numbers differ from those of servers that may run here.
    monkeypatch.setattr(jail, "FIRST_UID", 1_700_000_000)
    with_server, own = jail.claim(tmp_path), jail.claim(tmp_path)
    try:
        first = jail.FIRST_UID
        spared = [process(with_server.take()), process(first - 1), process(os.geteuid())]
        strays = [process(first + 7 * jail.UIDS + 3), process(own.take())]
        found = dict(jail.strays())
        assert {child.pid: found.get(child.pid) for child in strays} == {strays[0].pid: 7, strays[1].pid: own.number}
        jail.sweep(tmp_path, own.number, None)
        assert [child.wait(5) for child in strays] == [-9, -9]
        assert [child.poll() for child in spared] == [None] * 3
    finally:
        with_server.close()
        own.close()


@is_root
def test_machines_of_a_server_whose_locks_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Containers may share process ids and not /run. Another container's machines and their users are let alone."""
    monkeypatch.setattr(jail, "FIRST_UID", 1_700_000_000)
    server, ended = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["true"])
    ended.wait()
    machine = process(jail.FIRST_UID, **{jail.SERVER: str(server.pid)})
    orphan = process(jail.FIRST_UID + jail.UIDS, **{jail.SERVER: str(ended.pid)})
    try:
        assert jail.used_blocks() == {0}
        own = jail.claim(tmp_path, {0})
        own.close()
        assert own.number == 1
        jail.sweep(tmp_path, own.number, None, {0})
        assert orphan.wait(5) == -9
        assert machine.poll() is None
    finally:
        server.kill()
        server.wait()
    assert jail.used_blocks() == set()


@is_root
def test_a_number_that_is_another_process_by_now_is_spared(
    process: Callable[[int], subprocess.Popen[bytes]],
) -> None:
    """A process is looked at once more before it is killed."""
    child = process(os.geteuid())
    jail._end(child.pid, 7)
    assert child.poll() is None


# -- the view


def test_the_order_of_the_view() -> None:
    """Everything is mounted before the old root goes. Bound directories are read-only, and at last the root is, too."""
    text = jail.script([Path("/usr/lib"), Path("/usr/bin")], kvm=None, own_proc=True)
    lines = text.splitlines()
    assert lines[0] == "set -e"
    for name in ("usr/lib", "usr/bin", "etc/ld.so.cache"):
        at = lines.index(f"mount --bind /{name} {name}")
        assert lines[at + 1] == f"mount -o remount,bind,ro,nosuid,nodev {name}"
    away = lines.index("umount -l /old")
    assert lines[away - 2 :] == [
        "pivot_root . old", "cd /", "umount -l /old", "rmdir /old", "mount -o remount,bind,ro,nosuid /", "echo ready",
        "read -r _",
    ]  # fmt: skip
    assert not [line for line in lines if "kvm" in line]
    (proc,) = [line for line in lines if line.startswith("mount -t proc")]
    assert {"subset=pid", "hidepid=invisible", "nosuid", "nodev", "noexec"} <= set(proc.split()[4].split(","))


def test_the_view_in_a_user_namespace() -> None:
    """The host's /proc is bound, with everything mounted on it, because a new one can't be mounted there."""
    lines = jail.script([], kvm=None, own_proc=False).splitlines()
    assert "mount --rbind /proc proc" in lines
    assert not [line for line in lines if "-t proc" in line]


def test_links_stay_links(tmp_path: Path) -> None:
    """If the system's /lib is a link, the view has the link. Odd names are quoted."""
    odd = tmp_path / "a folder; rm"
    odd.mkdir()
    link = tmp_path / "lib"
    link.symlink_to("usr/lib")
    text = jail.script([link, odd], kvm="touch dev/kvm", own_proc=True)
    target = str(tmp_path).lstrip("/")
    assert f"mkdir -p ./{tmp_path}\nln -s usr/lib {target}/lib\n" in text
    assert f"mount --bind '{odd}' '{target}/a folder; rm'\n" in text
    assert text.index("touch dev/kvm") < text.index("pivot_root")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A QEMU that somebody has installed elsewhere."""
    for name in ("opt/bin", "opt/lib", "opt/share/qemu", "opt/share/other"):
        (tmp_path / name).mkdir(parents=True)
    program = tmp_path / "opt/bin/qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path / "opt"


def test_folders_of_other_qemus(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program elsewhere is shown with its libraries and firmware, also when it is called through a link."""
    monkeypatch.setattr(jail, "_is_for_all", Path.is_dir)
    own = [prefix / name for name in ("bin", "lib", "share/qemu")]
    assert jail.folders_of(str(prefix / "bin/qemu")) == own
    link = prefix.parent / "tools" / "qemu"
    link.parent.mkdir()
    link.symlink_to(prefix / "bin/qemu")
    assert jail.folders_of(str(link)) == [link.parent, *own]
    assert jail.folders_of(str(prefix / "none")) == []


def test_only_what_all_may_read_is_shown() -> None:
    """Folders that others may not read, or may write, are not shown. Those in system directories are not added."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        for mode, expected in {0o755: True, 0o555: True, 0o700: False, 0o750: False, 0o777: False}.items():
            folder.chmod(mode)
            assert jail._is_for_all(folder) is expected, oct(mode)
        inner = folder / "inner"
        inner.mkdir()
        inner.chmod(0o755)
        for mode, expected in {0o755: True, 0o700: False}.items():
            folder.chmod(mode)
            assert jail._is_for_all(inner) is expected, oct(mode)
    assert [jail._is_for_all(Path(each)) for each in ("/", "/tmp", "/usr/bin", "/usr/lib/none")] == [False] * 4
    assert jail.folders_of("sh") == []


def test_limits_of_a_machine() -> None:
    """A machine may use more on the host than it shows its guest, because pages that it touches first count twice."""
    found = jail.limits(Machine("tcg", 2, 2048))
    assert found.cpus == 2.5
    assert found.threads == 128
    assert found.memory >> 20 == 2 * 2064 + 448
    assert jail.limits(Machine("kvm", 2, 2048)).memory < found.memory


def test_limits_of_the_process() -> None:
    """There are no core dumps, few files, none longer than the disk. A process that gains power can't raise this."""
    assert jail.process_limits(1000) == ["prlimit", "--core=0:0", "--nofile=256:256", "--fsize=1000:1000", "--"]


# -- control groups


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain directory that acts like a group: it can be removed although it has files, but not with processes."""

    def rmdir(path: Path) -> None:
        procs = path / "cgroup.procs"
        if any(child.is_dir() for child in path.iterdir()) or (procs.exists() and procs.read_text()):
            raise OSError(16, "Device or resource busy", str(path))
        shutil.rmtree(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)


def v1(root: Path, *names: str, own: str = "/box") -> tuple[str, str]:
    """A tree of version 1 with these controllers, its mounts and this process's membership."""
    mounts, membership = ["22 1 0:20 / /proc rw - proc proc rw"], ["0::/"]
    for number, name in enumerate(names):
        directory = root / name / own.strip("/")
        directory.mkdir(parents=True)
        for each in (directory, root / name):
            (each / "cgroup.procs").write_text("")
        mounts.append(f"3{number} 31 0:3{number} / {root / name} rw,relatime - cgroup cgroup rw,{name}")
        membership.append(f"{number}:{name}:{own}")
    return "\n".join(mounts), "\n".join(membership)


def v2(root: Path, own: str, groups: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A tree of version 2: the controllers and the processes of each group, from the top, which is the kernel's own."""
    for name, (controllers, processes) in groups.items():
        path = root / name.strip("/")
        path.mkdir(parents=True, exist_ok=True)
        (path / "cgroup.controllers").write_text(controllers)
        (path / "cgroup.procs").write_text(processes)
        (path / "cgroup.subtree_control").write_text("")
        if path != root:
            (path / "cgroup.type").write_text("domain")
    return f"40 31 0:40 / {root} rw,relatime - cgroup2 cgroup2 rw", f"0::{own}"


def found(trees: tuple[str, str]) -> Cgroups:
    groups = Cgroups.find(*trees)
    assert groups is not None
    return groups


@pytest.mark.usefixtures("kernel")
def test_version_1(tmp_path: Path) -> None:
    """Each controller has a directory below the server's own, with its limits. It is removed with the server's."""
    groups = found(v1(tmp_path, "cpu", "memory", "pids", "freezer"))
    assert (groups.version, groups.controllers) == (1, ["cpu", "memory", "pids"])
    group = groups.make("cellvm-3", "77", LIMITS)
    where = {name: tmp_path / name / "box/cellvm-3/77" for name in ("cpu", "memory", "pids")}
    assert set(group.paths) == set(where.values())
    assert (where["memory"] / "memory.limit_in_bytes").read_text() == str(1 << 30)
    assert (where["cpu"] / "cpu.cfs_quota_us").read_text() == "250000"
    assert (where["cpu"] / "cpu.cfs_period_us").read_text() == "100000"
    assert (where["pids"] / "pids.max").read_text() == "128"
    group.add(4321)
    assert {(path / "cgroup.procs").read_text() for path in group.paths} == {"4321"}
    assert not group.remove()
    for path in group.paths:
        (path / "cgroup.procs").write_text("")
    assert group.remove()
    assert not list(tmp_path.rglob("cellvm-*"))
    assert group.remove(), "again is fine"


@pytest.mark.usefixtures("kernel")
def test_controllers_that_share_a_hierarchy(tmp_path: Path) -> None:
    """Version 1 may have cpu and cpuacct mounted together, and no others. The existing ones are used."""
    groups = found(v1(tmp_path, "cpu,cpuacct", "freezer"))
    assert groups.controllers == ["cpu"]
    group = groups.make("cellvm-0", "1", LIMITS)
    assert group.paths == (tmp_path / "cpu,cpuacct/box/cellvm-0/1",)


def test_a_part_of_the_tree(tmp_path: Path) -> None:
    """In a container the mount shows a part of the hierarchy, and membership is told from its real top."""
    mounts, _ = v1(tmp_path, "memory", own="/inner")
    mounts = mounts.replace(" / " + str(tmp_path), " /docker/abc " + str(tmp_path))
    groups = found((mounts, "4:memory:/docker/abc/inner"))
    assert [place.path for place in groups.places] == [tmp_path / "memory/inner"]


@pytest.mark.usefixtures("kernel")
def test_version_2_alone_in_its_group(tmp_path: Path) -> None:
    """A service moves into a group within its own, so that its own group may have others with limits."""
    me = str(os.getpid())
    everything = "cpuset cpu io memory pids"
    trees = v2(tmp_path, "/svc", {"/": (everything, "1\n2\n"), "/svc": (everything, me)})
    groups = found(trees)
    assert (groups.version, groups.controllers) == (2, ["cpu", "memory", "pids"])
    group = groups.make("cellvm-3", "77", LIMITS)
    own = tmp_path / "svc"
    assert (own / ASIDE / "cgroup.procs").read_text() == me
    assert group.paths == (own / "cellvm-3/77",)
    for path in (own, own / "cellvm-3"):
        assert set((path / "cgroup.subtree_control").read_text().split()) == {"+cpu", "+memory", "+pids"}
    (path,) = group.paths
    limits = {name: (path / name).read_text() for name in ("memory.max", "cpu.max", "pids.max")}
    assert limits == {"memory.max": str(1 << 30), "cpu.max": "250000 100000", "pids.max": "128"}
    # From now on this process is in the inner group, and it still finds the same place.
    (own / "cgroup.procs").write_text("")
    assert found((trees[0], f"0::/svc/{ASIDE}")).places == groups.places


def test_version_2_at_the_top_of_a_container(tmp_path: Path) -> None:
    """A container's top is a group like others, so it may not have both processes and limited groups."""
    trees = v2(tmp_path, "/", {"/": ("cpu memory pids", str(os.getpid()))})
    assert [place.aside for place in found(trees).places] == [False], "the kernel's own top"
    (tmp_path / "cgroup.type").write_text("domain")
    assert [place.aside for place in found(trees).places] == [True]


def test_version_2_among_others(tmp_path: Path) -> None:
    """Others are in a shell's group, so the nearest group above with the most controllers is used."""
    groups = found(
        v2(
            tmp_path,
            "/user/session",
            {
                "/": ("cpu io memory pids", "1\n"),
                "/user": ("memory pids", ""),
                "/user/session": ("memory pids", f"{os.getpid()}\n99\n"),
            },
        )
    )
    (place,) = groups.places
    assert (place.path, place.controllers, place.aside) == (tmp_path, ("cpu", "memory", "pids"), False)


def test_version_2_at_the_top(tmp_path: Path) -> None:
    """The root group may have both processes and groups with limits, so nobody has to move."""
    groups = found(v2(tmp_path, "/", {"/": ("cpu memory pids", f"1\n{os.getpid()}\n")}))
    assert groups.places == (cgroup.Place(tmp_path, ("cpu", "memory", "pids"), aside=False),)


def test_nothing_to_be_had(tmp_path: Path) -> None:
    """There may be a version 2 without controllers and no version 1, or no control groups at all."""
    assert Cgroups.find(*v2(tmp_path, "/", {"/": ("", "")})) is None
    assert Cgroups.find("22 1 0:20 / /proc rw - proc proc rw", "0::/") is None


@pytest.mark.usefixtures("kernel")
def test_a_group_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that can't be set is an error, and nothing is left."""
    groups = found(v1(tmp_path, "cpu", "memory", "pids"))
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if path.name == "pids.max":
            raise OSError(22, "Invalid argument", str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert jail.tried(groups, "cellvm-0").endswith("pids.max: Invalid argument")
    assert not list(tmp_path.rglob("cellvm-*"))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 9\noom 1\noom_kill {}\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
    ],
)
def test_a_death_for_want_of_memory_is_known(tmp_path: Path, file: str, text: str) -> None:
    """In both versions the group tells whether a process in it was killed."""
    group = found(v1(tmp_path, "memory")).make("cellvm-0", "1", LIMITS)
    assert not group.was_out_of_memory()
    for kills, expected in ((0, False), (1, True), (12, True)):
        (group.paths[0] / file).write_text(text.format(kills))
        assert group.was_out_of_memory() is expected


@pytest.mark.usefixtures("kernel")
def test_groups_of_dead_servers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of blocks that nobody holds are removed anywhere in the tree. Groups of others and of the living stay."""
    monkeypatch.setattr(jail, "strays", list)  # machines of servers that run here are not ours to touch
    claims = tmp_path / "claims"
    claims.mkdir()
    groups = found(v1(tmp_path / "tree", "cpu", "memory", "pids"))
    alive, own = jail.claim(claims), jail.claim(claims)
    try:
        groups.make(alive.name, "1", LIMITS)
        groups.make(own.name, "2", LIMITS)
        groups.make("cellvm-9", "3", LIMITS)
        busy = groups.make("cellvm-8", "4", LIMITS)
        busy.add(4321)
        elsewhere = tmp_path / "tree/memory/other/cellvm-9/5"
        foreign = tmp_path / "tree/memory/other/cellvmx-1/5"
        elsewhere.mkdir(parents=True)
        foreign.mkdir(parents=True)
        jail.sweep(claims, own.number, groups)
        assert groups.servers() == {alive.name, "cellvm-8"}
        assert foreign.is_dir()
    finally:
        alive.close()
        own.close()


# -- all of it


@pytest.fixture
def users(tmp_path: Path) -> Iterator[jail.Users]:
    claimed = jail.claim(tmp_path)
    yield claimed
    claimed.close()


def steps(command: list[str]) -> list[str]:
    """The programs of a command line, each of which runs the next."""
    starts = [0, *(at + 1 for at, word in enumerate(command) if word == "--")]
    return [Path(command[at]).name for at in starts]


def test_the_command_line_as_root(users: jail.Users, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits come first, then the view, which needs root, then the loss of all power, then the filter, then QEMU."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    view = jail.View({"mount": 7, "net": 8})
    cell = jail.Jail(users, view, None, 9).cell(Machine("tcg", 1, 512), 1000)
    command = cell.command(["qemu", "-x"])
    assert steps(command) == ["prlimit", "nsenter", "setpriv", "sh"]
    assert command[-4:] == [str(os.getpid()), "/proc/self/fd/9", "qemu", "-x"]
    assert cell.fds == (9,)
    assert f"--mount=/proc/{os.getpid()}/fd/7" in command
    assert f"--reuid={jail.FIRST_UID + users.number * jail.UIDS}" in command
    cell.release()


def test_the_command_line_without_root(users: jail.Users, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a user namespace for the view, one more for each machine, and no change of user."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    view = jail.View({"mount": 7, "user": 9})
    command = jail.Jail(users, view, None, 9).cell(Machine("tcg", 1, 512), 1000).command(["qemu"])
    assert steps(command) == ["prlimit", "nsenter", "unshare", "setpriv", "sh"]
    assert command[-3:] == [str(os.getpid()), "/proc/self/fd/9", "qemu"]
    assert {"--preserve-credentials", f"--user=/proc/{os.getpid()}/fd/9", "--no-new-privs"} <= set(command)
    assert not [word for word in command if "uid" in word]


def test_a_machine_whose_server_has_ended_does_not_begin() -> None:
    """A server may be killed before its machine has the parent-death signal, and then nobody would end the machine."""
    command = jail.inside(None, None, ["echo", "begun"])
    assert subprocess.run(command, capture_output=True, text=True).stdout == "begun\n"
    orphan = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    ran = subprocess.run(orphan, capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("", 1)


@is_root
def test_root_of_a_user_namespace_is_told() -> None:
    """The machines' users do not exist there. This is said before any machine fails because of it."""
    jail.check_users()
    code = "from kernel_gateway.drivers.jail import check_users; check_users()"
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "JailError: the user ids from" in ran.stderr


def test_a_host_that_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a view and control groups machines still run, and the log says what is missing."""

    def refuse(*_: object, **__: object) -> jail.View:
        raise jail.JailError("unshare: Operation not permitted")

    monkeypatch.setattr(jail, "claims_directory", lambda: tmp_path)
    monkeypatch.setattr(jail, "strays", list)
    monkeypatch.setattr(jail, "found_groups", lambda: None)
    monkeypatch.setattr(jail.View, "make", refuse)
    made = jail.Jail.open("qemu", kvm=False)
    try:
        command = made.cell(Machine("tcg", 1, 512), 1000).command(["qemu"])
        assert steps(command) == ["prlimit", "setpriv", "sh"]
        assert command[-3:] == [str(os.getpid()), f"/proc/self/fd/{made.launcher}", "qemu"]
        assert "MACHINES HAVE NO LIMITS" in caplog.text
        assert "MACHINES SEE THE HOST'S FILES" in caplog.text
        assert "unshare: Operation not permitted" in caplog.text
    finally:
        made.close()
