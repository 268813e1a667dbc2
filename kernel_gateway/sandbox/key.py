"""Keys and what they may do. Pure.

A key sees the sandboxes of its owner. A scope narrows that: what is out of its sight is not found, as if it were
another owner's, and what it may not do is refused.
"""

import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass
from typing import NamedTuple

from kernel_gateway.errors import Forbidden, InvalidRequest

WATCHED = frozenset({"", "export", "files", "filesystem", "health", "metrics", "stream"})
USED = frozenset({"commands", "execute", "executions", "files", "filesystem", "processes"})
"""What whoever has a link may do below `/sandboxes/{id}/`: look at these parts, and with the mode `use` use these, too.
Whatever is in neither of them is refused. A reader of `commands` or `executions` can hold what it reads, so it is no
mere watcher."""
LINKS_SHARE = 0.5
SHARED_PATH = re.compile(r"/sandboxes/\{id\}(?:/([a-z]+).*)?")


@dataclass(frozen=True, slots=True)
class Scope:
    """The limits of a key. Without any the key may do all that its owner may. Only `sandbox` and `mode` go together.

    Args:
        is_read_only: it may only read.
        is_for_metrics: it may read the server's figures, and sees no sandbox.
        template: the id of the template whose sandboxes it may create, see and use.
        sandbox: the id of the sandbox that it may see and use.
        mode: `watch` or `use` for the key of a link, which is for what goes on in the sandbox and not for its life.
    """

    is_read_only: bool = False
    is_for_metrics: bool = False
    template: str = ""
    sandbox: str = ""
    mode: str = ""

    def __str__(self) -> str:
        if self.is_read_only:
            return "read-only"
        if self.is_for_metrics:
            return "metrics"
        if self.template:
            return f"template={self.template}"
        return f"{self.mode or 'sandbox'}={self.sandbox}" if self.sandbox else ""

    @property
    def share(self) -> float:
        """The part of what may wait for the owner that may be in use after this key's: links leave room."""
        return LINKS_SHARE if self.mode else 1.0

    def covers(self, sandbox_id: str, template_id: str) -> bool:
        """Whether a sandbox of the owner is in sight."""
        return not self.is_for_metrics and self.sandbox in ("", sandbox_id) and self.template in ("", template_id)

    def check_change(self) -> None:
        """Check that the key may do more than read.

        Raises:
            Forbidden: it may not.
        """
        if self.is_read_only:
            raise Forbidden("this key may only read", hint="send a GET, or use a key without `--scope read-only`")
        if self.is_for_metrics:
            raise Forbidden("this key is for GET /metrics", hint="use a key without `--scope metrics`")
        if self.mode == "watch":
            raise Forbidden("this link is for watching", hint="ask for a link with the mode `use`")

    def check_request(self, method: str, path: str) -> None:
        """Check that the key may make a request.

        Args:
            path: the path of its route, with names in place of ids.

        Raises:
            Forbidden: it may not.
        """
        if not self.mode:
            if method != "GET":
                self.check_change()
            return
        found = SHARED_PATH.fullmatch(path)
        part = None if found is None else found[1] or ""
        if part in USED and self.mode == "use":
            return
        if method != "GET" or part not in WATCHED:
            raise Forbidden(f"this link is for {self.mode} of one sandbox", hint="use a key of the sandbox's owner")

    def check_whole(self, what: str) -> None:
        """Check that the key sees all that its owner has.

        Args:
            what: what only such a key may do, for the refusal's message.

        Raises:
            Forbidden: it sees a part.
        """
        if self.template or self.sandbox or self.is_for_metrics:
            raise Forbidden(f"a key with the scope {self} may not {what}", hint="use a key without this scope")

    def check_create(self, template_id: str) -> None:
        """Check that the key may create a sandbox of a template.

        Raises:
            Forbidden: it may not.
        """
        self.check_change()
        if self.sandbox:
            raise Forbidden(f"this key is for sandbox {self.sandbox} and may create none", hint="use another key")
        if self.template not in ("", template_id):
            raise Forbidden(
                f"this key may create sandboxes of template {self.template} only", hint=f"create {self.template}"
            )


ALL = Scope()
KEY_LENGTH = (20, 256)
"""Characters of the shortest and of the longest key."""


def may_be_key(text: str) -> bool:
    """Whether a key can have this form. Strangers offer many texts, and no other text is looked up."""
    shortest, longest = KEY_LENGTH
    return shortest <= len(text) <= longest


def is_secret(given: str, secret: str) -> bool:
    """Whether a text is a secret. The time that this takes tells nothing about it."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


class Key(NamedTuple):
    """What is known of a key. Its sandboxes are those of `owner`, which is the id of that owner's first key.

    Times are seconds since 1970.
    """

    id: str
    owner: str
    name: str
    created: float
    scope: Scope = ALL
    expires: float = math.inf


def new_key() -> str:
    """An API key: 160 random bits in the form that E2B's clients accept."""
    return "e2b_" + secrets.token_hex(20)


def hashed(key: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).digest()


def parse_scope(text: str) -> Scope:
    """The scope that a text means, as `str` of a scope writes it. An empty text means no limits.

    Raises:
        InvalidRequest: it is no scope.
    """
    if not text:
        return ALL
    if text == "read-only":
        return Scope(is_read_only=True)
    if text == "metrics":
        return Scope(is_for_metrics=True)
    found = re.fullmatch("(template|sandbox|watch|use)=([A-Za-z0-9_-]{1,64})", text)
    if found is None:
        words = "read-only, metrics, template=ID, sandbox=ID, watch=ID or use=ID"
        raise InvalidRequest(f"a scope is {words}, not {text!r:.100}")
    if found[1] == "template":
        return Scope(template=found[2])
    return Scope(sandbox=found[2], mode="" if found[1] == "sandbox" else found[1])
