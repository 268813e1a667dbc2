"""A server that answers E2B's SDK and plain REST at once, without a sandbox: python -m tests.bench.e2b_floor

It prints its URL. What a client takes here is the client's own time and that of HTTP. The answers are those that
`tests/e2e/e2b/bench.py` needs, and a file that was uploaded last can be downloaded.
"""

import asyncio
import json

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from kernel_gateway.api.e2b import connect

SANDBOX = {"sandboxID": "sbx1", "templateID": "code_interpreter", "clientID": "c", "envdVersion": "0.6.13"}
TOKENS = {"envdAccessToken": "a" * 48, "trafficAccessToken": "t" * 48}
EXIT = {"exitCode": 0, "exited": True, "status": "exit status 0"}
CELL = (
    {"type": "number_of_executions", "execution_count": 1},
    {"type": "result", "text": "2", "is_main_result": True, "extra": {}},
    {"type": "end_of_execution"},
)
CREATED = 201, json.dumps(SANDBOX | TOKENS).encode()
DONE = 200, b"{}"
EVENTS = (
    b"".join(connect.envelope({"event": event}) for event in ({"start": {"pid": 1}}, {"end": EXIT})) + connect.end()
)
ANSWERS = {
    "GET /health": (200, b'{"pool": [{"ready": 1}]}'),
    "GET /v2/sandboxes": (200, b"[]"),
    "POST /v2/sandboxes": CREATED,
    "POST /sandboxes": CREATED,
    "DELETE /sandboxes/sbx1": (204, b""),
    "POST /execute": (200, b"".join(json.dumps(line).encode() + b"\n" for line in CELL)),
    "POST /sandboxes/sbx1/execute": DONE,
    "POST /process.Process/Start": (200, EVENTS),
    "POST /sandboxes/sbx1/processes": DONE,
    "POST /files": (200, b'[{"name": "blob", "path": "/home/user/blob", "type": "file"}]'),
    "POST /sandboxes/sbx1/files": DONE,
}
FILES = ("/files", "/sandboxes/sbx1/files")


class Canned(RequestHandler):
    """Every path."""

    file = b""

    def prepare(self) -> None:
        request = self.request
        if request.path in FILES and request.method == "POST":
            Canned.file = request.files["file"][0].body
        is_download = request.path in FILES and request.method == "GET"
        status, body = (200, Canned.file) if is_download else ANSWERS[f"{request.method} {request.path}"]
        self.set_status(status)
        kind = connect.STREAM if request.path.startswith("/process.") else "application/json"
        self.set_header("Content-Type", "application/octet-stream" if is_download else kind)
        self.finish(body or None)  # an answer 204 has none


async def main() -> None:
    server = HTTPServer(Application([(".*", Canned)]), max_body_size=128 * 1024 * 1024, max_buffer_size=1 << 28)
    (socket,) = bind_sockets(0, "127.0.0.1")
    server.add_sockets([socket])
    print(f"http://127.0.0.1:{socket.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
