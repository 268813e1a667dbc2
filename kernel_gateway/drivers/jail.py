"""The jail round a QEMU process, besides its own seccomp sandbox: a user, a view of the files, calls, and limits.

- **A user of its own.** A server claims a block of user ids, and each of its machines gets one that nobody else has.
- **A view.** All machines of a server live in one set of namespaces: a read-only root with the programs and libraries
  of QEMU and nothing else, a /proc that shows a process only itself, no network, no System V IPC, another host name.
  One view is enough, because no machine has a file with a name. A child makes it once, and then ends. The server holds
  the namespaces by descriptors, and they are gone with the last of those.
- **Few system calls.** QEMU can make the calls that it needs, and no others (`seccomp`).
- **Limits.** A control group for memory, processors and threads, and limits of the process for files and core dumps.

A server that was killed may leave empty control groups (and a process, if the parent-death signal ever failed). The
next server removes them when it starts. docs/adr/0010 has the reason for each part.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from kernel_gateway.drivers import DriverError, seccomp
from kernel_gateway.drivers.cgroup import MEMBERSHIP, MOUNTS, Cgroups, Group, Limits
from kernel_gateway.drivers.qemu_argv import Machine, drop_privileges

log = logging.getLogger(__name__)

FIRST_UID = 1_879_113_728
"""Machines run as users from this number on, because no account has such a number."""
UIDS = 65_536
"""User ids of one server."""
TRIAL_UID = FIRST_UID - 1
"""The user for trying whether QEMU runs in a view."""
SERVERS = 1024
OPEN_FILES = 256
THREADS = 128
"""Threads of one QEMU: one per processor, up to 64 for the disk, and a handful of others."""
SPARE_CPU = 0.5
"""Processors for the devices, besides the guest's own."""
OVERHEAD_MB = {"kvm": 192, "tcg": 448}
"""Memory of QEMU itself. Under TCG 256 MiB of it are translated code."""
DIRECTORIES = ("/usr/bin", "/usr/lib", "/usr/lib64", "/bin", "/lib", "/lib64", "/usr/share/qemu", "/usr/share/seabios")
"""The parts of QEMU: programs, libraries, firmware."""
DEVICES = ("null", "urandom")
NAMESPACES = {"mount": "mnt", "net": "net", "ipc": "ipc", "uts": "uts"}
"""A view's namespaces: names of nsenter's flags, and of the files in /proc/PID/ns."""
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
SERVER = "CELLVM_SERVER"
"""The environment variable of a machine that holds its server's process id."""


class JailError(Exception):
    """A part of the jail can't be had on this host. The text says why."""


# -- users


class Users:
    """A block of user ids, which this process holds by a lock as long as it lives."""

    def __init__(self, number: int, lock: int) -> None:
        self.number = number
        self._lock = lock
        self._taken: set[int] = set()
        self._next = 0

    @property
    def name(self) -> str:
        """This server's name among those of the host."""
        return f"cellvm-{self.number}"

    def take(self) -> int:
        """A user id that no living machine has."""
        for _ in range(UIDS):
            uid = FIRST_UID + self.number * UIDS + self._next
            self._next = (self._next + 1) % UIDS
            if uid not in self._taken:
                self._taken.add(uid)
                return uid
        raise DriverError(f"all {UIDS} users of this server are taken")

    def give_back(self, uid: int) -> None:
        self._taken.discard(uid)

    def close(self) -> None:
        os.close(self._lock)


