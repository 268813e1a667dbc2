"""Classes that a user's own Jupyter server loads so that JupyterLab works well with CellVM (docs/jupyterlab.md).

This module runs beside JupyterLab, on the client's machine. It needs jupyter_server and nothing else of this package.
It speaks HTTP with CellVM, and uses the address and the key that `jupyter lab --gateway-url` was given.
"""
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

import asyncio
import base64
import contextlib
import json
import mimetypes
import random
import struct
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import nbformat
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import AuthenticatedFileHandler
from jupyter_server.gateway.gateway_client import GatewayClient, gateway_request
from jupyter_server.gateway.managers import GatewayMappingKernelManager
from jupyter_server.services.contents.filecheckpoints import AsyncFileCheckpoints, AsyncGenericFileCheckpoints
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.services.contents.manager import AsyncContentsManager
from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect
from traitlets import Unicode, default

LARGEST_MESSAGE = 256 * 1024 * 1024
"""Bytes of one kernel message, either way. Tornado's own limit, 10 MiB, is less than one large figure."""
PING_INTERVAL = 30
"""Seconds between pings to the gateway. A gateway that does not answer a ping for as long is given up."""
FINAL = {1000, 4410}
"""Close codes after which connecting again is no use: another connection took over; the sandbox has ended."""
PIECE = 8 * 1024 * 1024
"""Bytes of a sandbox's file that are downloaded at a time."""


class GatewayConnection(BaseKernelWebsocketConnection):
    """One browser's connection to one kernel. Frames pass as they are, in the protocol that the browser has chosen.

    When the gateway is lost, this connects again and asks for all messages after the last one the browser got. The
    browser's messages wait meanwhile. If the gateway stays away, the browser is disconnected, so that its user can see
    it.
    """

    async def prepare(self) -> None:
        """Allow large messages from the browser, too. This is called before the browser is answered."""
        self.websocket_handler.settings.setdefault("websocket_max_message_size", LARGEST_MESSAGE)

    async def connect(self) -> None:
        """Called when the browser's side is open."""
        self.websocket_handler.set_nodelay(True)
        self._protocol = self.websocket_handler.selected_subprotocol
        self._gateway: WebSocketClientConnection | None = None
        self._waiting: list[str | bytes] = []
        self._left = False
        self._misses = 0
        self._relaying = asyncio.create_task(self._relay())

    def disconnect(self) -> None:  # type: ignore[override]  # it is not awaited
        """Called when the browser has left."""
        self._left = True
        if self._gateway is not None:
            self._gateway.close()

    def handle_incoming_message(self, incoming_msg: str | bytes) -> None:
        """Called with each message of the browser."""
        if self._gateway is not None:
            with contextlib.suppress(WebSocketClosedError):  # the gateway was lost, and nobody has noticed yet
                self._gateway.write_message(incoming_msg, isinstance(incoming_msg, bytes))
                return
        self._waiting.append(incoming_msg)

    async def _relay(self) -> None:
        client = GatewayClient.instance()
        try:
            while await self._until_lost() and self._misses < client.gateway_retry_max:
                pause = min(
                    client.gateway_retry_interval * 2 ** min(self._misses, 16), client.gateway_retry_interval_max
                )
                self._misses += 1
                self.log.warning("Kernel %s: connecting to the gateway again in %.0f s", self.kernel_id, pause)
                await asyncio.sleep(pause * random.uniform(1, 1.2))  # noqa: S311  not all connect at the same time
        finally:
            self.websocket_handler.close(1001, "no way to the kernel")  # JupyterLab does not retry after this code

    async def _until_lost(self) -> bool:
        """Relay for as long as one connection lasts, and return whether another one may go better."""
        last = self.websocket_handler.settings.setdefault("cellvm_last_messages", {})
        key = self.kernel_id, self.session_id
        client = GatewayClient.instance()
        query = {"session_id": self.session_id} | ({"since": last[key]} if key in last else {})
        url = url_path_join(client.ws_url or "", client.kernels_endpoint, self.kernel_id, "channels")
        try:
            gateway = await websocket_connect(
                HTTPRequest(f"{url}?{urlencode(query)}", **client.load_connection_args()),
                subprotocols=[self._protocol] if self._protocol else None,
                max_message_size=LARGEST_MESSAGE,
                ping_interval=PING_INTERVAL,
            )
        except HTTPClientError as error:
            self.log.warning("Kernel %s: the gateway says %s", self.kernel_id, error)
            return not (self._left or 400 <= error.code < 500)
        except OSError as error:
            self.log.warning("Kernel %s: no gateway: %s", self.kernel_id, error)
            return not self._left
        began = time.monotonic()
        try:
            assert gateway.protocol is not None
            gateway.protocol.set_nodelay(True)
            for message in self._waiting:
                gateway.write_message(message, isinstance(message, bytes))
            self._waiting.clear()
            self._gateway = gateway
            while not self._left and (frame := await gateway.read_message()) is not None:
                await self.websocket_handler.write_message(frame, isinstance(frame, bytes))
                self._misses = 0
                if number := number_of(frame, self._protocol):
                    last[key] = number
        except WebSocketClosedError:
            return False  # the browser has left
        finally:
            self._gateway = None
            gateway.close()
            if time.monotonic() - began > PING_INTERVAL:
                self._misses = 0
        return not (self._left or gateway.close_code in FINAL)


