"""The walls round a machine, and what one sandbox may learn of another, of the template or of the host."""

import ctypes
import fcntl
import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.drivers.cgroup import CONTROLLERS, Cgroups
from kernel_gateway.drivers.jail import (
    FIRST_UID,
    UIDS,
    block_of,
    found_groups,
    inside,
    opened_for_machines,
    working_view,
)
from tests.guest.client import CELLVM, KEY, Sandbox, Server, comm, until

CANARY = "canary-" + secrets.token_hex(5)
NAMESPACES = ("mnt", "net", "ipc", "uts")
as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give machines users of their own; `doctor` says so"
)


def status(path: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def settled(server: Server) -> set[int]:
    """Every QEMU of the server, when none is being started. A QEMU that is being started is in no control group yet."""
    until(server.pool_ready, 60)
    found = server.machines()
    assert found
    return found


@pytest.fixture
def machines(server: Server) -> set[int]:
    """Every QEMU of the server that all tests share."""
    return settled(server)


def test_process_has_no_power(box: Sandbox, machines: set[int]) -> None:
    """Every thread of a QEMU runs without capabilities, can't gain any, and under two filters, ours and QEMU's."""
    for pid in machines:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        assert len(threads) > 1
        for thread in threads:
            found = status(thread / "status")
            assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
            assert int(found["Seccomp_filters"]) >= 2


@as_root
def test_process_has_its_own_user(box: Sandbox, machines: set[int]) -> None:
    """Every QEMU runs as its own user and group, is in no other group, and has an empty bounding set."""
    uids = set()
    for pid in machines:
        found = status(Path(f"/proc/{pid}/status"))
        (uid,), (gid,) = set(found["Uid"].split()), set(found["Gid"].split())
        assert uid == gid
        assert int(uid) >= 1 << 20
        assert found["Groups"].split() == []
        assert int(found["CapBnd"], 16) == 0
        uids.add(uid)
    assert len(uids) == len(machines)


def test_process_holds_no_files(box: Sandbox, machines: set[int]) -> None:
    """A QEMU has no named file open for writing, no listening socket, and no file of the server's."""
    for pid in machines:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = str(fd.readlink())
            flags = int(re.search(r"flags:\t(\d+)", Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text())[1], 8)
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            named = target.startswith("/") and not target.startswith(("/dev/", "/memfd:")) and "(deleted)" not in target
            assert not (named and writable), target
            assert "cellvm.db" not in target
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_ctrl_c_is_not_for_machines(machines: set[int]) -> None:
    """A QEMU has its own session without a terminal, because only the server should get Ctrl-C."""
    assert {os.getsid(pid) for pid in machines} == machines


def test_template_memory_is_sealed(machines: set[int]) -> None:
    """The memory and the state of a template, which all its machines share, can't be written by anybody."""
    sealed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    for pid in machines:
        shared = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()).startswith("/memfd:")]
        assert shared
        for fd in shared:
            with fd.open("rb") as opened:
                assert fcntl.fcntl(opened, fcntl.F_GET_SEALS) & sealed == sealed
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        assert not [line for line in maps if "/memfd:memory" in line and "s" in line.split()[1]]


# -- the jail


def test_process_has_a_view_of_its_own(server: Server, machines: set[int]) -> None:
    """A QEMU shares only the server's namespaces of processes and users, and sees only QEMU's own files."""
    for pid in machines:
        for name in NAMESPACES:
            assert Path(f"/proc/{pid}/ns/{name}").readlink() != Path(f"/proc/{server.pid}/ns/{name}").readlink()
        root = Path(f"/proc/{pid}/root")
        assert {each.name for each in root.iterdir()} <= {"bin", "dev", "etc", "lib", "lib64", "proc", "usr"}
        assert {each.name for each in (root / "usr").iterdir()} <= {"bin", "lib", "lib64", "share"}
        assert {each.name for each in (root / "usr/share").iterdir()} <= {"qemu", "seabios"}
        assert {each.name for each in (root / "etc").iterdir()} == {"ld.so.cache"}
        assert {each.name for each in (root / "dev").iterdir()} <= {"null", "urandom", "kvm"}
        mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
        for _, place, kind, options, *_ in mounts:
            flags = set(options.split(","))
            assert "ro" in flags or kind in ("proc", "devtmpfs"), place
            assert "nosuid" in flags or place.startswith("/dev/"), place


