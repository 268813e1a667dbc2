"""The server behind Debian's nginx, with the configuration of docs/behind-a-proxy.md. Without isolation, for speed."""

import copy
import hashlib
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.sync.client import ClientConnection, connect

from tests.guest.client import KEY, Sandbox, Server, until

PAGE = Path(__file__).parents[2] / "docs" / "behind-a-proxy.md"
NAME, DOMAIN = "box.example.com", "preview.example.net"
SECRET = "TOP SECRET of the operator"
SERVICE = """
import json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Service(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/ticks":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for n in range(20):
                self.wfile.write(b"data: %d\\n\\n" % n)
                time.sleep(0.25)
            return
        body = json.dumps(dict(self.headers.items())).encode()
        self.send_response(200)
        if self.path == "/attack":
            for name in ("X-Accel-Redirect", "X-Sendfile", "X-Accel-Buffering"):
                self.send_header(name, "/private/secret.txt")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port)
"""


class Nginx:
    """nginx in front of a server, with the page's configuration. What a test adds goes in front of its `location`."""

    def __init__(self, directory: Path, server: Server, added: str = "", without: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        (shown,) = re.findall(r"^```nginx\n(map .*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        certificate(directory)
        text = shown
        for theirs, ours in (
            ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("server 127.0.0.1:8888", f"server 127.0.0.1:{server.url.rsplit(':', 1)[1]}"),
            ("/etc/ssl/private/box", str(directory / "box")),
            ("    location / {", f"{added}\n    location / {{"),
        ):
            assert theirs in text
            text = text.replace(theirs, ours)
        if without:
            text, count = re.subn(rf"^.*{without}.*\n", "", text, flags=re.MULTILINE)
            assert count == 1
        paths = "".join(
            f"{kind}_temp_path {directory / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        self.config = directory / "nginx.conf"
        self.config.write_text(
            f"daemon off; master_process off; pid {directory / 'pid'}; error_log stderr;\n"
            f"events {{ }}\nhttp {{\n{paths}access_log off;\n{text}\n}}\n"
        )
        self.log = directory / "nginx.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["nginx", "-p", directory, "-c", self.config], stdout=log, stderr=log)
        until(self._listens, 20)
        self.context = ssl.create_default_context(cafile=str(directory / "box.pem"))
        self.front = copy.copy(server)
        self.front.url = f"https://127.0.0.1:{self.port}"
        self.front.http = requests.Session()
        self.front.http.trust_env = False  # a variable could name other certificates
        self.front.http.verify = str(directory / "box.pem")
        self.front.http.headers.update({"Host": NAME, "X-API-Key": KEY})

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def websocket(self, path: str, **headers: str) -> ClientConnection:
        return connect(
            f"wss://{NAME}:{self.port}{path}",
            sock=socket.create_connection(("127.0.0.1", self.port)),
            ssl=self.context,
            additional_headers={"X-API-Key": KEY, **headers},
            max_size=None,
            proxy=None,
        )

    def close(self) -> None:
        self.front.http.close()
        self.process.terminate()
        self.process.wait(20)


def certificate(directory: Path) -> None:
    """A certificate of the test's own for the names of the page."""
    names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},DNS:*.{DOMAIN},IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names]
    files = ["-keyout", directory / "box.key", "-out", directory / "box.pem"]
    subprocess.run([*command, *files], check=True, capture_output=True)


@pytest.fixture(scope="module")
def behind(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows the names of the page."""
    flags: dict[str, object] = {"--isolation": "unisolated", "--allow-host": NAME, "--domain": DOMAIN}
    server = Server(tmp_path_factory.mktemp("behind") / "data", pool_size=0, max_sandboxes=6, flags=flags)
    yield server
    server.close()


@pytest.fixture(scope="module")
def nginx(behind: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """nginx as on the page."""
    proxy = Nginx(tmp_path_factory.mktemp("nginx"), behind)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def box(nginx: Nginx) -> Iterator[Sandbox]:
    """A sandbox that was created through nginx."""
    with nginx.front.sandbox() as sandbox:
        yield sandbox


def service(box: Sandbox, *, public: bool = False) -> str:
    """The path of a service in the sandbox."""
    cell = box.execute(SERVICE)
    assert cell["error"] is None, cell
    port = int(cell["stdout"])
    if public:
        assert box.request("PUT", "/ports", json={"port": port, "public": True}).status_code == 204
    return f"/sandboxes/{box.id}/ports/{port}"


def test_rest(nginx: Nginx, box: Sandbox) -> None:
    """Listings, cells and errors are as without a proxy. A name that the operator did not allow is refused."""
    assert box.id in [each["sandboxID"] for each in nginx.front.get("/sandboxes").json()]
    assert box.value("6 * 7") == 42
    assert nginx.front.get("/sandboxes/unknown").json()["error"] == "not_found"
    answer = nginx.front.get("/health", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]) == (421, "misdirected")
    assert nginx.front.get("/sandboxes").headers["Cache-Control"] == "no-store"


def test_the_agents_stream(nginx: Nginx, box: Sandbox) -> None:
    """`/stream` runs a cell, and each piece of output comes at once."""
    with nginx.websocket(f"/sandboxes/{box.id}/stream") as ws:
        ws.send(
            json.dumps({"type": "execute", "code": "import time\nprint('a', flush=True)\ntime.sleep(3)\nprint('b')"})
        )
        arrived = {}
        while "b\n" not in arrived:
            event = json.loads(ws.recv(30))
            if event["type"] == "stdout":
                arrived[event["text"]] = time.monotonic()
    assert arrived["b\n"] - arrived["a\n"] > 2


def test_jupyters_channels(nginx: Nginx, box: Sandbox) -> None:
    """Jupyter's WebSocket works, also with an Origin that is the server's own name."""
    kernel = box.get("").json()["kernelID"]
    origin = f"https://{NAME}:{nginx.port}"
    header = {
        "msg_id": "1",
        "session": "s",
        "username": "",
        "date": "",
        "msg_type": "execute_request",
        "version": "5.3",
    }
    content = {"code": "6 * 7", "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    request = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
    with nginx.websocket(f"/api/kernels/{kernel}/channels?session_id=s", Origin=origin) as ws:
        ws.send(json.dumps(request))
        found: dict[str, Any] = {}
        while "execute_reply" not in found or "execute_result" not in found:
            message = json.loads(ws.recv(30))
            if message["parent_header"].get("msg_id") == "1":
                found[message["header"]["msg_type"]] = message["content"]
    assert found["execute_reply"]["status"] == "ok"
    assert found["execute_result"]["data"]["text/plain"] == "42"


def test_100_mib_up_and_down(nginx: Nginx, box: Sandbox) -> None:
    """An upload and a download of 100 MiB arrive whole, and nginx writes none of it to its disk."""
    data = b"0123456789abcdef" * (100 << 16)
    assert box.upload("big", data).status_code == 200
    answer = box.download("big")
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()
    assert not [path for path in nginx.config.parent.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]


def test_events_come_at_once(nginx: Nginx, box: Sandbox) -> None:
    """Server-sent events of a cell, and of a service in the sandbox, are not gathered."""
    base = service(box)
    cell = {"code": "import time\nprint('a', flush=True)\ntime.sleep(3)\nprint('b')"}
    sse = {"Accept": "text/event-stream"}
    for method, path, body in (("POST", f"/sandboxes/{box.id}/execute", cell), ("GET", f"{base}/ticks", None)):
        with nginx.front.request(method, path, json=body, headers=sse, stream=True) as answer:
            times = [time.monotonic() for line in answer.iter_lines(chunk_size=1) if line.startswith(b"data:")]
        assert times[-1] - times[0] > 2, path


def test_services_by_host_name(nginx: Nginx, box: Sandbox) -> None:
    """The page's second name leads to services, and the service learns the name that the browser uses."""
    port = service(box).rsplit("/", 1)[1]
    host = f"{port}-{box.id}.{DOMAIN}"
    told = nginx.front.get("/x", headers={"Host": host}).json()
    assert (told["Host"], told["X-Forwarded-Host"]) == (f"localhost:{port}", host)


@pytest.mark.parametrize("without", ["", "proxy_ignore_headers"])
def test_a_service_can_not_command_nginx(behind: Server, tmp_path: Path, without: str) -> None:
    """A visitor of a hostile service gets no file of the operator, not even without nginx's own guard."""
    files = tmp_path / "files"
    files.mkdir()
    files.joinpath("secret.txt").write_text(SECRET)
    for directory in (tmp_path, files):
        directory.chmod(0o755)
    internal = f"location /private/ {{ internal; alias {files}/; }}"
    proxy = Nginx(tmp_path, behind, added=internal, without=without)
    try:
        with proxy.front.sandbox() as box:
            base = service(box, public=True)
            for path in (f"{base}/attack", "/private/secret.txt"):
                answer = proxy.front.get(path, headers={"X-API-Key": None})
                assert SECRET not in answer.text
                assert answer.status_code == (200 if path.startswith(base) else 404)
                assert not any(name.lower().startswith(("x-accel", "x-sendfile")) for name in answer.headers)
    finally:
        proxy.close()


def test_the_password_of_nginx_stays_there(behind: Server, tmp_path: Path) -> None:
    """With `auth_basic` in front, a service gets neither the password nor the key."""
    (tmp_path / "users").write_text("ada:{PLAIN}secret-of-nginx\n")
    (tmp_path / "users").chmod(0o644)
    proxy = Nginx(tmp_path, behind, added=f'auth_basic "x"; auth_basic_user_file {tmp_path / "users"};')
    try:
        assert proxy.front.get("/health").status_code == 401
        proxy.front.http.auth = ("ada", "secret-of-nginx")
        with proxy.front.sandbox() as box:
            base = service(box)
            port = base.rsplit("/", 1)[1]
            for path, host in ((f"{base}/", NAME), ("/", f"{port}-{box.id}.{DOMAIN}")):
                told = proxy.front.get(path, headers={"Host": host}).json()
                assert not {"authorization", "x-api-key"} & {name.lower() for name in told}
    finally:
        proxy.close()
