"""The filter of system calls, in the real kernel: a program runs under it, as QEMU does."""

import json
import os
import signal
import subprocess
import sys

import pytest

from kernel_gateway.drivers import seccomp

ENOSYS, EPERM = 38, 1
DENIED = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_getfd": 438,
    "pidfd_send_signal": 424, "kcmp": 312, "kill": 62, "tkill": 200, "rt_tgsigqueueinfo": 297,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "io_setup": 206, "add_key": 248, "request_key": 249, "keyctl": 250,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "swapon": 167,
    "setns": 308, "unshare": 272, "clone3": 435, "fork": 57, "vfork": 58, "execveat": 322,
    "setuid": 105, "setresuid": 117, "setgroups": 116, "capset": 126, "personality": 135,
    "connect": 42, "bind": 49, "listen": 50, "unlink": 87, "rename": 82, "mkdir": 83, "link": 86, "symlink": 88,
    "mknod": 133, "chmod": 90, "chown": 92, "truncate": 76, "setxattr": 188, "inotify_init": 253,
    "fanotify_init": 300, "landlock_create_ruleset": 444, "syslog": 103, "quotactl": 179, "acct": 163,
    "iopl": 172, "ioperm": 173, "modify_ldt": 154, "vmsplice": 278, "splice": 275, "tee": 276, "shmget": 29,
    "semget": 64, "msgget": 68, "mq_open": 240, "sched_setscheduler": 144, "setpriority": 141, "setrlimit": 160,
    "mbind": 237, "set_mempolicy": 238, "move_pages": 279, "pkey_alloc": 330, "settimeofday": 164,
    "clock_settime": 227, "adjtimex": 159, "sethostname": 170, "process_madvise": 440, "memfd_secret": 447,
}  # fmt: skip
"""Calls that QEMU has no use for, by the attacks that begin with them."""
UNDER_IT = """
import ctypes, errno, json, mmap, os, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)

def called(number, *arguments):
    ctypes.set_errno(0)
    return [libc.syscall(number, *map(ctypes.c_long, arguments)), ctypes.get_errno()]

def tried(what):
    try:
        return bool(what())
    except OSError as error:
        return error.errno

asked = json.loads(sys.argv[1])
if "machine_code" in asked:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(asked["machine_code"]))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    sys.exit("it went on")
thread = threading.Thread(target=lambda: asked.setdefault("threads", True))
thread.start()
thread.join()
print(json.dumps({
    "calls": {name: called(number, 0, 0, 0, 0, 0, 0) for name, number in asked["calls"].items()},
    "families": {family: tried(lambda: socket.socket(family)) for family in asked["families"]},
    "pairs": tried(lambda: socket.socketpair(socket.AF_UNIX)),
    "fork": tried(os.fork),
    "threads": asked["threads"],
    "open": sorted(set(os.listdir("/proc/self/fd")) - {"0", "1", "2"}),
}))
"""


def run_under_it(asked: dict[str, object]) -> subprocess.CompletedProcess[str]:
    launcher = seccomp.launcher()
    try:
        program = ["/usr/bin/env", "-i", sys.executable, "-I", "-S", "-c", UNDER_IT, json.dumps(asked)]
        command = ["setpriv", "--no-new-privs", "--", f"/proc/self/fd/{launcher}", *program]
        return subprocess.run(command, capture_output=True, text=True, pass_fds=[launcher], timeout=60)
    finally:
        os.close(launcher)


def test_what_can_be_called() -> None:
    """Threads and local sockets can be made. No other family of sockets, no process, and none of the denied calls can.
    The program that installs the filter leaves no descriptor behind."""
    ran = run_under_it({"calls": DENIED, "families": [1, 2, 10, 16, 17, 38]})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {name: came for name, came in found["calls"].items() if came != [-1, ENOSYS]} == {}
    assert found["families"] == {"1": True, "2": EPERM, "10": EPERM, "16": EPERM, "17": EPERM, "38": EPERM}
    assert (found["pairs"], found["fork"], found["threads"]) == (True, EPERM, True)
    assert len(found["open"]) == 1, "the listing's own"


@pytest.mark.parametrize(
    "machine_code",
    ["b814000000cd80c3", "b827000040 0f05c3".replace(" ", "")],
    ids=["a call of a 32-bit program (int 0x80)", "a call of x32"],
)
def test_other_numbers_of_calls(machine_code: str) -> None:
    """The other two tables of calls, whose numbers mean other calls, end the process."""
    ran = run_under_it({"machine_code": machine_code})
    assert ran.returncode == -signal.SIGSYS, ran


def test_nothing_runs_without_the_filter() -> None:
    """If the filter can't be installed, or its program not be run, the launcher ends instead."""
    cases = {126: (b"\0" * 8, "/bin/true"), 127: (seccomp.bpf(), "/nonexistent"), 0: (seccomp.bpf(), "/bin/true")}
    for status, (filter_, target) in cases.items():
        descriptor = os.memfd_create("launcher")
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        os.write(descriptor, seccomp.program(readable, filter_))
        os.close(descriptor)
        command = ["setpriv", "--no-new-privs", "--", f"/proc/self/fd/{readable}", target]
        assert subprocess.run(command, pass_fds=[readable]).returncode == status
        os.close(readable)


def test_the_list_is_one_list() -> None:
    """No call is on the list twice or on both lists, and the filter has every number of it."""
    names = [name for calls in seccomp.ALLOWED.values() for name in calls]
    numbers = [number for calls in seccomp.ALLOWED.values() for number in calls.values()]
    special = [*seccomp.ONE_FAMILY.values(), seccomp.CLONE]
    assert len(set(names)) == len(names)
    assert len({*numbers, *special}) == len(numbers) + len(special)
    assert not set(DENIED.values()) & {*numbers, *special}
    inside = {number for first, last in seccomp.ranges(numbers) for number in range(first, last + 1)}
    assert inside == set(numbers)