def test_limits_of_the_process(machines: set[int]) -> None:
    """A QEMU's soft and hard limits allow no core dumps, few open files, and no file longer than the disk."""
    for pid in machines:
        found = {
            match[1]: match[2].split()[:2]
            for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
            if (match := re.match(r"(Max [a-z ]+?)  +(.*)", line))
        }
        assert found["Max core file size"] == ["0", "0"]
        assert found["Max open files"] == ["256", "256"]
        (disk,) = (fd.stat().st_size for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.name == disk_of(pid))
        assert found["Max file size"] == [str(disk)] * 2


def disk_of(pid: int) -> str:
    """The descriptor of a machine's disk, which is a file without a name. QEMU has two descriptors, one a copy."""
    nameless = [
        fd.name
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if "(deleted)" in str(fd.readlink()) and not str(fd.readlink()).startswith("/memfd:")
    ]
    return nameless[0]


def groups_of(pid: int) -> dict[str, Path]:
    """The control groups of a process, by the controller that limits there."""
    found = found_groups()
    assert found, "nothing can be limited here; `doctor` says so"
    moved = Cgroups.find(Path("/proc/self/mountinfo").read_text(), Path(f"/proc/{pid}/cgroup").read_text())
    assert moved
    return {controller: place.path for place in moved.places for controller in place.controllers}


@as_root
def test_limits_of_the_control_group(server: Server, machines: set[int]) -> None:
    """Each QEMU is alone in its own control group, with limits of memory, processors and threads."""
    seen = set()
    for pid in machines:
        groups = groups_of(pid)
        assert set(groups) == set(CONTROLLERS)
        for path in groups.values():
            assert path.name == str(pid)
            assert path not in groups_of(server.pid).values()
            assert (path / "cgroup.procs").read_text().split() == [str(pid)]
        memory = int(first_of(groups["memory"], "memory.limit_in_bytes", "memory.max"))
        assert 2 * 2048 << 20 < memory < 5 << 30
        assert first_of(groups["cpu"], "cpu.cfs_quota_us", "cpu.max").split()[0] == "250000"
        assert first_of(groups["pids"], "pids.max") == "128"
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) < 128
        seen.add(groups["memory"])
    assert len(seen) == len(machines)


def first_of(path: Path, *names: str) -> str:
    """The content of the first of these files that exists."""
    return next((path / name).read_text().strip() for name in names if (path / name).exists())


@as_root
def test_a_machine_over_its_memory(server: Server) -> None:
    """A QEMU that takes too much memory dies like any other. The log says why, and its group is gone."""
    with server.sandbox(template="base") as sandbox:
        pid = machine_of(server, sandbox)
        path = groups_of(pid)["memory"]
        file = path / ("memory.limit_in_bytes" if (path / "memory.limit_in_bytes").exists() else "memory.max")
        used = int(first_of(path, "memory.usage_in_bytes", "memory.current"))
        swap = path / "memory.memsw.limit_in_bytes"
        file.write_text(str(used + (32 << 20)))
        if swap.exists():
            swap.write_text(str(used + (32 << 20)))
        answer = sandbox.post("/execute", json={"code": "x = b'1' * (200 << 20)"})
        assert (answer.status_code, answer.json()["error"]) == (502, "sandbox_died"), answer.text
        until(lambda: not path.exists(), 5)
        assert sandbox.get("").status_code == 404
    assert f"machine {pid} was killed: it took more memory of the host than it may" in server.log.read_text()


