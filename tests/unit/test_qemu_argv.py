"""QEMU's command line is compared with a file, and the arguments that secure the host are checked one by one."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest

from kernel_gateway.drivers.qemu_argv import Descriptors, Machine, drop_privileges, qemu

SNAPSHOT = Path(__file__).parent / "qemu_argv.txt"
FDS = Descriptors(kernel=10, initrd=11, memory=12, root=13, disk=14, channel=15, qmp=16, console=17, tap=18)
BLESS = f"BLESS=1 python -m pytest tests/unit/{Path(__file__).name}"
CASES = [(accelerator, template) for accelerator in ("tcg", "kvm") for template in (True, False)]


def argv(accelerator: str, template: bool) -> list[str]:
    machine = Machine(accelerator, 2, 2048, 2_596_146 if accelerator == "tcg" else 0)
    return qemu("qemu-system-x86_64", machine, FDS, template=template)


def render(command: list[str]) -> str:
    """Put each option on a line."""
    text = ""
    for word in command:
        text += ("\n    " if word.startswith("-") else " " if text else "") + word
    return text


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(command) if option == name]


def test_the_whole_command_line() -> None:
    """Every argument is known, for both accelerators, for a template's boot and for a restore."""
    found = "".join(
        f"{accelerator}, {'template' if template else 'restore'}\n{render(argv(accelerator, template))}\n\n"
        for accelerator, template in CASES
    )
    found += "privileges\n" + render(drop_privileges("setpriv", 4242)) + "\n"
    if os.environ.get("BLESS"):
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text(), f"the command line has changed; if that is meant: {BLESS}"


@pytest.mark.parametrize(("accelerator", "template"), CASES)
def test_the_boundary(accelerator: str, template: bool) -> None:
    """QEMU has a full seccomp sandbox, no default devices, one network card, only QMP, and opens no file by path."""
    command = argv(accelerator, template)
    assert options(command, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(command)
    assert options(command, "-monitor") == options(command, "-display") == ["none"]
    assert options(command, "-netdev") == ["tap,id=net,fd=18,vhost=off"]
    assert not {"-net", "-nic", "-vnc", "-usb", "-virtfs", "-fsdev", "-daemonize"} & set(command)
    assert len([word for word in command if "net-device" in word]) == 1
    assert not [word for word in command if "vhost=on" in word or "vhost-" in word or "9p" in word]
    paths = [part for word in command for part in word.split(",") if "/" in part]
    allowed = ("/proc/self/fd/", "/dev/fdset/", "/dev/urandom")
    assert paths
    assert all(path.split("=")[-1].startswith(allowed) for path in paths), paths


def test_without_a_tap_there_is_no_card() -> None:
    """Where the network is off the machine has no network device."""
    command = qemu("qemu", Machine("tcg", 2, 2048), dataclasses.replace(FDS, tap=None), template=False)
    assert not [word for word in command if "net" in word]
    assert dataclasses.replace(FDS, tap=None).all() == tuple(range(10, 18))


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_a_restored_machine_can_not_change_the_template(accelerator: str) -> None:
    """RAM is mapped privately and the root is read-only. Only the template's own boot writes the memory file."""
    (ram,) = [value for value in options(argv(accelerator, False), "-object") if "id=ram" in value]
    assert "share=off" in ram.split(",")
    (ram,) = [value for value in options(argv(accelerator, True), "-object") if "id=ram" in value]
    assert "share=on" in ram.split(",")
    roots = [value for value in options(argv(accelerator, False), "-blockdev") if "node-name=root" in value]
    assert len(roots) == 2
    assert all("read-only=on" in value for value in roots)


@pytest.mark.parametrize(("accelerator", "template"), CASES)
def test_the_guests_disk_is_throttled(accelerator: str, template: bool) -> None:
    """The guest's disk is behind a limit of operations and bytes, and no other node leads to the disk."""
    command = argv(accelerator, template)
    (limits,) = [json.loads(value) for value in options(command, "-object") if "throttle-group" in value]
    assert limits["limits"]["iops-total"] == 20_000
    assert limits["limits"]["bps-total"] == 400_000_000
    (node,) = [value for value in options(command, "-blockdev") if "node-name=disk," in value]
    assert {"driver=throttle", f"throttle-group={limits['id']}"} <= set(node.split(","))
    assert [value.split(",")[1] for value in options(command, "-device") if "blk" in value] == [
        "drive=root",
        "drive=disk",
    ]


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_only_a_restored_machine_waits(accelerator: str) -> None:
    """A restored machine equals the template's except for the place of its RAM, and it waits for its state."""
    template, restored = argv(accelerator, True), argv(accelerator, False)
    assert restored[-3:] == ["-S", "-incoming", "defer"]
    different = [(a, b) for a, b in zip(template, restored[:-3], strict=True) if a != b]
    assert len(different) == 1
    assert different[0][0].replace("share=on", "share=off") == different[0][1]


def test_privileges_are_dropped_before_qemu_starts() -> None:
    """Root becomes a user without groups or capabilities. Every QEMU can gain none, and dies with the server."""
    prefix = drop_privileges("setpriv", 4242)
    assert {"--reuid=4242", "--regid=4242", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"} <= set(prefix)
    assert not [word for word in drop_privileges("setpriv", None) if "uid" in word]
    assert "--groups=36" in drop_privileges("setpriv", 4242, 36)
    assert "--clear-groups" not in drop_privileges("setpriv", 4242, 36)
    for uid in (4242, None):
        assert drop_privileges("setpriv", uid)[-3:] == ["--no-new-privs", "--pdeathsig=KILL", "--"]


def test_only_an_emulated_guest_is_told_its_clocks_rate() -> None:
    """An emulated guest is told its counter's rate and the length of busy waits. KVM's guest has kvm-clock."""
    (told,) = options(argv("tcg", True), "-append")
    assert told.split()[-2:] == ["tsc_early_khz=2596146", "lpj=10384584"]
    (told,) = options(argv("kvm", True), "-append")
    assert "tsc_early_khz" not in told
    assert "lpj" not in told


def test_no_processor_under_kvm_has_what_only_hosts_use() -> None:
    """The guest has no performance counters, no virtualization, and no register that some nested hosts can't read."""
    (cpu,) = options(argv("kvm", False), "-cpu")
    assert set(cpu.split(",")) == {"host", "-svm", "-vmx", "-arch-capabilities", "pmu=off"}