def number_of(frame: str | bytes, protocol: str | None) -> int | None:
    """A message's number in the journal that CellVM keeps for each kernel; None for another gateway's message."""
    if isinstance(frame, str):
        metadata = json.loads(frame)["metadata"]
    elif protocol:  # u64 count; u64 offsets of channel, header, parent_header, metadata, content, …
        start, end = struct.unpack_from("<2Q", frame, 8 * 4)
        metadata = json.loads(frame[start:end])
    else:  # u32 count; u32 offsets of the JSON and of the buffers
        start, end = struct.unpack_from(">2I", frame, 4)
        metadata = json.loads(frame[start:end])["metadata"]
    number: int | None = metadata.get("cellvm", {}).get("seq")
    return number


class GatewayKernels(GatewayMappingKernelManager):
    """All kernels of the key. Kernels that somebody else has started are not ended from here."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own: set[str] = set()

    async def start_kernel(  # type: ignore[override]  # asynchronous, as in the class above
        self, *, kernel_id: str | None = None, **kwargs: Any
    ) -> str:
        """Start a kernel, or look up the one with `kernel_id`."""
        known: str = await super().start_kernel(kernel_id=kernel_id, **kwargs)
        if kernel_id is None:
            self._own.add(known)
        return known

    async def list_kernels(self, **kwargs: Any) -> list[dict[str, Any]]:
        """All kernels of the gateway. The base class lists only those that it knows already."""
        answer = await gateway_request(self.kernels_url, method="GET")
        for model in json.loads(answer.body):
            if model["id"] not in self._kernels and model["execution_state"] != "dead":
                await self.start_kernel(kernel_id=model["id"])
        kernels: list[dict[str, Any]] = await super().list_kernels(**kwargs)
        return kernels

    async def shutdown_kernel(  # type: ignore[override]
        self, kernel_id: str, now: bool = False, restart: bool = False
    ) -> None:
        """End an own kernel only, because this is also called when a notebook changes from an agent's kernel."""
        if kernel_id in self._own:
            await super().shutdown_kernel(kernel_id, now, restart)
        else:
            self.log.warning("Kernel %s was started by somebody else, and goes on", kernel_id)

    async def shutdown_all(self, now: bool = False) -> None:  # type: ignore[override]
        """End all own kernels. This is called when this Jupyter server ends."""
        for kernel_id in self._own & set(self._kernels):
            try:
                await self.shutdown_kernel(kernel_id, now)
            except web.HTTPError as error:  # if raised, it would keep this process from ending
                self.log.warning("Kernel %s may go on: %s", kernel_id, error)