def machine_of(server: Server, sandbox: Sandbox) -> int:
    """The QEMU of a sandbox. It is found because it uses the processor when the sandbox works."""
    before = {pid: ticks(pid) for pid in server.machines()}
    sandbox.shell("for i in $(seq 20000); do :; done")
    return max(before, key=lambda pid: ticks(pid) - before[pid])


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# This runs as a machine's user in its namespaces. It loads its modules first, because the view has none.
PROBE = """
import ctypes, json, os, socket, sys
asked = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
namespaces = [os.open(f"/proc/{asked['pid']}/ns/{name}", os.O_RDONLY) for name in asked["namespaces"]]
for fd in namespaces:
    assert libc.setns(fd, 0) == 0, os.strerror(ctypes.get_errno())
    os.close(fd)
os.setgroups([])
os.setresgid(*[asked["uid"]] * 3)
os.setresuid(*[asked["uid"]] * 3)
assert libc.prctl(4, 1, 0, 0, 0) == 0  # dumpable again, as a program that was started as this user would be

def tried(what):
    try:
        return {"could": str(what())}
    except OSError as error:
        return {"could": None, "why": error.errno and os.strerror(error.errno)}

def read(path):
    return os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(100)

def connect(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(5)
        sock.connect(address)

def attach(pid):
    if libc.ptrace(16, pid, 0, 0):
        raise OSError(ctypes.get_errno(), "")

def read_memory(pid):
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    if libc.process_vm_readv(pid, vector, 1, vector, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "")

print(json.dumps({
    "self": {"uid": os.getuid(), "host": os.uname().nodename, "pid": os.getpid(),
             "status": "Seccomp" in open("/proc/self/status").read()},
    "seen": {path: sorted(os.listdir(path)) for path in ("/", "/dev", "/etc", "/usr", "/usr/share", "/proc")},
    "net": [name for _, name in socket.if_nameindex()],
    "read": {path: tried(lambda: read(path)) for path in asked["read"]},
    "write": {path: tried(lambda: open(path, "wb")) for path in asked["write"]},
    "signal": {pid: tried(lambda: os.kill(int(pid), 0)) for pid in asked["others"]},
    "attach": {pid: tried(lambda: attach(int(pid))) for pid in asked["others"]},
    "memory": {pid: tried(lambda: read_memory(int(pid))) for pid in asked["others"]},
    "tcp": tried(lambda: connect(socket.AF_INET, ("127.0.0.1", asked["port"]))),
    "abstract": tried(lambda: connect(socket.AF_UNIX, chr(0) + asked["abstract"])),
    "mount": tried(lambda: libc.mount(b"none", b"/proc", b"tmpfs", 0, None) and os.stat("/none")),
}))
"""


@as_root
def test_what_a_machines_user_can_reach(server: Server, box: Sandbox, machines: set[int]) -> None:
    """A13: a program with a QEMU's user and namespaces can't read another machine, the server or the host. It reaches
    no socket of the host's, and sees exactly QEMU's own files.

    The program has more power than code that breaks out of a guest, because QEMU's seccomp filter does not hold for it.
    """
    machine, *others = sorted(machines)
    assert others
    uid = Path(f"/proc/{machine}").stat().st_uid
    port = int(server.url.rsplit(":", 1)[1])
    cache = Path.home() / ".cache/cellvm"
    assert cache.is_dir()
    foreign = [server.pid, 1, os.getpid(), *others]
    read = [
        *map(str, (server.data, server.data / "cellvm.db", server.log, cache)),
        "/etc/shadow", "/etc/passwd", "/etc/hostname", "/root", "/home", "/tmp", "/var", "/run", "/sys", "/proc/sys",
        "/proc/cmdline", "/proc/cpuinfo", "/proc/kallsyms", "/proc/net/unix", "/dev/vda", "/dev/kmsg", "/dev/mem",
        *(f"/proc/{pid}/{name}" for pid in foreign for name in ("environ", "cmdline", "fd", "root", "mem", "status")),
    ]  # fmt: skip
    write = ["/file", "/etc/ld.so.cache", "/usr/bin/env", "/usr/lib/file", "/dev/file", "/usr/share/qemu/file"]
    with socket.socket(socket.AF_UNIX) as listener:
        abstract = f"cellvm-test-{os.getpid()}"
        listener.bind("\0" + abstract)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as control:
            control.connect("\0" + abstract)  # outside of the view the socket can be reached
        asked = {
            "pid": machine, "uid": uid, "namespaces": ["net", "ipc", "uts", "mnt"], "read": read, "write": write,
            "others": [str(pid) for pid in foreign], "port": port, "abstract": abstract,
        }  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", PROBE, json.dumps(asked)], capture_output=True, text=True, timeout=60
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["self"] == {"uid": uid, "host": "sandbox", "pid": found["self"]["pid"], "status": True}
    seen = found["seen"]
    assert set(seen["/"]) <= {"bin", "dev", "etc", "lib", "lib64", "proc", "usr"}
    assert set(seen["/dev"]) <= {"null", "urandom", "kvm"}
    assert (seen["/etc"], seen["/usr/share"]) == (["ld.so.cache"], ["qemu", "seabios"])
    assert set(seen["/usr"]) <= {"bin", "lib", "lib64", "share"}
    processes = {name for name in seen["/proc"] if name.isdigit()}
    assert processes == {str(machine), str(found["self"]["pid"])}
    assert set(seen["/proc"]) - processes <= {"self", "thread-self"}
    assert found["net"] == ["lo"]
    for what in ("read", "write", "signal", "attach", "memory"):
        assert [each for each, came in found[what].items() if came["could"] is not None] == [], what
    assert {came["why"] for came in found["read"].values()} == {"No such file or directory"}
    assert found["tcp"] == {"could": None, "why": "Network is unreachable"}
    assert found["abstract"] == {"could": None, "why": "Connection refused"}
    assert found["mount"]["could"] is None


