"""An allow list of system calls round QEMU, besides QEMU's own filter, which is a list of what is denied.

The filter is a BPF program, which the kernel runs at each system call. It must be in force before QEMU's first
instruction, and nothing on a host installs a filter from a command line. So a program does it that is made here: a few
machine instructions that install the filter, close the program's own descriptor, and become the next program of the
command line. It is one file without a name for all machines of a server.

The list was learnt from machines that boot, restore, use disks, network and console, and end, on QEMU 7.2 and 10.0.
docs/adr/0016 says how to renew it. A call that is not on it fails as on a kernel that does not have it.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable

# Numbers of x86-64, from Linux's arch/x86/entry/syscalls/syscall_64.tbl.
ALLOWED = {
    "files": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "ioctl": 16, "pread64": 17,
        "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "dup": 32, "dup2": 33, "fcntl": 72, "flock": 73,
        "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78, "getcwd": 79, "open": 2, "readlink": 89,
        "fstatfs": 138, "statfs": 137, "fadvise64": 221, "getdents64": 217, "openat": 257, "newfstatat": 262,
        "readlinkat": 267, "faccessat": 269, "sync_file_range": 277, "fallocate": 285, "dup3": 292, "preadv": 295,
        "pwritev": 296, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "close_range": 436,
        "faccessat2": 439,
    },
    "memory": {
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
        "mlock": 149, "munlock": 150, "membarrier": 324, "memfd_create": 319,
    },
    "signals": {
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigtimedwait": 128,
        "rt_sigsuspend": 130, "sigaltstack": 131, "tgkill": 234, "signalfd": 282, "signalfd4": 289,
        "restart_syscall": 219,
    },
    "waiting": {
        "poll": 7, "select": 23, "sched_yield": 24, "pause": 34, "nanosleep": 35, "epoll_create": 213,
        "epoll_wait": 232, "epoll_ctl": 233, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "eventfd": 284,
        "eventfd2": 290, "epoll_create1": 291, "pipe": 22, "pipe2": 293, "epoll_pwait2": 441, "futex": 202,
        "clock_nanosleep": 230, "timer_create": 222, "timer_settime": 223, "timer_gettime": 224,
        "timer_getoverrun": 225, "timer_delete": 226, "timerfd_create": 283, "timerfd_settime": 286,
        "timerfd_gettime": 287, "setitimer": 38, "getitimer": 36,
    },
    "time": {"gettimeofday": 96, "times": 100, "time": 201, "clock_gettime": 228, "clock_getres": 229},
    "channels": {
        "accept": 43, "accept4": 288, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
        "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "recvmmsg": 299, "sendmmsg": 307,
    },
    "itself": {
        "getpid": 39, "gettid": 186, "getppid": 110, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
        "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgrp": 111, "getpgid": 121, "getsid": 124,
        "uname": 63, "sysinfo": 99, "getrusage": 98, "getrlimit": 97, "prlimit64": 302, "getcpu": 309,
        "sched_getaffinity": 204, "sched_getparam": 143, "sched_getscheduler": 145, "getpriority": 140,
        "getrandom": 318, "capget": 125,
    },
    "threads and programs": {
        "execve": 59, "exit": 60, "exit_group": 231, "arch_prctl": 158, "prctl": 157, "set_tid_address": 218,
        "set_robust_list": 273, "get_robust_list": 274, "rseq": 334, "seccomp": 317, "wait4": 61, "waitid": 247,
        "umask": 95, "chdir": 80,
    },
}  # fmt: skip
"""Calls that are allowed whatever their arguments. `execve` is for the command line; QEMU's own filter denies it."""
ONE_FAMILY = {"socket": 41, "socketpair": 53}
"""Calls that are allowed for AF_UNIX only."""
AF_UNIX = 1
CLONE, CLONE_THREAD = 56, 0x10000
"""`clone` makes threads only. Without `clone3` the C library makes them by `clone`."""

