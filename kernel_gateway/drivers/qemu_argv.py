"""QEMU's command line, as a function of plain values. No I/O in here; `tests/unit/test_qemu_argv.py` shows the result.

Everything the machine may touch reaches it as an inherited file descriptor: no path, no socket in a directory, nothing
that another process could open. Why each choice:

- `microvm` with `acpi=on`: Debian's kernels find virtio-mmio devices through ACPI only. `pit`, `pic` and `rtc` stay on:
  without the TSC deadline timer (TCG) the guest would wait for ever.
- RAM is the template's sealed memory file, mapped privately (`share=off`): clones share its pages, none can change it.
- disks are opened by the server; QEMU sees descriptors in fd sets.
- no default devices, no monitor but QMP, full seccomp sandbox, no core dumps of guest memory, no page merging.
"""

import json
from dataclasses import astuple, dataclass

from kernel_gateway.drivers import GUEST_MAC

ROOT_SET, DISK_SET = 1, 2


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides whether a snapshot fits: changing any of it means another snapshot.

    `memory_mb` in MiB; `accelerator` is "kvm" or "tcg"; `tsc_khz` is the rate of an emulated processor's time stamp
    counter, which is the host's, or 0 where the guest has to measure it itself.
    """

    accelerator: str
    vcpus: int
    memory_mb: int
    tsc_khz: int = 0

    @property
    def ram_mb(self) -> int:
        """What the machine has: a little more than promised, for what the guest's kernel keeps to itself.

        Not only a courtesy: with exactly 2048 MiB the guest's kernel does not start on QEMU 10.0.2.
        """
        return self.memory_mb + 16


@dataclass(frozen=True, slots=True)
class Descriptors:
    """File descriptors that QEMU inherits. Without a `tap` the machine has no network card."""

    kernel: int
    initrd: int
    memory: int
    root: int
    disk: int
    channel: int
    qmp: int
    console: int
    tap: int | None = None

    def all(self) -> tuple[int, ...]:
        return tuple(fd for fd in astuple(self) if fd is not None)


# loglevel: the console tells how far a boot came. mitigations,
# init_on_alloc: inside one tenant's machine they cost much and protect nobody. tsc: emulated processors share one
# counter, which Linux does not know; without it the guest's clock and timers go in steps of 4 ms. panic=-1 with
# -no-reboot: a panic ends QEMU, and the server sees it at once. reboot=t: a triple fault is the one way that needs
# nothing of a firmware, because by another way some machines hang for ever.
KERNEL_COMMAND_LINE = (
    "console=ttyS0 loglevel=7 panic=-1 mitigations=off init_on_alloc=0 transparent_hugepage=madvise "
    "8250.nr_uarts=1 i8042.noaux random.trust_cpu=off tsc=reliable reboot=t"
)

TIMER_HZ = 250
"""Ticks a second of Debian's kernels (CONFIG_HZ)."""


def kernel_command_line(machine: Machine) -> str:
    """What the guest's kernel is told.

    An emulated guest is told the rate of its counter, and what follows from it for busy waiting (`lpj`), because on a
    busy host it can't measure them: the emulated timer that it measures against stands still while QEMU waits for its
    turn (docs/adr/0006). Under KVM kvm-clock tells the rate.
    """
    if not machine.tsc_khz:
        return KERNEL_COMMAND_LINE
    return f"{KERNEL_COMMAND_LINE} tsc_early_khz={machine.tsc_khz} lpj={machine.tsc_khz * 1000 // TIMER_HZ}"


# What one guest may take of the host's disk: more than a program that works with files needs, less than what stalls
# the neighbours. For one second it may be twice as much.
DISK_LIMITS = json.dumps(
    {
        "qom-type": "throttle-group",
        "id": "disk-limits",
        "limits": {
            "iops-total": 20_000,
            "iops-total-max": 40_000,
            "bps-total": 400_000_000,
            "bps-total-max": 800_000_000,
        },
    }
)


