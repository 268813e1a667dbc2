"""Debian's backports have QEMU 10.0, and its main archive has 7.2. This tests the newer one."""

import subprocess
import tempfile
from pathlib import Path

from tests.guest.client import CELLVM

SUITE = "bookworm-backports"


def backports_qemu(directory: Path) -> Path:
    """Download QEMU from backports into a directory, by apt with its own settings. Returns a program that starts it."""
    program = directory / "qemu-system-x86_64"
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"], capture_output=True, text=True, check=True
    ).stdout
    mirror = next(line.split()[1] for line in targets.splitlines() if line.startswith("bookworm "))
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    for name in ("lists/partial", "archives/partial", "root"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    suites = "".join(f"deb [signed-by={keys}] {mirror} {suite} main\n" for suite in ("bookworm", SUITE))
    (directory / "sources.list").write_text(suites)
    places = {
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": directory / "lists",
        "Dir::Cache": directory,
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-q", *(word for name, value in places.items() for word in ("-o", f"{name}={value}"))]
    packages = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *(f"{name}/{SUITE}" for name in packages)], check=True, cwd=directory)
    for deb in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(directory / "root")], check=True)
    share = directory / "root/usr/share"
    program.write_text(
        f'#!/bin/sh\nexec {directory}/root/usr/bin/qemu-system-x86_64 -L {share}/qemu -L {share}/seabios "$@"\n'
    )
    program.chmod(0o755)
    return program


def test_newer_qemu(tmp_path: Path) -> None:
    """QEMU 10.0 builds, saves and restores a template like 7.2, with the same code."""
    # The program is outside of `tmp_path`, because machines run as users of their own and must reach it.
    with tempfile.TemporaryDirectory(prefix="cellvm-qemu-") as name:
        Path(name).chmod(0o755)
        build_and_run(backports_qemu(Path(name)), tmp_path)


def build_and_run(program: Path, tmp_path: Path) -> None:
    """Build `base` with this QEMU and run a file in it."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert " 10." in version
    (tmp_path / "cell.py").write_text("import os, sys\nprint(sys.version_info[:2], os.getcwd())\nprint(6 * 7)\n")
    command = [CELLVM, "run", "cell.py", "--template", "base", "--templates", "base", "--qemu", program]
    result = subprocess.run(
        [*command, "--data-dir", tmp_path / "data"], cwd=tmp_path, capture_output=True, text=True, timeout=170
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(3, 11) /home/user\n42\n"