NOBODY = 65_533
LOOK_ROUND = """
for pid in {pids}; do
    for name in fd/0 fd/1 root exe cwd ns/mnt; do readlink /proc/$pid/$name && echo could $pid $name; done
    for name in environ maps mem auxv; do (exec 3</proc/$pid/$name) 2>/dev/null && echo could $pid $name; done
done
readlink /proc/self/fd/0 /proc/self/root >/dev/null && (exec 3</proc/self/mem) && echo looked
echo root: $(ls /) dev: $(ls /dev) etc: $(ls /etc) share: $(ls /usr/share)
echo net: $(tail -n +3 /proc/self/net/dev | cut -d: -f1)
touch /file /dev/file /etc/ld.so.cache 2>/dev/null && echo wrote
grep -E "^(Uid|CapEff|CapPrm|NoNewPrivs)" /proc/self/status
"""


def test_the_view_without_root() -> None:
    """A user who is not root gets the same view by user namespaces, and its machines can't look into each other."""
    if os.geteuid() == 0 and subprocess.run(["unshare", "--user", "true"], user=NOBODY).returncode:
        pytest.skip("this host gives user namespaces to root only; `doctor` says so")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(looked_round()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        pids, text, *changed = json.loads(answer.read())
    os.waitpid(child, 0)
    lines = text.splitlines()
    assert lines[0] == "looked", (pids, text)
    assert "wrote" not in lines
    assert changed == [["", "Read-only file system"], "an image"]
    assert lines[1] == "root: bin dev etc lib lib64 proc usr dev: null urandom etc: ld.so.cache share: qemu seabios"
    assert lines[2] == "net: lo"
    found = dict(line.split(":\t") for line in lines[3:])
    assert (found["CapPrm"], found["CapEff"], found["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")


def looked_round() -> tuple[list[int], str, list[str], str]:
    """Look round from one machine, in a process of its own, as a user who is not root. Returns the process ids of its
    server and of another machine, what it saw, its error when it wrote to an image, and the image's content."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, like a server that this user has started
        if not os.access(sys.executable, os.X_OK):  # it is in root's home
            sys.executable = "/usr/bin/python3"
    view = working_view("qemu-system-x86_64", kvm=False)
    with subprocess.Popen(inside(view, None, ["sleep", "60"])) as other:
        until(lambda: comm(other.pid) == "sleep", 10)
        pids = [os.getpid(), other.pid]
        script = LOOK_ROUND.format(pids=" ".join(map(str, pids)))
        ran = subprocess.run(inside(view, None, ["sh", "-c", script]), capture_output=True, text=True)
        other.kill()
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        image.write_text("an image")
        (fd,) = opened_for_machines([image])
        script = f"chmod 666 /proc/self/fd/{fd}; echo changed >>/proc/self/fd/{fd}"
        wrote = subprocess.run(inside(view, None, ["sh", "-c", script]), capture_output=True, text=True, pass_fds=[fd])
        said = [wrote.stdout, wrote.stderr.strip().rpartition(": ")[2]]
        return pids, ran.stdout, said, image.read_text()


def test_devices_of_the_guest(server: Server, box: Sandbox) -> None:
    """The guest has two disks, a serial line, randomness, a network card if there is a network, and nothing else."""
    kinds = {"net": "0x0001", "disk": "0x0002", "serial": "0x0003", "random": "0x0004"}
    found = Counter(box.shell("cat /sys/bus/virtio/devices/*/device").split())
    has_net = server.get("/health").json()["network"] != "off"
    assert found == Counter({kinds["disk"]: 2, kinds["serial"]: 1, kinds["random"]: 1, kinds["net"]: int(has_net)})
    assert box.shell("ls /sys/bus/pci/devices 2>/dev/null || true") == ""
    assert set(box.shell("ls /sys/block").split()) - {"vda", "vdb"} <= {f"loop{number}" for number in range(8)}
    assert box.shell("ls /dev/virtio-ports; ls -d /dev/vport* /dev/fb* /dev/input /dev/snd 2>/dev/null || true").split()
    assert "ttyS1" not in box.shell("cat /proc/tty/driver/serial 2>/dev/null; sudo cat /proc/tty/driver/serial")


def test_two_servers_share_nothing(server: Server, box: Sandbox, start_server: Callable[..., Server]) -> None:
    """Machines of two servers on one host have users of different blocks, and different namespaces."""
    machines = [settled(each) for each in (server, start_server(pool_size=1))]
    views = [{Path(f"/proc/{pid}/ns/mnt").readlink() for pid in each} for each in machines]
    assert [len(each) for each in views] == [1, 1]
    assert views[0] != views[1]
    if os.geteuid() == 0:
        blocks = [{block_of(Path(f"/proc/{pid}").stat().st_uid) for pid in each} for each in machines]
        assert [len(each) for each in blocks] == [1, 1]
        assert None not in blocks[0] | blocks[1]
        assert blocks[0] != blocks[1]


@pytest.mark.alone
@as_root
def test_nothing_is_left_of_a_killed_server(start_server: Callable[..., Server]) -> None:
    """After `kill -9` no process of the server's users is left. The next server removes the empty control groups."""
    server = start_server(pool_size=1)
    with ExitStack() as stack:
        stack.enter_context(server.sandbox())
        machines = settled(server)
        number = block_of(Path(f"/proc/{min(machines)}").stat().st_uid)
        assert number is not None
        groups = {path.parent for pid in machines for path in groups_of(pid).values()}
        assert {path.name for path in groups} == {f"cellvm-{number}"}
        mounts = Path("/proc/self/mountinfo").read_text()
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(comm(pid) for pid in machines), 1)
    assert users_processes(number) == []
    assert [path for path in groups if path.exists()]
    assert "cellvm" not in mounts
    successor = start_server(pool_size=0)
    left = [path for path in groups if any(path.glob("*/"))]
    assert left == []
    successor.close()
    assert [path for path in groups if path.exists()] == []


def users_processes(number: int) -> list[str]:
    """Processes that run as a user of this block."""
    first = FIRST_UID + number * UIDS
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            uid = int(status(process / "status")["Uid"].split()[0])
        except OSError:
            continue
        if first <= uid < first + UIDS and comm(int(process.name)):
            found.append(process.name)
    return found


MARK = f"""
import os
marker = b"{CANARY}" * 100_000
for path in ("/home/user/mark", "/tmp/mark", "/dev/shm/mark"):
    open(path, "wb").write(marker)
os.system("sudo sh -c 'echo {CANARY} > /etc/mark; echo {CANARY} > /opt/venv/mark'")
os.environ["MARK"] = "{CANARY}"
"""
LOOK = """
import glob, os
found = [path for path in ("/home/user/mark", "/tmp/mark", "/dev/shm/mark", "/etc/mark", "/opt/venv/mark")
         if os.path.exists(path)]
found + [name for name in ("marker", "MARK") if name in globals() or name in os.environ]
"""


def test_sandboxes_share_nothing(server: Server, box: Sandbox) -> None:
    """The memory and files that one sandbox writes, also as root, are in no other, earlier or later."""
    with server.sandbox(envVars={"SECRET_OF_ONE": CANARY}) as writer, ExitStack() as stack:
        assert writer.execute(MARK)["error"] is None
        for _ in range(2):  # the first was in the pool before, and the second was restored since
            later = stack.enter_context(server.sandbox())
            assert later.value(LOOK) == []
            assert CANARY not in str(later.get("/envs").json())
            until(server.pool_ready, 60)
        assert box.value(LOOK) == []
        assert len(writer.value(LOOK)) == 7


def test_nothing_of_the_dead(server: Server) -> None:
    """A sandbox finds nothing of an ended one, also on the raw disk."""
    with server.sandbox() as writer:
        writer.execute(MARK)
        writer.shell("sync")
    with server.sandbox() as later:
        assert later.value(LOOK) == []
        assert later.shell(f"sudo head -c 300M /dev/vdb | LC_ALL=C grep -acF {CANARY}; true", timeout=100) == "0\n"


def test_guest_does_not_see_the_host(box: Sandbox) -> None:
    """No variable, host name or path of the server is visible inside, and neither is the host's key."""
    seen = str(box.get("/envs").json()) + box.shell(
        "cat /proc/cmdline /proc/mounts /etc/hosts; sudo cat /proc/1/environ"
    )
    host = [KEY, str(box.server.data), "CELLVM_"]
    assert [word for word in host if word in seen] == []
    assert os.uname().nodename not in re.findall(r"[\w.-]+", seen)  # a whole word, because it may be as short as "vm"


def test_guest_does_not_reach_the_server(box: Sandbox) -> None:
    """A guest has at most one network card, and its 127.0.0.1 is itself."""
    assert set(box.shell("ls /sys/class/net").split()) <= {"lo", "eth0"}
    assert box.run("curl", "-sm", "5", box.server.url + "/health")["exitCode"] != 0


def every_command_line() -> str:
    texts = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                texts.append((process / name).read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue  # the process has ended, or is another user's
    return "\n".join(texts)


def test_secrets_stay_inside(server: Server) -> None:
    """A secret that came in any way is in no log, no command line, no environment on the host, and no file of ours."""
    given: dict[str, Any] = {
        name: f"{CANARY}-{name}" for name in ("env", "own", "stdin", "arg", "code", "file", "error")
    }
    with server.sandbox(envVars={"TOKEN": given["env"]}) as sandbox:
        assert sandbox.shell("echo $TOKEN") == given["env"] + "\n"
        sandbox.run("cat", "/dev/stdin", given["arg"], envVars={"OWN": given["own"]}, stdin=given["stdin"])
        sandbox.execute(f"secret = '{given['code']}'")
        sandbox.execute(f"raise ValueError('{given['error']}')")
        sandbox.upload(f"/home/user/{given['file']}", given["file"])
        sandbox.download(f"/no/{given['file']}")
        sandbox.post("/processes", json={"cmd": given["arg"]})
        sandbox.post("/processes", json={"cmd": given["arg"], "envVars": 7})
        lines = every_command_line()
    assert CANARY not in lines
    assert KEY not in re.sub(r"CELLVM_API_KEY=\S*?\0", "", lines)
    assert CANARY not in server.log.read_text()
    assert KEY not in server.log.read_text()
    for path in server.data.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content, path
            assert KEY.encode() not in content, path


def test_files_of_the_server_are_private(server: Server) -> None:
    """Only the server's user may read its data, and keys are stored as hashes."""
    assert server.data.stat().st_mode & 0o077 == 0
    for path in server.data.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path
    subprocess.run([CELLVM, "keys", "add", "hashed", "--data-dir", server.data], check=True, stdout=subprocess.DEVNULL)
    with closing(sqlite3.connect(f"file:{server.data}/cellvm.db?mode=ro", uri=True)) as database:
        ((stored,),) = database.execute("SELECT hash FROM keys WHERE name = 'hashed'").fetchall()
    assert len(stored) == 32