def drop_privileges(setpriv: str, uid: int | None, group: int | None = None) -> list[str]:
    """The prefix that makes the machine die with the server, own nothing, and run as `uid` (None: unchanged).

    Args:
        group: the one group that it is in besides, for a device; None for no group.
    """
    identity = (
        []
        if uid is None
        else [
            f"--reuid={uid}",
            f"--regid={uid}",
            "--clear-groups" if group is None else f"--groups={group}",
            "--bounding-set=-all",
        ]
    )
    # A server that is not root may have got some capabilities from systemd. setpriv sets the death signal after the
    # identity, which would clear it.
    return [setpriv, *identity, "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--pdeathsig=KILL", "--"]


def qemu(binary: str, machine: Machine, fds: Descriptors, *, template: bool) -> list[str]:
    """QEMU's arguments.

    Args:
        template: boot and keep RAM in the shared memory file, to be snapshot; else wait for an incoming snapshot.
    """
    if machine.accelerator == "kvm":
        # A sandbox needs no performance counters. The register that `arch-capabilities` brings ends QEMU on some nested
        # hosts.
        accelerator = ["-accel", "kvm", "-cpu", "host,-svm,-vmx,-arch-capabilities,pmu=off"]
    else:
        # The cache of translated code is private memory of each machine: bounded. With erms and fsrm the guest copies
        # with `rep movsb`, which TCG does byte by byte: without, copies are four times as fast. With AVX2 numpy sorts
        # wrongly, for QEMU before 10.0 gathers wrong elements (docs/adr/0008).
        # Not every feature can be taken from `max`: with `-svm` on 7.2.22 the guest's first static program aborts.
        accelerator = ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,-erms,-fsrm,-avx2"]
    card = [
        "-netdev", f"tap,id=net,fd={fds.tap},vhost=off",
        "-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC}",
    ]  # fmt: skip
    return [
        binary,
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-monitor", "none",
        "-no-reboot",
        "-machine", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,mem-merge=off,dump-guest-core=off,"
        "memory-backend=ram",
        *accelerator,
        "-smp", str(machine.vcpus),
        "-m", f"{machine.ram_mb}M",
        "-object", f"memory-backend-file,id=ram,size={machine.ram_mb}M,mem-path=/proc/self/fd/{fds.memory},"
        f"share={'on' if template else 'off'},prealloc=off",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-kernel", f"/proc/self/fd/{fds.kernel}",
        "-initrd", f"/proc/self/fd/{fds.initrd}",
        "-append", kernel_command_line(machine),
        "-add-fd", f"fd={fds.root},set={ROOT_SET}",
        "-add-fd", f"fd={fds.disk},set={DISK_SET}",
        "-blockdev", f"driver=file,node-name=root-file,filename=/dev/fdset/{ROOT_SET},read-only=on,locking=off",
        "-blockdev", "driver=raw,node-name=root,file=root-file,read-only=on",
        "-device", "virtio-blk-device,drive=root",
        "-blockdev", f"driver=file,node-name=disk-file,filename=/dev/fdset/{DISK_SET},discard=unmap,locking=off,"
        "aio=threads,cache.direct=off,cache.no-flush=on",
        "-blockdev", "driver=raw,node-name=disk-raw,file=disk-file,discard=unmap",
        "-object", DISK_LIMITS,
        "-blockdev", "driver=throttle,node-name=disk,file=disk-raw,throttle-group=disk-limits,discard=unmap",
        "-device", "virtio-blk-device,drive=disk,werror=report,rerror=report,discard=on",
        "-device", "virtio-serial-device,max_ports=2",
        "-chardev", f"socket,id=channel,fd={fds.channel}",
        "-device", "virtserialport,chardev=channel,name=cellvm",
        "-object", "rng-random,id=rng,filename=/dev/urandom",
        "-device", "virtio-rng-device,rng=rng",
        *(card if fds.tap is not None else []),
        "-chardev", f"socket,id=console,fd={fds.console}",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=qmp,fd={fds.qmp}",
        "-mon", "chardev=qmp,mode=control",
        *([] if template else ["-S", "-incoming", "defer"]),
    ]  # fmt: skip
