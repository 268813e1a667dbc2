"""What is inside a sandbox, for E2B's clients: which sandbox and which plane a request is for, and who may use it.

A sandbox has two planes, by the ports that E2B serves them on: files and processes, and the code interpreter. A request
names its sandbox by host name or by headers. Some clients forget the headers, and their sandbox is the one whose token
or whose signature they show. A token is worth a key that sees one sandbox.
"""

import base64
import hashlib
import re
import socket
import struct
import time

import msgspec
from tornado.httputil import HTTPHeaders

from kernel_gateway.api.base import Call, Endpoint, Route, refused
from kernel_gateway.api.e2b.connect import Failed
from kernel_gateway.errors import CellvmError, InvalidRequest, SandboxDied, SandboxPaused, Unauthorized
from kernel_gateway.ports import Place
from kernel_gateway.sandbox.access import Access
from kernel_gateway.sandbox.key import is_secret
from kernel_gateway.sandbox.lifecycle import ASLEEP, State
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import Store

ENVD, INTERPRETER = "49983", "49999"
SANDBOX, PORT = "E2b-Sandbox-Id", "E2b-Sandbox-Port"
ACCESS, TRAFFIC = "X-Access-Token", "E2b-Traffic-Access-Token"
WITHOUT_HEADERS = re.compile(r"/files|/(process\.Process|filesystem\.Filesystem)/\w+")
"""Paths whose requests are for a sandbox also without its headers."""
GONE = (SandboxDied, SandboxPaused)
"""Errors of a sandbox that does not run, or not any more."""
SIGNATURE = re.compile(r"v1_[A-Za-z0-9+/]{43}")


def place_of_headers(headers: HTTPHeaders, path: str) -> Place | None:
    """The place that a request's headers name; an empty sandbox is to be found by its token. None for no place.

    Raises:
        InvalidRequest: only one of the two headers is there.
    """
    sandbox, port = headers.get(SANDBOX, ""), headers.get(PORT, "")
    if bool(sandbox) != bool(port):
        raise InvalidRequest(f"missing header {PORT if sandbox else SANDBOX}")
    if sandbox:
        return Place(sandbox, port)
    return Place("", ENVD) if WITHOUT_HEADERS.fullmatch(path) else None


def signature(path: str, operation: str, user: str, token: str, expiration: str) -> str:
    """The signature of a URL that reads or writes a file."""
    text = ":".join([path, operation, user, token, *([expiration] if expiration else [])])
    return "v1_" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def is_there(sandbox: Sandbox) -> bool:
    """Whether a sandbox runs, or is paused and wakes for every request."""
    return sandbox.state is State.RUNNING or (sandbox.state in ASLEEP and (sandbox.auto_resume or sandbox.was_stopped))


