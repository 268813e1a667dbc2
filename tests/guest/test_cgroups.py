"""Control groups of version 2 in a real kernel. The guest's kernel is used, because a host may have version 1."""

import json
from pathlib import Path

from kernel_gateway.drivers import cgroup
from tests.guest.client import Sandbox

SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "/home/user")
from cgroup import MEMBERSHIP, MOUNTS, Cgroups, Limits

top = Path("/sys/fs/cgroup")
limits = Limits(memory=64 << 20, cpus=1.5, threads=20)
found = lambda: Cgroups.find(MOUNTS.read_text(), MEMBERSHIP.read_text())
place = lambda groups: [[str(each.path), list(each.controllers), each.aside] for each in groups.places]
settings = lambda group, *names: [(group.paths[0] / name).read_text().strip() for name in names]
told = {}

def run(group, code):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(1); " + code], stdin=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    group.add(child.pid)
    inside = Path(f"/proc/{child.pid}/cgroup").read_text().strip()
    busy = group.remove()
    child.communicate("x")
    return {"inside": inside, "busy": busy, "code": child.returncode, "starved": group.was_out_of_memory()}

def enter(name):
    (top / name).mkdir()
    (top / name / "cgroup.procs").write_text(str(os.getpid()))

# Alone at the very top of the hierarchy, which alone may have both processes and limited groups.
(top / "cgroup.procs").write_text(str(os.getpid()))
groups = found()
told["top"] = place(groups)
group = groups.make("cellvm-1", "11", limits)
told["limits"] = settings(group, "memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")
told["fine"] = run(group, "x = 1")
told["greedy"] = run(group, "x = bytearray(200 << 20)")
told["removed"] = [group.remove(), (top / "cellvm-1").exists()]
group = groups.make("cellvm-1", "12", limits)
told["forks"] = run(group, "import os\\nfor _ in range(40): os.fork() or __import__('time').sleep(1) or os._exit(0)")
groups.make("cellvm-2", "1", limits)
groups.remove("cellvm-2")
told["servers"] = sorted(groups.servers())
group.remove()
# A service: alone in a group of its own.
enter("service")
groups = found()
told["service"] = place(groups)
group = groups.make("cellvm-1", "13", limits)
told["aside"] = [MEMBERSHIP.read_text().strip(), str(group.paths[0]), *settings(group, "memory.max", "pids.max")]
told["again"] = place(found()) == told["service"]
told["gone"] = [group.remove(), (top / "service/cellvm-1").exists()]
# A shell: others are in the same group.
enter("session")
other = subprocess.Popen(["sleep", "60"])
told["session"] = place(found())
other.kill()
print(json.dumps(told))
"""


def test_version_2_on_a_real_kernel(box: Sandbox) -> None:
    """Groups are found, made, entered and removed, and limit processes, at the top, in a service and in a shell."""
    box.upload("/home/user/cgroup.py", Path(cgroup.__file__).read_bytes())
    box.upload("/home/user/try.py", SCRIPT)
    result = box.run("sudo", "python3", "/home/user/try.py", timeout=100)
    assert result["exitCode"] == 0, result["stderr"]
    told = json.loads(result["stdout"])
    top = ["/sys/fs/cgroup", ["cpu", "memory", "pids"], False]
    assert told["top"] == [top]
    assert told["limits"] == [str(64 << 20), "0", "1", "150000 100000", "20"]
    assert told["fine"] == {"inside": "0::/cellvm-1/11", "busy": False, "code": 0, "starved": False}
    assert told["greedy"] == {"inside": "0::/cellvm-1/11", "busy": False, "code": -9, "starved": True}
    assert told["removed"] == [True, False]
    assert told["forks"]["code"] == 1
    assert told["forks"]["starved"] is False
    assert told["servers"] == ["cellvm-1"]
    assert told["service"] == [["/sys/fs/cgroup/service", ["cpu", "memory", "pids"], True]]
    assert told["aside"] == [
        "0::/service/cellvm-server", "/sys/fs/cgroup/service/cellvm-1/13", str(64 << 20), "20"
    ]  # fmt: skip
    assert told["again"] is True
    assert told["gone"] == [True, False]
    assert told["session"] == [top]
