"""The routes of events and webhooks: what happened to sandboxes, listed, as a stream, and sent to receivers."""

import asyncio
import secrets
import time
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kernel_gateway.api.base import Call
from kernel_gateway.api.rest import check_text, last_seen, one_line, wanted_framing
from kernel_gateway.errors import InvalidRequest, NotFound
from kernel_gateway.sandbox import outbox
from kernel_gateway.sandbox.outbox import TYPES, Webhook
from kernel_gateway.webhooks import EventModel, iso, model

MAX_TEXT = 200
"""Characters of a webhook's name, and of its secret."""
KEEPALIVE = 15.0
"""Seconds after which a stream without events gets an empty line, so that no proxy takes it for dead."""
LOOK = 1.0
"""Seconds between looks whether the server is going down."""
PAGE = 100


class EventQuery(Struct):
    """`types` are separated by commas; without any, all are told. `orderAsc` tells the oldest first."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    offset: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    orderAsc: bool = False
    types: str = ""


class StreamQuery(Struct):
    """`since`: `seq` of the last event that you have. Without it the stream begins with what happens next."""

    since: Annotated[int, Meta(ge=0)] | None = None


class WebhookBody(Struct):
    """A receiver. `events` are the types that it gets; without any it gets all. `signatureSecret` signs them."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
    url: str
    signatureSecret: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
    resourceType: str = "sandbox"
    events: list[str] = []


class WebhookModel(Struct):
    """A webhook. Its secret is never told again. `lost` counts the events that found too many others waiting."""

    id: str
    name: str
    url: str
    resourceType: str
    events: list[str]
    enabled: bool
    createdAt: str
    lost: int


class DeliveryModel(Struct):
    """An event on its way. `deliveredAt` is null until the receiver has it. `error` says why it does not have it."""

    eventID: str
    type: str
    sandboxID: str
    attempts: int
    status: int | None
    error: str | None
    createdAt: str
    deliveredAt: str | None
    isWaiting: bool


def checked(types: list[str]) -> list[str]:
    """The types that a client names.

    Raises:
        InvalidRequest: there is no such type.
    """
    for name in types:
        if name not in TYPES:
            raise InvalidRequest(f"there are no events of type {name!r:.100}", hint=f"types are {', '.join(TYPES)}")
    return list(dict.fromkeys(types))


async def list_events(call: Call) -> list[EventModel]:
    """What happened to your sandboxes, or to the one that the path names, also after its end."""
    query: EventQuery = call.query
    found = await call.mine.events(
        sandbox=call.path.get("id", ""),
        types=checked([name for name in query.types.split(",") if name]),
        limit=query.limit,
        offset=query.offset,
        oldest_first=query.orderAsc,
    )
    return [model(event) for event in found]


async def stream_events(call: Call) -> None:
    """What happens to your sandboxes, as it happens: server-sent events, or NDJSON if you accept that."""
    http, store = call.http, call.mine.store
    framing = wanted_framing(http) or "text/event-stream"
    news = store.news()
    has_place = call.query.since is not None or "Last-Event-ID" in http.request.headers
    newest = await store.read(outbox.last_number, call.owner)
    seen = last_seen(call) if has_place else newest
    if seen > newest:  # all events were forgotten since then, and numbers began anew
        seen = 0
    http.set_header("Content-Type", framing)
    await http.flush()
    quiet_since = time.monotonic()
    while not (http.is_head or call.sandboxes.places.is_draining):
        found = await call.mine.events(after=seen, limit=PAGE, oldest_first=True)
        for event in found:
            line = one_line(msgspec.json.encode(model(event)))
            is_plain = framing == "application/x-ndjson"
            http.write(line + b"\n" if is_plain else b"id: %d\ndata: %s\n\n" % (event.number, line))
            seen, quiet_since = event.number, time.monotonic()
        if not found and time.monotonic() - quiet_since > KEEPALIVE:
            http.write(b"\n" if framing == "application/x-ndjson" else b":\n\n")
            quiet_since = time.monotonic()
        await http.flush()
        if len(found) < PAGE:
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), LOOK)
        if news.is_set():
            news = store.news()
    await http.finish()


# -- webhooks


def webhook_model(webhook: Webhook) -> WebhookModel:
    return WebhookModel(
        webhook.id, webhook.name, webhook.url, "sandbox", webhook.types.split(), True, iso(webhook.created),
        webhook.lost,
    )  # fmt: skip


async def add_webhook(call: Call, body: WebhookBody) -> WebhookModel:
    """Send your sandboxes' events to a receiver from now on."""
    call.mine.key.scope.check_whole("have webhooks")
    check_text("name", body.name)
    check_text("signatureSecret", body.signatureSecret)
    if body.resourceType != "sandbox":
        raise InvalidRequest("resourceType must be sandbox")
    call.http.application.settings["targets"].check_url(body.url)
    types = " ".join(checked(body.events))
    webhook_id = f"wh{secrets.token_hex(8)}"
    webhook = Webhook(webhook_id, call.owner, body.name, body.url, types, body.signatureSecret, time.time())
    await call.mine.store.change(outbox.add, webhook)
    return webhook_model(webhook)


async def _webhooks(call: Call) -> list[Webhook]:
    call.mine.key.scope.check_whole("see webhooks")
    return await call.mine.store.read(outbox.webhooks, call.owner)


async def _webhook(call: Call) -> Webhook:
    """The webhook that the path names.

    Raises:
        NotFound: there is none, or it is another owner's.
    """
    wanted = call.path["webhook"]
    for each in await _webhooks(call):
        if each.id == wanted:
            return each
    raise NotFound("webhook not found")


async def list_webhooks(call: Call) -> list[WebhookModel]:
    """Your webhooks, the oldest first."""
    return [webhook_model(each) for each in await _webhooks(call)]


async def get_webhook(call: Call) -> WebhookModel:
    """One webhook."""
    return webhook_model(await _webhook(call))


async def remove_webhook(call: Call) -> None:
    """Remove a webhook. What waits for it is not sent any more."""
    webhook = await _webhook(call)
    await call.mine.store.change(outbox.remove, call.owner, webhook.id)


class DeliveryQuery(Struct):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


async def list_deliveries(call: Call) -> list[DeliveryModel]:
    """What was sent to a webhook within the last three days, and what waits for it, the newest event first."""
    webhook = await _webhook(call)
    found = await call.mine.store.read(outbox.deliveries, webhook.id, call.query.limit)
    return [
        DeliveryModel(
            eventID=event.id,
            type=event.type,
            sandboxID=event.sandbox,
            attempts=delivery.attempts,
            status=delivery.status,
            error=delivery.error,
            createdAt=iso(event.created),
            deliveredAt=iso(delivery.ended) if delivery.ended and not delivery.error else None,
            isWaiting=delivery.ended is None,
        )
        for delivery, event in found
    ]