@dataclass(frozen=True, slots=True)
class SandboxPath:
    """A path in a sandbox's home directory, over REST. A refusal of the gateway is raised as web.HTTPError."""

    sandbox: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join(("~", *self.names))

    @property
    def query(self) -> str:
        return "?" + urlencode({"path": str(self)})

    async def entry(self) -> dict[str, Any] | None:
        """The file or directory there; None if there is none."""
        try:
            found: dict[str, Any] = json.loads(await self.request("GET", "filesystem/stat" + self.query))
        except web.HTTPError as error:
            if error.status_code in (400, 404):  # 400: below something that is no directory
                return None
            raise
        return found

    async def list(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = json.loads(await self.request("GET", "filesystem/list" + self.query))
        return entries

    async def pieces(self, size: int) -> AsyncIterator[bytes]:
        """The content of a file of that size."""
        for start in range(0, size, PIECE):
            yield await self.request("GET", "files" + self.query, Range=f"bytes={start}-{start + PIECE - 1}")

    async def write(self, data: bytes) -> None:
        """Make a file with that content, or replace one."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="-"\r\n\r\n'
        body = b"".join((head.encode(), data, f"\r\n--{boundary}--\r\n".encode()))
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        await self.request("POST", "files" + self.query, body, **kind)

    async def append(self, data: bytes) -> None:
        """Add to the end of a file. REST has no such request, so a command does it."""
        command = {
            "cmd": "sh",
            "args": ["-c", 'base64 -d >> "$0"', "/".join(self.names)],  # commands start in the home directory
            "stdin": base64.b64encode(data).decode(),
        }
        result = json.loads(await self.request("POST", "processes", json.dumps(command).encode()))
        if result["exitCode"]:
            raise web.HTTPError(502, f"{self}: {result['stderr']}")

    async def make_directory(self) -> None:
        await self.request("POST", "filesystem/mkdir", json.dumps({"path": str(self)}).encode())

    async def move(self, destination: "SandboxPath") -> None:
        body = {"source": str(self), "destination": str(destination)}
        await self.request("POST", "filesystem/move", json.dumps(body).encode())

    async def delete(self) -> None:
        await self.request("DELETE", "filesystem" + self.query)

    async def request(self, method: str, route: str, body: bytes | None = None, **headers: str) -> bytes:
        """The gateway's answer. `route` is the path after the sandbox's id."""
        gateway = GatewayClient.instance()
        if not gateway.url:
            raise web.HTTPError(503, "There is no gateway: start with --gateway-url")
        url = "/".join((gateway.url.rstrip("/"), "sandboxes", quote(self.sandbox, safe=""), route)).rstrip("/")
        # There is no time limit, because a large file takes long.
        arguments = gateway.load_connection_args(method=method, body=body, headers=headers) | {"request_timeout": 0}
        try:
            answer = await AsyncHTTPClient().fetch(url, **arguments)
        except HTTPClientError as error:
            if error.response is None:
                raise web.HTTPError(504, f"The gateway does not answer: {error.message}") from error
            try:
                message = json.loads(error.response.body)["message"]
            except (ValueError, LookupError, TypeError):
                message = error.message  # it is a proxy's answer, not CellVM's
            raise web.HTTPError(error.code, f"{self}: {message}") from error
        except OSError as error:
            raise web.HTTPError(503, f"The gateway is not there: {error}") from error
        return bytes(answer.body)


class SandboxContents(AsyncLargeFileManager):
    """Local files as always, and the home directories of the key's sandboxes in the folder `sandboxes`."""

    folder = Unicode("sandboxes", config=True, help="Name of the top-level folder that holds the sandboxes' files.")

    @default("checkpoints_class")
    def _checkpoints_class(self) -> type:
        return Checkpoints

    @default("files_handler_class")
    def _files_handler_class(self) -> type:
        return Files

    def place(self, path: str) -> SandboxPath | None:
        """A path's place in a sandbox, or (without an id) the folder of them all; None if it is on the local disk."""
        first, *names = path.strip("/").split("/")
        return SandboxPath("".join(names[:1]), tuple(names[1:])) if first == self.folder else None

    def _file_place(self, path: str) -> SandboxPath | None:
        """A path's `place`, for requests that change files."""
        place = self.place(path)
        if place is not None and not place.names:
            raise web.HTTPError(403, "Sandboxes are not made, renamed or ended as folders; REST does that")
        return place

    async def _entry(self, place: SandboxPath) -> dict[str, Any] | None:
        return await place.entry() if place.sandbox else {"isDir": True, "type": "dir"}

    def exists(self, path: str) -> Any:
        """Awaitable for a sandbox's path, because callers allow it; not for a local one, because the base does not."""
        place = self.place(path)
        return super().exists(path) if place is None else self._entry(place)

    async def dir_exists(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return bool(await super().dir_exists(path))
        return bool((await self._entry(place) or {}).get("isDir"))

    async def file_exists(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return await super().file_exists(path)
        return (await self._entry(place) or {}).get("type") == "file"

    async def is_hidden(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return bool(await super().is_hidden(path))
        return any(name.startswith(".") for name in place.names)

    async def get(
        self,
        path: str,
        content: bool = True,
        type: str | None = None,  # noqa: A002  the base class's names
        format: str | None = None,  # noqa: A002
        require_hash: bool = False,
    ) -> dict[str, Any]:
        path, place = path.strip("/"), self.place(path)
        model: dict[str, Any]
        if place is None:
            model = await super().get(path, content, type, format, require_hash)
            if content and not path:
                shown = [each for each in model["content"] if each["name"] != self.folder]
                model["content"] = [*shown, model_of(self.folder, {"isDir": True})]
            return model
        entry = await self._entry(place)
        if entry is None or entry["type"] == "other":
            raise web.HTTPError(404, f"No such file or directory: {path}")
        model = model_of(path, entry)
        is_directory = model["type"] == "directory"
        if type is not None and is_directory != (type == "directory"):
            raise web.HTTPError(400, f"{path} is {'a' if is_directory else 'no'} directory", reason="bad type")
        model["type"] = type or model["type"]
        if is_directory:
            if content:
                model |= {"format": "json", "content": await self._listing(path, place)}
        elif content or require_hash:
            data = b"".join([piece async for piece in place.pieces(entry["size"])])
            if content:
                self._fill(model, data, format)
            if require_hash:
                model |= self._get_hash(data)
        return model

    async def _listing(self, path: str, place: SandboxPath) -> list[dict[str, Any]]:
        if not place.sandbox:
            boxes = json.loads(await place.request("GET", ""))
            return [model_of(f"{path}/{box['sandboxID']}", {"isDir": True, **box}) for box in boxes]
        return [
            model_of(f"{path}/{entry['name']}", entry)
            for entry in await place.list()
            if entry["type"] != "other" and self.should_list(entry["name"])
            if self.allow_hidden or not entry["name"].startswith(".")
        ]

    def _fill(self, model: dict[str, Any], data: bytes, wanted: str | None) -> None:
        """Put a file's content into its model."""
        text = None
        if wanted != "base64" or model["type"] == "notebook":
            try:
                text = data.decode()
            except UnicodeDecodeError:
                if wanted == "text" or model["type"] == "notebook":
                    raise web.HTTPError(400, f"{model['path']} is not UTF-8", reason="bad format") from None
        if model["type"] == "notebook":
            try:
                model |= {"format": "json", "content": nbformat.reads(text, as_version=4)}
            except Exception as error:  # nbformat does not say which types it raises
                raise web.HTTPError(400, f"{model['path']} is not a notebook: {error}") from error
            self.mark_trusted_cells(model["content"], model["path"])
            self.validate_notebook_model(model)
            return
        if text is None:
            model |= {"format": "base64", "content": base64.encodebytes(data).decode()}
        else:
            model |= {"format": "text", "content": text}
        plain = "application/octet-stream" if text is None else "text/plain"
        model["mimetype"] = mimetypes.guess_type(model["name"])[0] or plain

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        path, place = path.strip("/"), self._file_place(path)
        saved: dict[str, Any]
        if place is None:
            saved = await super().save(model, path)
            return saved
        is_first = model.get("chunk", 1) == 1
        if is_first:
            self.run_pre_save_hooks(model=model, path=path)
        if model.get("type") == "directory":
            await place.make_directory()
        elif model.get("content") is None:
            raise web.HTTPError(400, "No file content provided")
        else:
            data = self._data(model, path)
            await (place.write(data) if is_first else place.append(data))
        saved = await self.get(path, content=False)
        if model.get("type") == "notebook":
            self.validate_notebook_model(model)
            saved["message"] = model.get("message")
        self.emit(data={"action": "save", "path": path})
        return saved

    def _data(self, model: dict[str, Any], path: str) -> bytes:
        """The bytes of a model's file."""
        if model.get("type") == "notebook":
            notebook = nbformat.from_dict(model["content"])
            self.check_and_sign(notebook, path)
            return str(nbformat.writes(notebook, version=nbformat.NO_CONVERT)).encode()
        if model.get("format") == "base64":
            return base64.b64decode(model["content"])
        return str(model["content"]).encode()

    async def delete_file(self, path: str) -> None:
        place = self._file_place(path)
        await (super().delete_file(path) if place is None else place.delete())

    async def rename_file(self, old_path: str, new_path: str) -> None:
        old, new = self._file_place(old_path), self._file_place(new_path)
        if old is None and new is None:
            await super().rename_file(old_path, new_path)
        elif old is None or new is None or old.sandbox != new.sandbox:
            raise web.HTTPError(400, "A file can't be moved into or out of a sandbox: copy it, then delete it")
        elif await new.entry():
            raise web.HTTPError(409, f"File already exists: {new_path}")
        else:
            await old.move(new)

    async def copy(self, from_path: str, to_path: str | None = None) -> dict[str, Any]:
        # The base class copies directories, too, but only on the local disk. The class above it copies contents.
        is_local = self.place(from_path) is None and self.place(to_path or "") is None
        kind = AsyncLargeFileManager if is_local else AsyncContentsManager
        copied: dict[str, Any] = await kind.copy(self, from_path, to_path)
        return copied


class Checkpoints(AsyncGenericFileCheckpoints):
    """Checkpoints: beside a local file, as always; in the temporary directory for a sandbox's file."""

    async def create_checkpoint(self, contents_mgr: SandboxContents, path: str) -> Any:
        kind = AsyncFileCheckpoints if contents_mgr.place(path) is None else AsyncGenericFileCheckpoints
        return await kind.create_checkpoint(self, contents_mgr, path)

    async def restore_checkpoint(self, contents_mgr: SandboxContents, checkpoint_id: str, path: str) -> None:
        kind = AsyncFileCheckpoints if contents_mgr.place(path) is None else AsyncGenericFileCheckpoints
        await kind.restore_checkpoint(self, contents_mgr, checkpoint_id, path)


class Files(AuthenticatedFileHandler):
    """Files that the browser downloads or shows by itself."""

    @web.authenticated
    @authorized
    async def get(self, path: str, include_body: bool = True) -> None:  # type: ignore[override]
        contents = self.contents_manager
        assert isinstance(contents, SandboxContents)
        place = contents.place(path)
        if place is None:
            await super().get(path, include_body=include_body)  # type: ignore[misc]  # authorized() makes it a coroutine
            return
        self.check_xsrf_cookie()
        if not contents.allow_hidden and await contents.is_hidden(path):
            raise web.HTTPError(404)
        entry = await place.entry()
        if entry is None or entry["type"] != "file":
            raise web.HTTPError(404)
        if self.get_argument("download", ""):
            self.set_attachment_header(entry["name"])
        self.set_header("Content-Type", mimetypes.guess_type(path)[0] or "application/octet-stream")
        self.set_header("Content-Length", entry["size"])
        if include_body:
            async for piece in place.pieces(entry["size"]):
                self.write(piece)
                await self.flush()


def model_of(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A contents model, without content, of a directory's entry or of a sandbox."""
    told = entry.get("modified") or entry.get("startedAt")
    when = datetime.fromisoformat(told) if told else datetime.now(UTC)
    kind = "directory" if entry["isDir"] else "notebook" if path.endswith(".ipynb") else "file"
    names = ("content", "format", "mimetype", "hash", "hash_algorithm")
    return dict.fromkeys(names) | {
        "name": path.rpartition("/")[2],
        "path": path,
        "type": kind,
        "size": entry.get("size") if kind != "directory" else None,
        "created": when,
        "last_modified": when,
        "writable": "size" in entry,
    }