MFD_EXEC = 0x10
"""Source: linux/memfd.h."""
# Sources: linux/seccomp.h, linux/filter.h, linux/audit.h.
_KILL_PROCESS, _ERRNO, ALLOW, LOG = 0x80000000, 0x00050000, 0x7FFF0000, 0x7FFC0000
ABSENT, DENIED, KILLED = _ERRNO | 38, _ERRNO | 1, _KILL_PROCESS
"""What a call gets: ENOSYS, EPERM, or the end of the process."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
X86_64, X32 = 0xC000003E, 0x40000000
"""The architecture's number, and the bit of calls of its 32-bit form, which have numbers of their own."""


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`. The jumps count the instructions that are left out."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def bpf(otherwise: int = ABSENT) -> bytes:
    """The filter.

    Args:
        otherwise: what a call gets that is not on the list. LOG allows it, and the kernel's log tells it.
    """
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, X86_64, if_true=1),
        _instruction(_RETURN, KILLED),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, X32, if_false=1),
        _instruction(_RETURN, KILLED),
    ]
    for first, last in ranges(number for calls in ALLOWED.values() for number in calls.values()):
        program += [
            _instruction(_AT_LEAST, first, if_false=2),
            _instruction(_AT_LEAST, last + 1, if_true=1),
            _instruction(_RETURN, ALLOW),
        ]
    for number, test, value in (
        *((number, _EQUAL, AF_UNIX) for number in ONE_FAMILY.values()),
        (CLONE, _ANY_BIT, CLONE_THREAD),
    ):
        program += [
            _instruction(_EQUAL, number, if_false=4),
            _instruction(_LOAD, _FIRST_ARGUMENT),
            _instruction(test, value, if_false=1),
            _instruction(_RETURN, ALLOW),
            _instruction(_RETURN, DENIED),
        ]
    return b"".join([*program, _instruction(_RETURN, otherwise)])


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of neighbouring numbers, each as its first and its last one."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


_ADDRESS = 0x400000
_HEADERS = 64 + 56


def program(descriptor: int, filter_: bytes) -> bytes:
    """An ELF program `PROGRAM ARGUMENT…` that closes the descriptor, installs the filter, and becomes its arguments.

    It ends with status 126 if the filter can't be installed, and with 127 if its arguments can't be run.
    """

    def code(filter_header: int) -> bytes:
        return b"".join((
            b"\xbf", struct.pack("<I", descriptor),     # mov edi, descriptor
            b"\xb8\x03\0\0\0\x0f\x05",                  # close
            b"\xbf\x01\0\0\0\x31\xf6",                  # mov edi, SECCOMP_SET_MODE_FILTER; xor esi, esi
            b"\x48\xba", struct.pack("<Q", filter_header),  # mov rdx, filter's header
            b"\xb8\x3d\x01\0\0\x0f\x05",                # seccomp
            b"\xbf\x7e\0\0\0",                          # mov edi, 126
            b"\x48\x85\xc0\x75\x1d",                    # test rax, rax; jnz to `exit`
            b"\x48\x8b\x0c\x24",                        # mov rcx, [rsp]            the number of arguments
            b"\x48\x8d\x74\x24\x10",                    # lea rsi, [rsp + 16]       the arguments but the first
            b"\x48\x8b\x3e",                            # mov rdi, [rsi]
            b"\x48\x8d\x54\xcc\x10",                    # lea rdx, [rsp + 8 * rcx + 16]  the environment
            b"\xb8\x3b\0\0\0\x0f\x05",                  # execve
            b"\xbf\x7f\0\0\0",                          # mov edi, 127
            b"\xb8\x3c\0\0\0\x0f\x05",                  # exit
        ))  # fmt: skip

    start = _ADDRESS + _HEADERS
    after_code = start + len(code(0))
    header = struct.pack("<HxxxxxxQ", len(filter_) // 8, after_code + 16)  # `struct sock_fprog`
    body = code(after_code) + header + filter_
    size = _HEADERS + len(body)
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, start, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # an executable of x86-64 with one program header
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _ADDRESS, _ADDRESS, size, size, 4096)  # read and run
    return elf + segment + body


def _runnable_file() -> int:
    """A new memory file that may be run."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("launcher", flags | MFD_EXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:  # Linux before 6.3, where all can be run
            return os.memfd_create("launcher", flags)
        if error.errno == errno.EACCES:
            what = "QEMU's filter of system calls can't be installed: sysctl vm.memfd_noexec forbids it; 1 allows it"
            raise PermissionError(what) from error
        raise


def launcher(otherwise: int = ABSENT) -> int:
    """A file without a name that holds the program, as a descriptor that can be read and run. The caller closes it.

    Raises:
        OSError: this host runs no program in a memory file.
    """
    writable = _runnable_file()
    try:
        readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        os.write(writable, program(readable, bpf(otherwise)))
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
    finally:
        os.close(writable)  # because no file is run that somebody has open for writing
    return readable
