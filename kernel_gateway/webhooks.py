"""Delivery of events to webhooks: each at least once, those of one sandbox in order.

A receiver's address is an owner's text, so it may name the host itself or its neighbours. Only public addresses are
connected to, over HTTPS, unless the operator has allowed others. A name is resolved once, its addresses are judged, and
the connection goes to what was judged. Redirects are not followed.
"""

import asyncio
import hashlib
import hmac
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from typing import Any
from urllib.parse import urlsplit

import msgspec
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.netutil import Resolver
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from kernel_gateway import __version__
from kernel_gateway.errors import CellvmError, InvalidRequest
from kernel_gateway.network.policy import Floor
from kernel_gateway.sandbox import outbox
from kernel_gateway.sandbox.outbox import Delivery, Event, Webhook
from kernel_gateway.sandbox.store import Store

log = logging.getLogger(__name__)

PORTS = (443, 8443)
"""Ports of receivers that nobody has allowed by name."""
TIMEOUT = 10.0
"""Seconds that a receiver has for its answer."""
AT_ONCE = 16
"""Deliveries that are under way at once. A receiver gets AT_ONCE_EACH of them at most."""
AT_ONCE_EACH = 2
FORGET_EVERY = 3600.0
"""Seconds between looks for events that are too old to be kept."""
MAX_URL = 2000


class Refused(Exception):
    """A receiver that must not be connected to; the text says why."""


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


class EventModel(msgspec.Struct):
    """An event, in SandBase's words and in E2B's. `seq` is its place among your events."""

    seq: int
    id: str
    resourceType: str
    resourceID: str
    type: str
    sandboxID: str
    data: msgspec.Raw
    createdAt: str
    version: str
    sandboxId: str
    sandboxTemplateId: str
    eventData: msgspec.Raw
    timestamp: str


def model(event: Event) -> EventModel:
    """An event as users see it."""
    data, at = msgspec.Raw(event.data.encode()), iso(event.created)
    return EventModel(
        seq=event.number,
        id=event.id,
        resourceType="sandbox",
        resourceID=event.sandbox,
        type=event.type,
        sandboxID=event.sandbox,
        data=data,
        createdAt=at,
        version="v1",
        sandboxId=event.sandbox,
        sandboxTemplateId=event.template,
        eventData=data,
        timestamp=at,
    )


def signature(secret: str, body: bytes) -> str:
    """The value of X-Signature: HMAC-SHA256 of the raw body, as lowercase hex."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


class Targets:
    """Which receivers may be connected to.

    Args:
        floor: tells which addresses are not on the public internet, or are near this host, at the time. Exceptions for
            sandboxes are none for receivers.
        allowed: the operator's exceptions. Their receivers may use HTTP and any port.
    """

    def __init__(self, floor: Callable[[], Floor], allowed: tuple[IPv4Network, ...] = ()) -> None:
        self._floor = floor
        self._allowed = allowed

    def check_url(self, url: str) -> None:
        """Check what can be told of a receiver's address without asking anybody.

        Raises:
            InvalidRequest: it is not the address of a receiver.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidRequest(f"url: {error}") from None
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
            raise InvalidRequest(f"url has at most {MAX_URL} characters, all of them ASCII and none of them a blank")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise InvalidRequest("url is no web address", hint="write it as https://example.com/hook")
        if parts.username is not None or parts.password is not None:
            raise InvalidRequest("url holds a user's name", hint="the signature tells the receiver who sends")
        is_plain = parts.scheme == "http" or (port or 443) not in PORTS
        if is_plain and not self._allowed:
            raise InvalidRequest(
                f"url must be https, on port {' or '.join(map(str, PORTS))}",
                hint="the operator allows other receivers with --webhook-allow",
            )

    def judge(self, addresses: list[str], *, is_plain: bool) -> list[str]:
        """The addresses of a receiver that may be connected to.

        Raises:
            Refused: none of them may.
        """
        allowed = [each for each in addresses if any(IPv4Address(each) in block for block in self._allowed)]
        floor = replace(self._floor(), exceptions=())
        public = [] if is_plain else [each for each in addresses if not floor.refuses(IPv4Address(each))]
        if not allowed and not public:
            raise Refused("the receiver is on no public network, or its address is not https on a usual port")
        return allowed or public


