"""Links to a sandbox for other people (docs/rest.md, Share a sandbox)."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from kernel_gateway.api.base import Call
from kernel_gateway.api.rest import rfc3339
from kernel_gateway.sandbox.shares import Share

MAX_SECONDS = 7 * 24 * 3600


class MakeShare(Struct):
    """A link that lets others `watch` a sandbox or `use` it, for so many seconds."""

    mode: Literal["watch", "use"] = "watch"
    seconds: Annotated[int, Meta(ge=1, le=MAX_SECONDS)] = 3600


class ShareModel(Struct, omit_defaults=True):
    """A link. `uses` counts the streams that were opened with it, and the requests that change something.

    `token` and `url` are told once, when the link is made. The web page opens `url`.
    """

    shareID: str
    mode: str
    createdAt: str
    expiresAt: str | None
    uses: int
    token: str | None = None
    url: str | None = None


def model(share: Share) -> ShareModel:
    created = rfc3339(datetime.fromtimestamp(share.created, UTC))
    expires = None if share.expires is None else rfc3339(datetime.fromtimestamp(share.expires, UTC))
    return ShareModel(share.id, share.mode, created, expires, share.uses)


async def make_share(call: Call, body: MakeShare) -> ShareModel:
    """Make a link to the sandbox. Its token is good for this sandbox alone, until it expires, is revoked or it ends."""
    sandbox = call.sandbox
    token, share = await call.mine.share(sandbox, body.mode, body.seconds)
    made, request = model(share), call.http.request
    base = call.http.application.settings["base_url"]
    made.token = token
    made.url = f"{request.protocol}://{request.host}{base}/#{share.mode}={token}&at={sandbox.id}"
    return made


async def list_shares(call: Call) -> list[ShareModel]:
    """The links of the sandbox, without their tokens."""
    return [model(share) for share in await call.mine.shares(call.sandbox)]


async def revoke_share(call: Call) -> None:
    """Revoke a link. Connections and requests that were begun with it are cut within a second."""
    await call.mine.revoke(call.sandbox, call.path["share"])
