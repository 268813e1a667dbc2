"""The web page: files of the folder `_page`, which `frontend/build.mjs` makes (docs/page.md).

No key is needed for them, because nothing of anybody is in them. What a sandbox has said is shown in frames with an
opaque origin. They have addresses of their own, because a frame without one would inherit the page's policy.
"""

import gzip
import hashlib
import mimetypes
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kernel_gateway.api.base import Handler
from kernel_gateway.errors import NotFound
from kernel_gateway.images.cache import in_thread

FILES = Path(__file__).parents[1] / "_page"
INDEX, STILL, LIVE, TERMINAL = "index.html", "still.html", "live.html", "terminal.html"
FRAMES = (STILL, LIVE, TERMINAL)
LIBRARY = "lib/plotly.min.js"
NAMEABLE = re.compile(r"[A-Za-z0-9.-]+(:\d+)?")
"""A Host header that a Content-Security-Policy can hold. An IPv6 address can't stand in one."""
COMPRESSED = (".html", ".js", ".css", ".svg")


class File(NamedTuple):
    """A file of the page, also compressed if that is worth it, and its ETag."""

    content: bytes
    compressed: bytes | None
    etag: str


@cache
def read(path: Path) -> File:
    """A file. It is read once, because the files of an installed server and of an image do not change."""
    content = path.read_bytes()
    compressed = gzip.compress(content, mtime=0) if path.suffix in COMPRESSED else None
    return File(content, compressed, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@cache
def files() -> dict[str, File]:
    """The files of the page by their names."""
    return {path.name: read(path) for path in FILES.iterdir()}


def policy(name: str, host: str, base_url: str) -> str:
    """The Content-Security-Policy of a document of the page.

    Args:
        host: the Host header of the request.
        base_url: the beginning of the server's paths, without a slash at its end.
    """
    is_nameable = NAMEABLE.fullmatch(host) is not None

    def at(*names: str) -> str:
        return " ".join(f"{host}{base_url}/ui/{each}" for each in names) if is_nameable else "'self'"

    sockets = f" ws://{host} wss://{host}" if is_nameable else ""
    if name == INDEX:
        return (
            f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
            f"connect-src 'self'{sockets}; frame-src {at(*FRAMES)}; form-action 'none'; base-uri 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        )
    if name == TERMINAL:
        return (
            f"sandbox allow-scripts; default-src 'none'; script-src {at('')}; style-src {at('')} 'unsafe-inline'; "
            "frame-ancestors 'self'"
        )
    scripts = at("frame.js", "lib/")
    if name == LIVE:
        scripts += " 'unsafe-inline' 'unsafe-eval' blob: data:; worker-src blob:; connect-src 'none'"
    return (
        f"sandbox allow-scripts; default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; media-src data: blob:; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'self'"
    )


class Page(Handler):
    """The page's document at `/`, and what belongs to it below `/ui/`."""

    async def get(self, name: str = INDEX) -> None:
        settings = self.application.settings
        if not self.request.path:  # the base URL without a slash, from which relative addresses would lead elsewhere
            self.redirect(f"{settings['base_url']}/", status=308)
            return
        file = await self._library() if name == LIBRARY else files().get(name)
        if file is None:
            self.finish(self.set_error(NotFound("there is no such file of the web page")))
            return
        self.set_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Vary", "Accept-Encoding")
        self.set_header("Etag", file.etag)
        self.set_header("Referrer-Policy", "no-referrer")
        if name == INDEX:
            self.set_header("Cross-Origin-Opener-Policy", "same-origin")
            self.set_header(
                "Permissions-Policy", "camera=(), microphone=(), geolocation=(), clipboard-read=(), display-capture=()"
            )
        elif name in FRAMES:
            self.clear_header("X-Frame-Options")  # `frame-ancestors` lets our own page show them
        else:
            self.set_header("Cross-Origin-Resource-Policy", "cross-origin")  # a frame's origin is opaque
        if name in (INDEX, *FRAMES):
            self.set_header("Content-Security-Policy", policy(name, self.request.host, settings["base_url"]))
        if self.check_etag_header():
            self.set_status(304)
            return
        if file.compressed is not None and "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            self.finish(file.compressed)
        else:
            self.finish(file.content)

    async def _library(self) -> File | None:
        """plotly.js. It is too large to be read and compressed while others wait."""
        path = self.application.settings["library"]()
        return None if path is None else await in_thread(read, path)

    head = get
