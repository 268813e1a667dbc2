"""What stands round a machine, and what one sandbox may learn of another, of the template or of the host."""

import fcntl
import os
import re
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.guest.client import KEY, Sandbox, Server, until

CANARY = "canary-7f3a9c51e2"


def status(path: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


@pytest.fixture
def machines(server: Server) -> set[int]:
    """Every QEMU of the server: in the pool, and with a sandbox."""
    until(server.pool_ready, 60)
    found = server.machines()
    assert found
    return found


def test_process_has_no_power(box: Sandbox, machines: set[int]) -> None:
    """Every thread of a QEMU runs without capabilities, can't gain any, and under seccomp."""
    for pid in machines:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        assert len(threads) > 1
        for thread in threads:
            found = status(thread / "status")
            assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give machines users of their own; `doctor` says so")
def test_process_has_its_own_user(box: Sandbox, machines: set[int]) -> None:
    """Every QEMU runs as a user and a group that nobody else has, in no other group, with an empty bounding set."""
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
    """A QEMU has no open file with a name that it could write, no listening socket, and nothing of the server's."""
    for pid in machines:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = str(fd.readlink())
            flags = int(re.search(r"flags:\t(\d+)", Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text())[1], 8)
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            named = target.startswith("/") and not target.startswith(("/dev/", "/memfd:")) and "(deleted)" not in target
            assert not (named and writable), target
            assert "cellvm.db" not in target
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_template_memory_is_sealed(machines: set[int]) -> None:
    """What all machines share of a template's memory and state can't be written by anybody any more."""
    sealed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    for pid in machines:
        shared = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()).startswith("/memfd:")]
        assert shared
        for fd in shared:
            with fd.open("rb") as opened:
                assert fcntl.fcntl(opened, fcntl.F_GET_SEALS) & sealed == sealed
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        assert not [line for line in maps if "/memfd:memory" in line and "s" in line.split()[1]]


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
    """What one sandbox writes (memory, files, as root too) is in no other, whether it lived before or comes after."""
    with server.sandbox(envVars={"SECRET_OF_ONE": CANARY}) as writer, ExitStack() as stack:
        assert writer.execute(MARK)["error"] is None
        for _ in range(2):  # one from the pool as it was, one that was restored since
            later = stack.enter_context(server.sandbox())
            assert later.value(LOOK) == []
            assert CANARY not in str(later.get("/envs").json())
            until(server.pool_ready, 60)
        assert box.value(LOOK) == []
        assert len(writer.value(LOOK)) == 7


def test_nothing_of_the_dead(server: Server) -> None:
    """A sandbox that comes after another ended finds nothing of it, on the raw disk either."""
    with server.sandbox() as writer:
        writer.execute(MARK)
        writer.shell("sync")
    with server.sandbox() as later:
        assert later.value(LOOK) == []
        assert later.shell(f"sudo head -c 300M /dev/vdb | grep -c {CANARY}; true", timeout=100) == "0\n"


def test_guest_does_not_see_the_host(box: Sandbox) -> None:
    """No variable, host name or path of the server's is visible inside; the host's key is not either."""
    seen = str(box.get("/envs").json()) + box.shell(
        "cat /proc/cmdline /proc/mounts /etc/hosts; sudo cat /proc/1/environ"
    )
    host = [KEY, str(box.server.data), os.uname().nodename, "CELLVM_"]
    assert [word for word in host if word in seen] == []


def test_guest_has_no_network(box: Sandbox) -> None:
    """There is no network yet: nothing but the loopback, so neither the host nor others can be reached."""
    assert box.shell("ls /sys/class/net").split() == ["lo"]
    assert box.run("curl", "-sm", "5", box.server.url + "/health")["exitCode"] != 0


def every_command_line() -> str:
    texts = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                texts.append((process / name).read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue  # ended meanwhile, or not ours
    return "\n".join(texts)


def test_secrets_stay_inside(server: Server) -> None:
    """A secret handed in by any way is in no log, no command line or environment on the host, and no file of ours."""
    secrets: dict[str, Any] = {
        name: f"{CANARY}-{name}" for name in ("env", "own", "stdin", "arg", "code", "file", "error")
    }
    with server.sandbox(envVars={"TOKEN": secrets["env"]}) as sandbox:
        assert sandbox.shell("echo $TOKEN") == secrets["env"] + "\n"
        sandbox.run("cat", "/dev/stdin", secrets["arg"], envVars={"OWN": secrets["own"]}, stdin=secrets["stdin"])
        sandbox.execute(f"secret = '{secrets['code']}'")
        sandbox.execute(f"raise ValueError('{secrets['error']}')")
        sandbox.upload(f"/home/user/{secrets['file']}", secrets["file"])
        sandbox.download(f"/no/{secrets['file']}")
        sandbox.post("/processes", json={"cmd": secrets["arg"]})
        sandbox.post("/processes", json={"cmd": secrets["arg"], "envVars": 7})
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
    """Only the server's user may read its data; keys are stored as hashes."""
    assert server.data.stat().st_mode & 0o077 == 0
    for path in server.data.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path
    with closing(sqlite3.connect(f"file:{server.data}/cellvm.db?mode=ro", uri=True)) as database:
        ((stored,),) = database.execute("SELECT hash FROM keys").fetchall()
    assert len(stored) == 32
