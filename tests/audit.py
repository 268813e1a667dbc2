"""`make audit`: known vulnerabilities of what the lock files pin, and security updates that guest images lack.

pip-audit asks the package index about the locks. The host's apt knows the newest versions in Debian's archive, security
updates included. What can't be looked at is told as such, because silence would read as safety. The exit status is 0
when all was looked at and nothing was found, 1 when something was found, and 2 when something could not be looked at.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

from kernel_gateway.images.cache import SUITE
from kernel_gateway.images.image import newest_images
from kernel_gateway.settings import Settings

LOCKS = (
    "requirements-dev.lock",
    "rootfs/requirements.lock",
    "tests/e2e/lab.lock",
    "docs/requirements.lock",
    "tests/e2e/mcp/python-2.3.0.lock",
)
KERNEL = "linux-image-cloud-amd64"
"""The package that always needs the newest kernel, whose own package has a new name with each version."""


class Unseen(Exception):
    """Something could not be looked at. The text says what, and why."""


def vulnerabilities(told: str) -> list[str]:
    """The findings in pip-audit's JSON.

    Raises:
        Unseen: it does not know of some packages.
    """
    packages = json.loads(told)["dependencies"]
    unseen = [each["name"] for each in packages if "skip_reason" in each]
    if unseen:
        raise Unseen(f"the index says nothing of {len(unseen)} of {len(packages)} packages: {', '.join(unseen[:5])} …")
    return [
        f"{each['name']} {each['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}"
        for each in packages
        for found in each["vulns"]
    ]


def look_at_lock(pip_audit: str, lock: Path) -> list[str]:
    """The findings of one lock file.

    Raises:
        Unseen: pip-audit gives none.
    """
    command = [pip_audit, "--require-hashes", "--disable-pip", "--format", "json", "--requirement", str(lock)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return vulnerabilities(ran.stdout)
    except ValueError as error:
        said = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise Unseen(f"pip-audit gives no findings: {said[-1]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unseen(str(error)) from error


def installed(text: str) -> dict[str, str]:
    """The packages of an image and their versions, from its file `packages`."""
    found = {}
    for line in text.splitlines():
        if line.endswith(".deb"):
            name, version, _ = line.split("_")
            found[KERNEL if name.startswith("linux-image-") else name] = unquote(version)
        else:
            name, version = line.split("\t")
            found[name.partition(":")[0]] = version
    return found


def in_archive(madison: str) -> dict[str, list[str]]:
    """The versions of each package that the release of the guests has, from `apt-cache madison`."""
    found: dict[str, list[str]] = {}
    for line in madison.splitlines():
        name, version, source = (part.strip() for part in line.split("|"))
        if any(f" {SUITE}{kind}/" in source for kind in ("", "-security", "-updates")):
            found.setdefault(name, []).append(version)
    return found


def look_at_image(image: Path) -> list[str]:
    """The packages of an image that Debian has newer versions of.

    Raises:
        Unseen: the host's apt does not know some of its packages.
    """
    packages = installed((image / "packages").read_text())
    try:
        asked = subprocess.run(["apt-cache", "madison", *packages], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unseen(str(error)) from error
    archive = in_archive(asked.stdout)
    if f" {SUITE}-security/" not in asked.stdout:
        raise Unseen(f"this host's apt knows no security updates of {SUITE}")
    if unseen := packages.keys() - archive.keys():
        raise Unseen(f"this host's apt knows nothing of {', '.join(sorted(unseen))}")
    return [
        f"{name} {version}: {SUITE} has {newer}; `cellvm build --refresh` takes it"
        for name, version in packages.items()
        if (newer := max_version(archive[name])) != version and is_older(version, newer)
    ]


def is_older(one: str, other: str) -> bool:
    return not subprocess.run(["dpkg", "--compare-versions", one, "lt", other]).returncode


def max_version(versions: list[str]) -> str:
    newest = versions[0]
    for version in versions[1:]:
        newest = version if is_older(newest, version) else newest
    return newest


def main(pip_audit: str, *locks: str) -> int:
    if os.geteuid() == 0:
        updated = subprocess.run(["apt-get", "-qq", "update"], capture_output=True, text=True)
        if updated.returncode:
            print(f"NOT SEEN  Debian's newest packages: {updated.stderr.strip()[-200:]}")
    images = newest_images(Settings.load({}, os.environ).cache_path)
    looks = [(lock, lambda lock=lock: look_at_lock(pip_audit, Path(lock))) for lock in locks or LOCKS]
    looks += [(f"image {image.name}", lambda image=image: look_at_image(image)) for image in images]
    found = unseen = 0
    for name, look in looks:
        try:
            findings = look()
        except Unseen as error:
            unseen += 1
            print(f"NOT SEEN  {name}: {error}")
            continue
        found += len(findings)
        print("\n".join([f"{'found' if findings else 'ok':<9} {name}", *(f"          {each}" for each in findings)]))
    print(f"{found} findings; {unseen} of {len(looks)} could not be looked at")
    return 1 if found else 2 if unseen else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
