"""Whose files these are: what the server trusts on disk must be its user's, and nobody else may write there.

Keys, images and snapshots are believed because they lie in the server's own directories. So a directory that another
user could write to, or could exchange for another, is refused, as ssh does with its keys (`StrictModes`).
"""

import grp
import os
import pwd
import stat
from pathlib import Path

OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
UID_MAP = Path("/proc/self/uid_map")
EVERYBODY = 2**32 - 1
"""User ids that the first user namespace has. A smaller number is another namespace."""


def private(path: Path) -> Path:
    """The directory at a path, which is made if it is missing. Everything on the way to it is looked at, too.

    Raises:
        PermissionError: somebody else owns it or may write to it; the text says who, and what to do.
        OSError: it can't be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in dict.fromkeys((path.absolute(), *path.absolute().parents, path.resolve(), *path.resolve().parents)):
        # In a sticky directory (/tmp) everybody may write, but nobody may exchange what is somebody else's.
        may_share = each.stat().st_mode & stat.S_ISVTX and each != path.resolve()
        for status in (each.lstat(), each.stat()):
            if why := foreign(status, may_share=bool(may_share) or stat.S_ISLNK(status.st_mode)):
                of = "" if each == path else f" of {path}"
                raise PermissionError(
                    f"{each}{of} {why}. Give it to user {os.geteuid()} alone (chown, chmod go-w), or choose another "
                    "directory"
                )
    return path


def foreign(status: os.stat_result, *, may_share: bool = False) -> str:
    """What makes a file or directory somebody else's; empty if nothing does.

    Args:
        may_share: whether others may write to it.
    """
    if status.st_uid not in _ours():
        return f"belongs to user {status.st_uid}"
    if may_share or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ""
    if status.st_mode & stat.S_IWOTH:
        return "may be written by everybody"
    return "" if _is_nobody_elses(status.st_gid) else f"may be written by group {status.st_gid}"


def _ours() -> set[int]:
    """Users who may change what this process trusts: itself and root, who can anyway."""
    ours = {os.geteuid(), 0}
    if int(UID_MAP.read_text().split()[2]) < EVERYBODY:
        # In a user namespace all users outside of it, and root among them, are one.
        ours.add(int(OVERFLOW_UID.read_text()))
    return ours


def _is_nobody_elses(gid: int) -> bool:
    """Whether a group has no member but this user, as the groups that Debian makes for each user."""
    ours = {user.pw_name for user in pwd.getpwall() if user.pw_uid in (os.geteuid(), 0)}
    try:
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        members = set()
    return members | {user.pw_name for user in pwd.getpwall() if user.pw_gid == gid} <= ours