class Judged(Resolver):
    """Resolves a receiver's name, and tells only the addresses that may be connected to."""

    def initialize(self, targets: Targets, is_plain: bool) -> None:
        self._targets = targets
        self._is_plain = is_plain

    def close(self) -> None:
        pass

    async def resolve(self, host: str, port: int, family: Any = socket.AF_UNSPEC) -> list[tuple[int, Any]]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        return [(socket.AF_INET, (each, port)) for each in self._targets.judge(addresses, is_plain=self._is_plain)]


Send = Callable[[str, bytes, dict[str, str]], Awaitable[int]]


class Sender:
    """Sends one request to one receiver.

    Args:
        trusted: how certificates are checked; None for the host's own list of trust.
    """

    def __init__(self, targets: Targets, trusted: ssl.SSLContext | None = None) -> None:
        self._targets = targets
        self._trusted = trusted or ssl.create_default_context()

    async def __call__(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        """The status of the answer, whose body nobody reads.

        Raises:
            Refused: the receiver must not be connected to.
            OSError, HTTPClientError: it can't be reached, or does not answer in time.
        """
        self._targets.check_url(url)  # the operator's exceptions may be others by now
        parts = urlsplit(url)
        is_plain = parts.scheme == "http" or (parts.port or 443) not in PORTS
        resolver = Judged(targets=self._targets, is_plain=is_plain)
        client = SimpleAsyncHTTPClient(force_instance=True, resolver=resolver, max_header_size=16 * 1024)
        try:
            request = HTTPRequest(
                url, "POST", headers, body, connect_timeout=TIMEOUT, request_timeout=TIMEOUT, follow_redirects=False,
                ssl_options=self._trusted, streaming_callback=lambda _: None, allow_nonstandard_methods=True,
            )  # fmt: skip
            return (await client.fetch(request, raise_error=False)).code
        finally:
            client.close()


class Deliveries:
    """Takes events out of the outbox. Use `run` as a task."""

    def __init__(self, store: Store, send: Send, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._send = send
        self._clock = clock
        self._busy: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._forgot = -FORGET_EVERY

    async def run(self) -> None:
        """Deliver until cancelled. What is under way then is delivered again by the next server."""
        try:
            while True:
                if time.monotonic() - self._forgot > FORGET_EVERY:
                    await self._store.forget()
                    self._forgot = time.monotonic()
                news, now = self._store.news(), self._clock()
                while await self._begin(now):
                    pass
                await self._wait(news, await self._store.read(outbox.next_due, now))
        finally:
            for task in self._busy.values():
                task.cancel()
            await asyncio.gather(*self._busy.values(), return_exceptions=True)

    async def _begin(self, now: float) -> bool:
        """Begin deliveries whose time has come, as many as there may be, and return whether there were any."""
        each = Counter(webhook for webhook, _ in self._busy)
        full = [webhook for webhook, count in each.items() if count >= AT_ONCE_EACH]
        room = AT_ONCE - len(self._busy)
        begun = False
        for delivery, event, webhook in await self._store.read(outbox.due, now, room, list(self._busy), full):
            lane = (delivery.webhook, delivery.sandbox)
            if each[delivery.webhook] < AT_ONCE_EACH and len(self._busy) < AT_ONCE:
                self._busy[lane] = asyncio.create_task(self._deliver(delivery, event, webhook))
                each[delivery.webhook] += 1
                begun = True
        return begun

    async def _wait(self, news: asyncio.Event, due: float | None) -> None:
        """Return when there are events, when a delivery has ended, or when another's time has come."""
        waiting: set[asyncio.Task[Any]] = {asyncio.create_task(news.wait()), *self._busy.values()}
        pause = FORGET_EVERY if due is None else max(due - self._clock(), 0.0)
        try:
            await asyncio.wait(waiting, timeout=min(pause, FORGET_EVERY), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting - set(self._busy.values()):
                task.cancel()
        for lane, task in list(self._busy.items()):
            if task.done():
                del self._busy[lane]
                task.result()

    async def _deliver(self, delivery: Delivery, event: Event, webhook: Webhook) -> None:
        body = msgspec.json.encode(model(event))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"CellVM/{__version__}",
            "X-Event-ID": event.id,
            "X-Signature": signature(webhook.secret, body),
        }
        status, error = None, None
        try:
            status = await self._send(webhook.url, body, headers)
            if not 200 <= status < 300:
                error = f"the receiver answered {status}"
        except (OSError, HTTPClientError, ssl.SSLError, Refused, CellvmError, ValueError) as failure:
            error = str(failure)[:300] or type(failure).__name__
        if error:
            log.info("event %s did not reach webhook %s: %.300r", event.id, webhook.id, error)
        await self._store.change(outbox.tried, delivery, status, error, self._clock())
