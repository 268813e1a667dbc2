"""The service `filesystem.Filesystem` of E2B's clients: a shape over the files of a sandbox."""

import posixpath
import stat as modes
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta, Struct

from guest_agent import wire
from kernel_gateway.api.base import Call
from kernel_gateway.api.e2b.connect import Code, Failed
from kernel_gateway.api.e2b.process import Nothing, check_user, user_of
from kernel_gateway.errors import GuestFailure
from kernel_gateway.guest.files import Files, Watch

TYPES = {"file": "FILE_TYPE_FILE", "dir": "FILE_TYPE_DIRECTORY", "other": "FILE_TYPE_FILE"}
MAX_DEPTH = 100


class AtPath(Struct):
    path: str = ""


class ListDir(Struct):
    """`depth` 0 is 1, the directory itself."""

    path: str = ""
    depth: Annotated[int, Meta(ge=0)] = 1


class Move(Struct):
    source: str = ""
    destination: str = ""


class WatchDir(Struct):
    path: str = ""
    recursive: bool = False
    includeEntry: bool = False
    allowNetworkMounts: bool = False


class Watcher(Struct):
    watcherId: str = ""


class EntryInfo(Struct, omit_defaults=True):
    """A file or directory. `mode` are the permission bits, `permissions` the same as Go writes them."""

    name: str
    type: str
    path: str
    size: str
    mode: int
    permissions: str
    owner: str
    group: str
    modifiedTime: datetime
    symlinkTarget: str | None = None
    metadata: dict[str, str] = {}


class Found(Struct):
    entry: EntryInfo


class Entries(Struct):
    entries: list[EntryInfo]


class FilesystemEvent(Struct, omit_defaults=True):
    """Something that happened in a watched directory. `name` is a path from there."""

    name: str
    type: str
    entry: EntryInfo | None = None


class Events(Struct):
    events: list[FilesystemEvent]


def permissions(entry: wire.Entry) -> str:
    """An entry's mode as Go writes it."""
    if entry.target is not None:
        return "Lrwxrwxrwx"
    kind = modes.S_IFDIR if entry.kind == "dir" else modes.S_IFREG
    return modes.filemode(kind | (entry.mode & 0o777))


def info(entry: wire.Entry) -> EntryInfo:
    is_broken = entry.kind == "other" and entry.target is not None
    return EntryInfo(
        name=entry.name,
        type="FILE_TYPE_SYMLINK" if is_broken else TYPES[entry.kind],
        path=posixpath.normpath(entry.path),
        size=str(entry.size),
        mode=entry.mode & 0o777,
        permissions=permissions(entry),
        owner=entry.owner,
        group=entry.group,
        modifiedTime=datetime.fromtimestamp(max(0, min(entry.modified_ns, 2**62)) / 1e9, UTC),
        symlinkTarget=entry.target,
        metadata=entry.metadata,
    )


async def files_of(call: Call) -> Files:
    return await check_user(call, user_of(call))


async def stat(call: Call, body: AtPath) -> Found:
    """The entry at a path."""
    files = await files_of(call)
    return Found(info(await files.stat(body.path)))


async def list_dir(call: Call, body: ListDir) -> Entries:
    """The entries of a directory, and of those in it up to a depth."""
    files, holding = await files_of(call), call.http.hold("listings of directories")
    found = await files.tree(body.path, min(max(body.depth, 1), MAX_DEPTH), holding=holding)
    return Entries([info(entry) for entry in found])


async def make_dir(call: Call, body: AtPath) -> Found:
    """Make a directory with its parents."""
    files = await files_of(call)
    return Found(info(await files.make_dir(body.path, exclusive=True)))


async def move(call: Call, body: Move) -> Found:
    """Move a file or a tree."""
    files = await files_of(call)
    return Found(info(await files.move(body.source, body.destination)))


async def remove(call: Call, body: AtPath) -> Nothing:
    """Delete a file or a tree, if it is there."""
    files = await files_of(call)
    try:
        await files.delete(body.path)
    except GuestFailure as error:
        if error.code != "not_found":
            raise
    return Nothing()


async def told(files: Files, watch: Watch, changes: wire.Changes) -> list[FilesystemEvent]:
    """Changes as events.

    Raises:
        Failed: some were lost, so that the client can't know what has happened.
    """
    if changes.lost:
        raise Failed(Code.RESOURCE_EXHAUSTED, "more happened in the directory than could be noted; list it again")
    found = []
    for change in changes.changes:
        event = FilesystemEvent(change.name, f"EVENT_TYPE_{change.kind.upper()}")
        if watch.with_entries and change.kind in ("create", "write", "chmod"):
            with suppress(GuestFailure):  # it has gone since
                event.entry = info(await files.stat(f"{watch.path}/{change.name}"))
        found.append(event)
    return found


async def watch_dir(call: Call, body: WatchDir) -> AsyncGenerator[dict[str, Any], None]:
    """Tell what happens in a directory, as it happens."""
    files = await files_of(call)
    async with files.watch(body.path, is_recursive=body.recursive, with_entries=body.includeEntry) as watch:
        yield {"start": {}}
        while True:
            for event in await told(files, watch, await watch.next()):
                yield {"filesystem": event}


async def create_watcher(call: Call, body: WatchDir) -> Watcher:
    """Take note of what happens in a directory, for a client that asks for it."""
    files, watchers = await files_of(call), call.sandbox.watchers
    return Watcher(await watchers.add(files, body.path, is_recursive=body.recursive, with_entries=body.includeEntry))


async def get_watcher_events(call: Call, body: Watcher) -> Events:
    """What has happened in a watched directory since the last call."""
    files = await files_of(call)
    watch = call.sandbox.watchers.find(body.watcherId)
    found: list[FilesystemEvent] = []
    while True:
        changes = await watch.changes()
        found += await told(files, watch, changes)
        if len(changes.changes) < wire.MAX_CHANGES:
            break
    return Events(found)


async def remove_watcher(call: Call, body: Watcher) -> Nothing:
    """Take note no more."""
    call.sandbox.watchers.remove(body.watcherId)
    return Nothing()
