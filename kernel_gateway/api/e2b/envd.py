"""The files of a sandbox over plain HTTP, for E2B's clients: shapes over `guest/files`."""

import posixpath
import re
import zlib
from collections.abc import AsyncIterator

from msgspec import Struct
from multipart import MultipartSegment, parse_options_header

from guest_agent import wire
from kernel_gateway.api import commands, rest
from kernel_gateway.api.base import Call, Endpoint, Route
from kernel_gateway.api.e2b.filesystem import files_of
from kernel_gateway.api.e2b.plane import health
from kernel_gateway.api.e2b.process import check_user
from kernel_gateway.errors import GuestFailure, InvalidRequest, NotFound
from kernel_gateway.guest.files import Files

METADATA = "x-metadata-"
PIECE = 1024 * 1024
"""Bytes that a compressed upload is decompressed to at once."""


class FileQuery(Struct):
    """The file, and the user with whose rights it is read or written. The others are checked with the request."""

    path: str = ""
    username: str = ""


class WriteInfo(Struct, omit_defaults=True):
    """A file that was written."""

    name: str
    path: str
    type: str
    metadata: dict[str, str] = {}


async def files_for(call: Call) -> Files:
    """The files with the rights of the user that the query or the header names."""
    return await (check_user(call, call.query.username) if call.query.username else files_of(call))


async def download(call: Call) -> None:
    """A file's bytes."""
    files = await files_for(call)
    path = files.resolve(call.query.path)
    try:
        await rest.send_file(call.http, files, path, "inline")
    except GuestFailure as error:
        if error.code != "not_found":
            raise
        raise NotFound(f"path '{path[:1000]}' does not exist") from None


async def upload(call: Call) -> list[WriteInfo]:
    """Write files in place: parts named `file` of a multipart body, or the raw body as one file."""
    files, http = await files_for(call), call.http
    metadata = metadata_of(http)
    kind, _ = parse_options_header(http.request.headers.get("Content-Type", ""))
    if kind == "multipart/form-data":
        return await upload_parts(files, http, call.query.path, metadata)
    if kind != "application/octet-stream":
        raise InvalidRequest(f"an upload is multipart/form-data or application/octet-stream, not {kind[:100]!r}")
    if not call.query.path:
        raise InvalidRequest("a raw body needs `path` in the query")
    async with files.write(rest.file_path(call.query.path), in_place=True, metadata=metadata) as writing:
        async for data in decompressed(http):
            await writing.send(data)
        return [written(await writing.finish())]


async def upload_parts(files: Files, http: Endpoint, path: str, metadata: dict[str, str]) -> list[WriteInfo]:
    """Write the parts named `file`. Each has its path as its file name, unless the query has it."""
    found: list[WriteInfo] = []
    paths: set[str] = set()
    parts = rest.parts(http)
    async for part in parts:
        if not isinstance(part, MultipartSegment) or part.name != "file":
            continue  # what is in another part
        target = rest.file_path(path or rest.file_name(part))
        if not target:
            raise InvalidRequest("where to? send `path`, or a file name that is a path")
        if files.resolve(target) in paths:
            raise InvalidRequest(f"the upload has {target[:200]!r} twice")
        paths.add(files.resolve(target))
        async with files.write(target, in_place=True, metadata=metadata) as writing:
            while (data := await anext(parts)) is not None:
                await writing.send(data)
            found.append(written(await writing.finish()))
    if not found:
        raise InvalidRequest("the upload has no part named `file`")
    return found


def written(entry: wire.Entry) -> WriteInfo:
    return WriteInfo(entry.name, posixpath.normpath(entry.path), "file", metadata=entry.metadata)


def metadata_of(http: Endpoint) -> dict[str, str]:
    """A file's new metadata, from headers `X-Metadata-NAME: value`.

    Raises:
        InvalidRequest: a name or a value is not printable ASCII.
    """
    found = {}
    for name, value in http.request.headers.get_all():
        if name.lower().startswith(METADATA):
            key = name[len(METADATA) :].lower()
            if not re.fullmatch("[!-~]{1,200}", key) or not re.fullmatch("[ -~]{0,3000}", value):
                raise InvalidRequest("metadata of a file are printable ASCII: names to 200 characters, values to 3000")
            found[key] = value
    return found


async def decompressed(http: Endpoint) -> AsyncIterator[bytes]:
    """The body of an upload, as it comes.

    Raises:
        InvalidRequest: it is not encoded as its header says, or as nobody here can read.
    """
    encoding = http.request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise InvalidRequest(f"an upload is encoded as gzip or not at all, not as {encoding[:100]!r}")
    if encoding != "gzip":
        async for chunk in http.body_chunks():
            yield chunk
        return
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        async for chunk in http.body_chunks():
            while chunk and not stream.eof:
                if data := stream.decompress(chunk, PIECE):
                    yield data
                chunk = stream.unconsumed_tail
    except zlib.error as error:
        raise InvalidRequest(f"the body is not gzip: {error}") from None
    if not stream.eof:
        raise InvalidRequest("the body ends within its gzip data")


ROUTES = [
    Route("GET", "/health", health, status=204, public=True),
    Route("GET", "/files", download, query=FileQuery, produces="application/octet-stream"),
    Route("POST", "/files", upload, query=FileQuery, answer=list[WriteInfo], upload=True),
    Route("GET", "/envs", commands.envs, answer=dict),
    Route("GET", "/metrics", rest.metrics, answer=rest.MetricsModel),
]