def claims_directory() -> Path:
    """The directory of the locks. No other user may hold a lock there, or remove one.

    Raises:
        JailError: there is no such place.
    """
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.access(runtime, os.W_OK):  # it is not set, or is another user's after `su`
        # It is not in /tmp, because there another user could take the name first.
        runtime = str(Path.home() / ".local/state")
    path = Path("/run/cellvm") if uid == 0 else Path(runtime, f"cellvm-{uid}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if found.st_uid != uid or not path.is_dir() or path.is_symlink():
            raise JailError(f"{path} belongs to somebody else")
        path.chmod(0o700)
    except OSError as error:
        raise JailError(f"{path}: {error.strerror}") from error
    return path


def check_users() -> None:
    """See whether the users of machines exist here.

    Raises:
        JailError: this is a user namespace that does not have these users.
    """
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= TRIAL_UID and first + count >= FIRST_UID + SERVERS * UIDS:
            return
    raise JailError(
        f"the user ids from {TRIAL_UID} on are not in this user namespace (/proc/self/uid_map), as in rootless "
        "containers; start the server as an ordinary user in there, or outside as root"
    )


def hold(directory: Path, number: int) -> int | None:
    """The lock of a block, as a descriptor; None when another process holds it."""
    lock = os.open(directory / f"uids-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def claim(directory: Path, used: Set[int] = frozenset()) -> Users:
    """Claim the first free block. Blocks `used` by machines of servers whose locks we don't see are not free."""
    for number in range(SERVERS):
        if number not in used and (lock := hold(directory, number)) is not None:
            return Users(number, lock)
    raise JailError(f"there are {SERVERS} servers on this host")


# -- leftovers


def block_of(uid: int) -> int | None:
    """The block of a user id; None if it is in no block."""
    number = (uid - FIRST_UID) // UIDS
    return number if 0 <= number < SERVERS else None


def strays() -> Iterator[tuple[int, int]]:
    """Processes of machines in this process's own PID namespace, with the block of each."""
    namespace = os.readlink("/proc/self/ns/pid")
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = _block_of_process(entry)
            # A process in a container is left out, because the same number is another user there, with other locks.
            if number is not None and os.readlink(entry / "ns/pid") == namespace:
                yield int(entry.name), number


def used_blocks() -> set[int]:
    """Blocks with machines of living servers. We see no lock of a server that has a /run of its own."""
    found = set()
    for pid, number in strays():
        with contextlib.suppress(OSError, ValueError):
            if _has_server(Path(f"/proc/{pid}")):
                found.add(number)
    return found


def _has_server(machine: Path) -> bool:
    """Whether the server that started a machine still lives."""
    named = re.search(rb"(?:\A|\0)%b=([0-9]+)\0" % SERVER.encode(), (machine / "environ").read_bytes())
    # A process that began after the machine only has the server's old number.
    return named is not None and _began(Path("/proc", named[1].decode())) <= _began(machine)


def _began(process: Path) -> int:
    """The time when a process was started, in ticks since the host's start."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[19])


def _block_of_process(entry: Path) -> int | None:
    uids = re.search(r"^Uid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)
    return block_of(int(uids[1])) if uids else None


def sweep(directory: Path, own: int, groups: Cgroups | None, used: Set[int] = frozenset()) -> None:
    """Remove what dead servers have left in our own block, and in every block that nobody holds or uses."""
    processes = [each for each in strays() if each[1] not in used] if os.geteuid() == 0 else []
    names = groups.servers() if groups else set()
    numbers = {number for _, number in processes} | {int(name.removeprefix("cellvm-")) for name in names}
    for number in numbers - used:
        # We hold the block while we clean it, so that nobody takes it meanwhile.
        lock = None if number == own else hold(directory, number)
        if lock is None and number != own:
            continue
        try:
            for pid in (pid for pid, block in processes if block == number):
                _end(pid, number)
            if groups and f"cellvm-{number}" in names:
                groups.remove(f"cellvm-{number}")
        finally:
            if lock is not None:
                os.close(lock)


def _end(pid: int, number: int) -> None:
    """Kill a process if it is still in that block, because its number may be another process's by now."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _block_of_process(Path(f"/proc/{pid}")) == number:
            log.warning("process %d is a machine without a server: killed", pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        pass
    finally:
        os.close(process)


# -- the view


def folders_of(binary: str) -> list[Path]:
    """The folders of a QEMU program outside the system's directories, as far as machines may see them.

    Machines may see a folder that every user may read but not write. So a program in a home does not open the home.
    """
    found = shutil.which(binary)
    if found is None:
        return []
    folders: list[Path] = []
    for program in (Path(found).absolute(), Path(found).resolve()):
        folders.append(program.parent)
        if program.parent.name == "bin":
            folders += [program.parents[1] / name for name in ("lib", "lib64", "share/qemu", "share/seabios")]
    return [folder for folder in dict.fromkeys(folders) if _is_for_all(folder)]


def _is_for_all(folder: Path) -> bool:
    if not folder.is_dir() or folder == Path("/") or any(folder.is_relative_to(each) for each in DIRECTORIES):
        return False
    enterable = all(parent.stat().st_mode & 0o001 for parent in folder.parents)
    return enterable and folder.stat().st_mode & 0o007 == 0o005


def script(folders: list[Path], *, kvm: str | None, own_proc: bool) -> str:
    """The shell script that makes a view, in namespaces of its own, and waits until its input ends.

    Args:
        folders: folders that machines may read and run; a link among them is made again.
        kvm: the shell command that makes `dev/kvm` here, or None.
        own_proc: whether this process may mount a /proc.
    """
    lines = ["set -e", "mount -t tmpfs -o mode=755,size=1m cellvm /sys", "cd /sys", "mkdir -p usr etc proc dev old"]

    def bind(source: str, target: str) -> None:
        # The flags need a second command, because a bind mount ignores them at first.
        lines.append(f"mount --bind {source} {target}")
        lines.append(f"mount -o remount,bind,ro,nosuid,nodev {target}")

    for folder in folders:
        source, target = shlex.quote(str(folder)), shlex.quote(str(folder).lstrip("/"))
        if folder.is_symlink():
            lines.append(f"mkdir -p {shlex.quote(f'./{folder.parent}')}")
            lines.append(f"ln -s {shlex.quote(os.readlink(folder))} {target}")
        else:
            lines.append(f"mkdir -p {target}")
            bind(source, target)
    lines.append("touch etc/ld.so.cache dev/null dev/urandom")
    bind("/etc/ld.so.cache", "etc/ld.so.cache")
    lines += [f"mount --bind /dev/{name} dev/{name}" for name in DEVICES]
    if kvm:
        lines.append(kvm)
    lines.append("hostname sandbox 2>/dev/null || echo sandbox >/proc/sys/kernel/hostname")
    if own_proc:
        # `subset` comes first, because Linux before 5.8 refuses it, and would apply `hidepid` to the host's own /proc.
        lines.append("mount -t proc -o subset=pid,hidepid=invisible,nosuid,nodev,noexec proc proc")
    else:
        lines.append("mount --rbind /proc proc")
    lines += ["pivot_root . old", "cd /", "umount -l /old", "rmdir /old", "mount -o remount,bind,ro,nosuid /"]
    return "\n".join([*lines, "echo ready", "read -r _", ""])


class View:
    """The namespaces of machines, held by descriptors.

    Root makes them directly. Another user makes them within a user namespace. Each machine then gets one more user
    namespace within, so that machines can't reach each other though all of them are the same user.
    """

    def __init__(self, namespaces: dict[str, int]) -> None:
        self._namespaces = namespaces

    @classmethod
    def make(cls, binary: str, *, kvm: bool) -> "View":
        """Make a view.

        Raises:
            JailError: this host does not allow it.
        """
        is_root = os.geteuid() == 0
        flags = ["--mount", "--net", "--ipc", "--uts", "--propagation", "private"]
        namespaces = dict(NAMESPACES)
        if not is_root:
            flags += ["--user", "--map-root-user"]
            namespaces["user"] = "user"
        folders = [path for path in map(Path, DIRECTORIES) if path.is_dir()] + folders_of(binary)
        text = script(folders, kvm=_kvm_command(as_root=is_root) if kvm else None, own_proc=is_root)
        try:
            process = subprocess.Popen(
                ["unshare", *flags, "sh", "-c", text],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": PATH},
                cwd="/",
            )
        except OSError as error:
            raise JailError(f"unshare: {error.strerror}") from error
        with process:
            assert process.stdout
            assert process.stderr
            if process.stdout.readline() != b"ready\n":
                told = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
                raise JailError(told[0] if told else "the view could not be made")
            opened: dict[str, int] = {}
            try:
                for flag, name in namespaces.items():
                    opened[flag] = os.open(f"/proc/{process.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                for fd in opened.values():
                    os.close(fd)
                raise JailError(f"the view can't be held: {error.strerror}") from error
        return cls(opened)

    def enter(self) -> list[str]:
        """The prefix of a command that is to run inside. The process stays the one that was started."""
        # The descriptors are named by the server's number and not inherited, so that QEMU has none of them.
        ours = f"/proc/{os.getpid()}/fd"
        flags = [f"--{flag}={ours}/{fd}" for flag, fd in self._namespaces.items()]
        if "user" not in self._namespaces:
            return ["nsenter", *flags, "--"]
        return ["nsenter", "--preserve-credentials", *flags, "--", "unshare", "--user", "--"]

    def close(self) -> None:
        for fd in self._namespaces.values():
            os.close(fd)


OPENER = """
import os, socket, subprocess, sys
files = []
for path in sys.argv[1:]:
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro,nosuid,nodev,noexec", path], check=True)
    files.append(os.open(path, os.O_RDONLY))
socket.send_fds(socket.socket(fileno=0), [b"opened"], files)
"""
"""A program for a mount namespace of its own. Only the descriptors keep mounts of that alive."""


def opened_for_machines(paths: list[Path]) -> list[int]:
    """Open files that machines inherit and must not write. A process can open a descriptor's file anew, for writing.

    Machines with users of their own may not. Without root, machines run as the owner of the files. So the files are
    opened through read-only mounts.
    """
    if os.geteuid():
        ours, theirs = socket.socketpair()
        with ours:
            command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-I", "-S", "-c", OPENER]
            with theirs:
                ran = subprocess.run(
                    [*command, *map(str, paths)], stdin=theirs.fileno(), capture_output=True, text=True
                )
            _, files, _, _ = socket.recv_fds(ours, 16, len(paths), socket.MSG_CMSG_CLOEXEC)
        if len(files) == len(paths):
            return files
        log.warning("A MACHINE THAT BROKE OUT COULD CHANGE THE IMAGES of later ones: %.300s", ran.stderr.strip())
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]


def _kvm_command(*, as_root: bool) -> str:
    """The command that puts /dev/kvm into a view: as a node that every machine may open, if we can make one."""
    bind = "touch dev/kvm; mount --bind /dev/kvm dev/kvm"
    if not as_root:
        return bind
    device = os.stat("/dev/kvm").st_rdev
    return f"mknod -m 666 dev/kvm c {os.major(device)} {os.minor(device)} 2>/dev/null || {{ {bind}; }}"


# -- all of it


def limits(machine: Machine) -> Limits:
    """The limits of a machine on the host, which are higher than the guest's own resources."""
    return Limits(
        memory=(machine.ram_mb * 2 + OVERHEAD_MB[machine.accelerator]) << 20,
        cpus=machine.vcpus + SPARE_CPU,
        threads=THREADS,
    )


class Cell:
    """One machine's part of the jail. It is made before the machine's process.

    Args:
        disk: the length of the machine's disk, in bytes. No file may get longer.
    """

    def __init__(self, jail: "Jail", machine: Machine, disk: int) -> None:
        self._jail = jail
        self._machine = machine
        self._disk = disk
        self._uid = jail.users.take() if os.geteuid() == 0 else None
        self._group: Group | None = None

    def command(self, argv: list[str]) -> list[str]:
        """The command line that runs another one inside."""
        # `prlimit` sets the limits first, because root in a container may not limit another user's running process.
        jail = self._jail
        return [*process_limits(self._disk), *inside(jail.view, self._uid, argv, jail.group, jail.launcher)]

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that the process of `command` must inherit. It closes them."""
        return (self._jail.launcher,)

    async def confine(self, pid: int) -> None:
        """Put the process of `command` into a control group. The process must not have been waited for yet.

        Raises:
            DriverError: the process can't be limited.
        """
        if self._jail.groups is None:
            return
        try:
            self._group = self._jail.groups.make(self._jail.users.name, str(pid), limits(self._machine))
            # This runs in a thread, because the kernel takes its time for it. QEMU starts meanwhile.
            await asyncio.to_thread(self._group.add, pid)
        except ProcessLookupError:
            pass  # the process has ended already, and the driver will notice
        except OSError as error:
            raise DriverError(f"the machine can't be limited: {error}") from error

    def release(self) -> None:
        """Give everything back. The process must have ended."""
        if self._uid is not None:
            self._jail.users.give_back(self._uid)
        if self._group is not None:
            if self._group.was_out_of_memory():
                log.warning("machine %s was killed: it took more memory of the host than it may", self._group.name)
            _until_gone(self._group.remove)


def _until_gone(remove: Callable[[], bool], attempts: int = 100) -> None:
    """Try again, because the kernel may count a process for a moment after its end. The next start removes the rest."""
    if not remove() and attempts:
        asyncio.get_running_loop().call_later(0.05, _until_gone, remove, attempts - 1)


@dataclass(frozen=True, slots=True)
class Jail:
    """A server's jail. `view` and `groups` are None if the host does not allow them.

    `group` is the host's group that may open /dev/kvm, for machines that need it. `launcher` is the descriptor of the
    program that puts QEMU under the filter of system calls.
    """

    users: Users
    view: View | None
    groups: Cgroups | None
    launcher: int
    group: int | None = None

    @classmethod
    def open(cls, binary: str, *, kvm: bool) -> "Jail":
        """Make a jail, and remove what dead servers have left. The log warns of parts that can't be had.

        Raises:
            DriverError: not even users for machines can be had.
        """
        used: set[int] = set()
        try:
            directory = claims_directory()
            if os.geteuid() == 0:
                check_users()
                used = used_blocks()
            users = claim(directory, used)
        except JailError as error:
            raise DriverError(f"no users for machines: {error}") from error
        groups = found_groups()
        sweep(directory, users.number, groups, used)
        if groups and (why := tried(groups, users.name)):
            log.warning("MACHINES HAVE NO LIMITS of memory, processors and threads: %s", why)
            groups = None
        elif groups is None:
            log.warning("MACHINES HAVE NO LIMITS of memory, processors and threads: no control group can be written")
        view = None
        try:
            view = working_view(binary, kvm=kvm)
        except JailError as error:
            who = "everybody" if os.geteuid() == 0 else "the server's user"
            log.warning("MACHINES SEE THE HOST'S FILES, as far as %s may read them: %s", who, error)
        return cls(users, view, groups, seccomp.launcher(), group_of_kvm() if kvm else None)

    def kvm_refused(self) -> str:
        """The reason why the users of machines can't open /dev/kvm; empty if they can."""
        uid = TRIAL_UID if os.geteuid() == 0 else None
        opening = inside(self.view, uid, ["/bin/sh", "-c", "exec 3<>/dev/kvm"], self.group)
        ran = subprocess.run(opening, capture_output=True, text=True, env={"PATH": os.defpath}, cwd="/")
        told = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        return told[-1] if ran.returncode else ""

    def cell(self, machine: Machine, disk: int) -> Cell:
        return Cell(self, machine, disk)

    def close(self) -> None:
        """Let go of users and view. All machines must have ended."""
        if self.view:
            self.view.close()
        os.close(self.launcher)
        self.users.close()


def process_limits(file_size: int) -> list[str]:
    """The prefix of a command that may dump no core, open few files, and write no file longer than `file_size`."""
    return ["prlimit", "--core=0:0", f"--nofile={OPEN_FILES}:{OPEN_FILES}", f"--fsize={file_size}:{file_size}", "--"]


def group_of_kvm() -> int | None:
    """The group of /dev/kvm, if machines may be in it. They need it where root can't make a device for them."""
    try:
        group = os.stat("/dev/kvm").st_gid
    except OSError:
        return None
    return group if group and os.geteuid() == 0 else None


def inside(
    view: View | None, uid: int | None, argv: list[str], group: int | None = None, launcher: int | None = None
) -> list[str]:
    """The command line that runs another one in a view, without privileges, as that user and in that group.

    Args:
        launcher: the descriptor of `seccomp.launcher`, which the process inherits; None for no filter.
    """
    setpriv = shutil.which("setpriv") or "/usr/bin/setpriv"
    # A process whose server was killed before the parent-death signal was set has another parent by now.
    if_server_lives = ["/bin/sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
    if launcher is not None:  # it searches for no program, so the program's name has to be a path
        argv = [f"/proc/self/fd/{launcher}", shutil.which(argv[0]) or argv[0], *argv[1:]]
    return [*(view.enter() if view else []), *drop_privileges(setpriv, uid, group), *if_server_lives, *argv]


def working_view(binary: str, *, kvm: bool) -> View:
    """A view in which QEMU runs.

    Raises:
        JailError: QEMU runs in no view here.
    """
    try:
        launcher = seccomp.launcher()
    except OSError as error:
        raise JailError(str(error)) from error
    try:
        view = View.make(binary, kvm=kvm)
        uid = TRIAL_UID if os.geteuid() == 0 else None
        command = inside(view, uid, [binary, "--version"], launcher=launcher)
        environment = {"PATH": os.defpath}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", pass_fds=(launcher,))
    finally:
        os.close(launcher)
    if ran.returncode:
        view.close()
        told = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise JailError(f"{binary} does not run in a view of its own: {told[-1]}")
    return view


def found_groups() -> Cgroups | None:
    """This host's control groups that the server may write; None if there are none."""
    try:
        return Cgroups.find(MOUNTS.read_text(), MEMBERSHIP.read_text())
    except OSError:
        return None


def tried(groups: Cgroups, server: str) -> str:
    """The reason why a group can't be made after all; empty if one can."""
    try:
        groups.make(server, "try", Limits(memory=64 << 20, cpus=1, threads=1)).remove()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""