class SandboxNotFound(SandboxDied):
    """There is no such sandbox, or it does not run. `message` is E2B's, because clients look for its words."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__("The sandbox was not found")
        self.sandbox_id = sandbox_id


class Plane(Endpoint):
    """A path of a sandbox. Its requests carry a token of the sandbox, and never a key."""

    def initialize(self, sandboxes: Sandboxes, store: Store, routes: dict[str, Route], place: Place) -> None:  # type: ignore[override]
        super().initialize(sandboxes, store, routes)
        self._place = place
        self._found: Sandbox | None = None

    # -- who may use it

    def authenticate(self) -> Access:
        """The sandbox that the request names, for whoever shows one of its tokens.

        Raises:
            SandboxNotFound: there is no such sandbox, or it does not run.
            Unauthorized, TooManyRequests: the request has no token of the sandbox.
        """
        sandbox = self._found = self._by_token() if self._place.sandbox else self._by_credentials()
        return Access(self._sandboxes, self._store, sandbox.token_key)

    def running(self) -> Sandbox:
        """The sandbox that the request names, whoever asks. It runs, or a request may wake it.

        Raises:
            SandboxNotFound: there is no such sandbox, or it does not run.
        """
        sandbox = self._sandboxes.find(self._place.sandbox)
        if sandbox is None or not is_there(sandbox):
            raise SandboxNotFound(self._place.sandbox)
        return sandbox

    def named(self, route: Route) -> dict[str, str]:
        return {**super().named(route), "id": self._found.id if self._found else self._place.sandbox}

    def _by_token(self) -> Sandbox:
        sandbox = self.running()
        headers = self.request.headers
        given = {ACCESS: headers.get(ACCESS, ""), TRAFFIC: headers.get(TRAFFIC, "")}
        own = {ACCESS: sandbox.access_token, TRAFFIC: sandbox.traffic_token}
        accepted = (ACCESS, TRAFFIC) if self._place.port == INTERPRETER else (ACCESS,)
        shown = [name for name in accepted if given[name]]
        if any(is_secret(given[name], own[name]) for name in shown):
            return sandbox
        if not shown and self._is_signed(sandbox):
            return sandbox
        raise self._refused(bool(shown))

    def _by_credentials(self) -> Sandbox:
        """The sandbox whose token or signature the request has."""
        token = self.request.headers.get(ACCESS, "")
        for sandbox in self._sandboxes:
            is_own = is_secret(token, sandbox.access_token) if token else self._is_signed(sandbox)
            if is_own and is_there(sandbox):
                return sandbox
        raise self._refused(bool(token or self._argument("signature")))

    def _refused(self, is_guess: bool) -> CellvmError:
        guesses = self.application.settings["guesses"]
        return refused(self.request, guesses, is_guess, f"send the sandbox's token as `{ACCESS}`; connecting tells it")

    def _is_signed(self, sandbox: Sandbox) -> bool:
        """Whether the request's address has a valid signature.

        Raises:
            Unauthorized: it has one, and its time is over.
        """
        given = self._argument("signature")
        if self.request.path.rstrip("/") != "/files" or not SIGNATURE.fullmatch(given):
            return False
        operation = "read" if self.request.method in ("GET", "HEAD") else "write"
        expiration = self._argument("signature_expiration")
        own = signature(self._argument("path"), operation, self._argument("username"), sandbox.access_token, expiration)
        if not is_secret(given, own):
            return False
        if expiration and not (re.fullmatch("[0-9]{1,12}", expiration) and int(expiration) >= time.time()):
            raise Unauthorized("signature is already expired")
        return True

    def _argument(self, name: str) -> str:
        return self.request.query_arguments.get(name, [b""])[-1].decode("utf-8", "replace")

    def user(self) -> str:
        """The user of the sandbox that the request asks for; empty for the sandbox's own."""
        scheme, _, value = self.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return ""
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[0]
        except ValueError:
            raise Unauthorized("Authorization is no `Basic` with the name of a user in the sandbox") from None

    # -- how it answers

    @property
    def allowed_headers(self) -> str:  # type: ignore[override]
        """Those that the page asks for, because no page has a secret of ours that it was not given."""
        asked = self.request.headers.get("Access-Control-Request-Headers", "")
        return asked if re.fullmatch(r"[A-Za-z0-9_, -]{0,2000}", asked) else ""

    def may_use(self, origin: str | None) -> bool:
        return True

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.clear_header("Access-Control-Allow-Credentials")
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Expose-Headers", "*")

    def status_of(self, error: CellvmError) -> int:
        if isinstance(error, GONE):
            return 502
        return error.status if isinstance(error, Failed) else super().status_of(error)

    def error_body(self, error: CellvmError, status: int) -> bytes:
        if isinstance(error, GONE):
            self.set_header("Should-Retry", "false")
            told = {"sandboxId": self._place.sandbox, "message": "The sandbox was not found", "code": status}
            return msgspec.json.encode(told)
        return msgspec.json.encode({"code": status, "message": str(error)})

    async def _fail(self, error: Exception) -> None:
        """Reset the connection if the sandbox has ended under an answer, so that the answer does not look whole."""
        if self._headers_written and isinstance(error, GONE):
            stream = self._connection.stream
            if stream.socket is not None:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.close()
            return
        await super()._fail(error)


async def health(call: Call) -> None:
    """Whether the sandbox runs: 204, or else 502. No token is needed."""
    assert isinstance(call.http, Plane)
    _ = call.http.running().guest
