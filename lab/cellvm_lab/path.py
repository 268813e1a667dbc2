"""A file or directory in a sandbox, as the gateway's REST routes reach it."""

import base64
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from jupyter_server.gateway.gateway_client import GatewayClient
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError

PIECE = 8 * 1024 * 1024
"""Bytes of a sandbox's file that are downloaded at a time."""
LISTED = 10_000


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
        """The entries of a directory, by name. Of a very large one the first LISTED, because Lab shows no pages."""
        listing = f"filesystem/list{self.query}&limit={LISTED}"
        entries: list[dict[str, Any]] = json.loads(await self.request("GET", listing))
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
