"""A service in a real machine is used from outside."""

import hashlib
import socket
from urllib.parse import urlsplit

import requests

from tests.guest.client import KEY, Sandbox, Server, until

SERVICE = """
import hashlib, http.server, os, threading

class Service(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        if "Upgrade" in self.headers:
            self.wfile.write(b"HTTP/1.1 101 Switching\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n")
            while data := self.connection.recv(65536):
                self.connection.sendall(data.upper())
            return
        self.send_response(200)
        self.send_header("Content-Length", str(32 << 20))
        self.end_headers()
        for n in range(32):
            self.wfile.write(bytes([n]) * (1 << 20))
    def do_POST(self):
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left:
            data = self.rfile.read(min(left, 1 << 20))
            left -= len(data)
            digest.update(data)
        body = f"{digest.hexdigest()} {'authorization' in str(self.headers).lower()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def listen(address):
    server = http.server.ThreadingHTTPServer((address, 8000), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

server = listen("127.0.0.1")
"""


def test_a_service(server: Server) -> None:
    """A service is reached by path, by host name and by an upgrade. Large bodies take little memory in the server."""
    with server.sandbox() as box:
        base = f"{server.url}/sandboxes/{box.id}/ports/8000"
        closed = server.http.get(f"{base}/", timeout=60)
        assert (closed.status_code, closed.json()["error"]) == (502, "port_closed")
        assert box.execute(SERVICE)["error"] is None
        assert requests.get(f"{base}/", timeout=60).status_code == 401

        with server.memory_grows_at_most(16 << 20):
            down = server.http.get(f"{base}/", timeout=60)
            assert down.content == b"".join(bytes([n]) * (1 << 20) for n in range(32))
            content = bytes(range(256)) * 131072
            up = server.http.post(f"{base}/", data=content, timeout=60)
            assert up.text == f"{hashlib.sha256(content).hexdigest()} False"

        box.request("PUT", "/ports", json={"port": 8000, "public": True})
        host = {"Host": f"8000-{box.id}.localhost"}
        assert requests.post(f"{server.url}/health", data=b"x", headers=host, timeout=60).text.endswith(" False")

        upgraded(server, box)

        box.execute("server.shutdown(); server.server_close(); server = listen('0.0.0.0')")
        assert server.http.post(f"{base}/", data=b"x", timeout=60).status_code == 200


def upgraded(server: Server, box: Sandbox) -> None:
    """Bytes pass both ways after an upgrade, and the connection ends with the sandbox's service."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
        sock.sendall(
            f"GET /sandboxes/{box.id}/ports/8000/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            f"Upgrade: echo\r\nX-API-Key: {KEY}\r\n\r\n".encode()
        )
        received = bytearray()

        def has(text: bytes) -> bool:
            received.extend(sock.recv(65536))
            return received.endswith(text)

        until(lambda: has(b"\r\n\r\n"), 60)
        assert received.startswith(b"HTTP/1.1 101 ")
        sock.sendall(b"abc")
        until(lambda: has(b"ABC"), 60)
