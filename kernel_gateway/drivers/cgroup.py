"""Limits that the host's kernel keeps for one machine: memory, processors, threads. Control groups, version 1 or 2.

Groups are made below the server's own one where that is possible, so that its limits apply to its machines, too.
Version 2 does not allow that while a group has processes of its own. Then the server, if it is alone in its group,
steps aside into a group within, or else the nearest group above is used.
"""

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

CONTROLLERS = ("cpu", "memory", "pids")
ASIDE = "cellvm-server"
"""The group into which the server steps aside, within its own."""
PERIOD = 100_000
"""Microseconds over which the use of processors is counted."""
MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one machine: `memory` in bytes, `cpus` in processors, `threads` as a number."""

    memory: int
    cpus: float
    threads: int

    def settings(self, version: int, controllers: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
        """File name, value, and whether the file must exist, in the order in which the values must be written."""
        quota = str(int(self.cpus * PERIOD))
        for controller in controllers:
            match controller, version:
                case "memory", 1:
                    yield "memory.limit_in_bytes", str(self.memory), True
                    yield "memory.memsw.limit_in_bytes", str(self.memory), False  # memory and swap together
                case "memory", _:
                    yield "memory.max", str(self.memory), True
                    yield "memory.swap.max", "0", False
                    yield "memory.oom.group", "1", False
                case "cpu", 1:
                    yield "cpu.cfs_period_us", str(PERIOD), True
                    yield "cpu.cfs_quota_us", quota, True
                case "cpu", _:
                    yield "cpu.max", f"{quota} {PERIOD}", True
                case "pids", _:
                    yield "pids.max", str(self.threads), True


@dataclass(frozen=True, slots=True)
class Place:
    """A directory to make groups in, and the controllers that it offers.

    `aside`: the server has to leave it first.
    """

    path: Path
    controllers: tuple[str, ...]
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Cgroups:
    """The places of machines' groups: one place for version 2, one for each hierarchy for version 1."""

    version: int
    places: tuple[Place, ...]

    @property
    def controllers(self) -> list[str]:
        return sorted(controller for place in self.places for controller in place.controllers)

    @classmethod
    def find(cls, mounts: str, membership: str) -> "Cgroups | None":
        """The places that this process could use; None if it can write none. Nothing is changed.

        Args:
            mounts, membership: the contents of MOUNTS and MEMBERSHIP.
        """
        own = {names: path for _, names, path in (line.split(":", 2) for line in membership.splitlines())}
        for version, look in ((1, _places_v1), (2, _places_v2)):
            if places := look(list(_mounts(mounts)), own):
                return cls(version, places)
        return None

    def make(self, server: str, name: str, limits: Limits) -> "Group":
        """A group for one machine, within one for its server, with its limits set.

        Raises:
            OSError: the group can't be made; nothing is left.
        """
        group = Group(tuple(place.path / server / name for place in self.places))
        try:
            for place, path in zip(self.places, group.paths, strict=True):
                if self.version == 2:
                    _hand_down(place, path.parent)
                path.mkdir(parents=True)
                for file, value, is_needed in limits.settings(self.version, place.controllers):
                    if is_needed or (path / file).exists():
                        (path / file).write_text(value)
        except OSError:
            group.remove()
            raise
        return group

    def servers(self) -> set[str]:
        """The names of all servers that have groups anywhere in these hierarchies."""
        return {path.name for path in self._all()}

    def remove(self, server: str) -> None:
        """Remove the groups that a dead server has left. Groups with processes in them stay."""
        for path in self._all():
            if path.name == server:
                for child in (*path.glob("*/"), path):
                    _remove(child)

    def _all(self) -> Iterator[Path]:
        roots = {_root(place.path) for place in self.places}
        for root in roots:
            for directory, names, _ in os.walk(root):
                for name in names:
                    if re.fullmatch(r"cellvm-\d+", name):
                        yield Path(directory, name)


@dataclass(frozen=True, slots=True)
class Group:
    """One machine's group: one directory, or one for each controller."""

    paths: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.paths[0].name

    def add(self, pid: int) -> None:
        """Move a process in, with all its threads. The kernel takes about 10 ms for that.

        Raises:
            OSError: the process could not be moved.
        """
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(pid))

    def was_out_of_memory(self) -> bool:
        """Whether the kernel has killed a process of the group because the group's memory ran out."""
        for path in self.paths:
            for file in ("memory.events", "memory.oom_control"):
                try:
                    text = (path / file).read_text()
                except OSError:
                    continue
                if re.search(r"^oom_kill [1-9]", text, re.MULTILINE):
                    return True
        return False

    def remove(self) -> bool:
        """Remove the group, and its server's group if that is empty now. Return whether this group is gone."""
        gone = [_remove(path) for path in self.paths]
        for path in self.paths:
            _remove(path.parent)
        return all(gone)


def _remove(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.EACCES):  # it is in use, or another user's
            log.warning("the group %s can't be removed: %s", path, error.strerror)
        return False
    return True


def _hand_down(place: Place, server: Path) -> None:
    """Let groups two levels below `place` have limits. In version 2 each level has to pass the controllers on."""
    if place.aside:
        aside = place.path / ASIDE
        aside.mkdir(exist_ok=True)
        (aside / "cgroup.procs").write_text(str(os.getpid()))
    server.mkdir(exist_ok=True)
    for path in (place.path, server):
        (path / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in place.controllers))


@dataclass(frozen=True, slots=True)
class _Mount:
    kind: str
    point: Path
    root: str
    options: tuple[str, ...]

    def directory(self, group: str) -> Path:
        """The directory of a process's group. In a container only a part of the hierarchy is mounted."""
        below = group.removeprefix(self.root) if group.startswith(self.root) else ""
        return self.point / below.strip("/")


def _mounts(text: str) -> Iterator[_Mount]:
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            yield _Mount(kind, Path(fields[4]), fields[3], tuple(options.split(",")))


def _places_v1(mounts: list[_Mount], own: dict[str, str]) -> tuple[Place, ...]:
    """The places of version 1, which has a hierarchy for each controller, or one for several."""
    found = []
    for mount in mounts:
        controllers = tuple(each for each in CONTROLLERS if mount.kind == "cgroup" and each in mount.options)
        group = next((path for names, path in own.items() if set(controllers) & set(names.split(","))), "/")
        if controllers and os.access(path := mount.directory(group), os.W_OK):
            found.append(Place(path, controllers))
    return tuple(found)


def _places_v2(mounts: list[_Mount], own: dict[str, str]) -> tuple[Place, ...]:
    """The place of version 2, which has one hierarchy: from ours upwards, the nearest group with most controllers."""
    for mount in (each for each in mounts if each.kind == "cgroup2"):
        path = mount.directory(own.get("", "/"))
        if path.name == ASIDE:  # the server has stepped aside before
            path = path.parent
        found = []
        for each in (path, *path.parents):
            if not each.is_relative_to(mount.point):
                break
            # Only the very top, which has no cgroup.type, may have both processes and groups with limits.
            aside = each == path and (each / "cgroup.type").exists()
            if place := _place_v2(each, aside=aside):
                found.append(place)
        if found:
            return (max(found, key=lambda place: len(place.controllers)),)
    return ()


def _place_v2(path: Path, *, aside: bool) -> Place | None:
    try:
        offered = (path / "cgroup.controllers").read_text().split()
        processes = (path / "cgroup.procs").read_text().split()
    except OSError:
        return None
    controllers = tuple(each for each in CONTROLLERS if each in offered)
    alone = set(processes) <= {str(os.getpid())}
    writable = os.access(path, os.W_OK) and os.access(path / "cgroup.subtree_control", os.W_OK)
    return Place(path, controllers, aside) if controllers and writable and (alone or not aside) else None


def _root(path: Path) -> Path:
    """The top of the hierarchy that a group is in."""
    while (path.parent / "cgroup.procs").exists():
        path = path.parent
    return path
