"""Keys and what they may do. Pure.

A key sees the sandboxes of its owner. A scope narrows that: what is out of its sight is not found, as if it were
another owner's, and what it may not do is refused.
"""

import hmac
import re
from dataclasses import dataclass
from typing import NamedTuple

from kernel_gateway.errors import Forbidden, InvalidRequest


@dataclass(frozen=True, slots=True)
class Scope:
    """The limits of a key. At most one field is set; without any the key may do all that its owner may.

    Args:
        is_read_only: it may only read.
        is_for_metrics: it may read the server's figures, and sees no sandbox.
        template: the id of the template whose sandboxes it may create, see and use.
        sandbox: the id of the sandbox that it may see and use.
    """

    is_read_only: bool = False
    is_for_metrics: bool = False
    template: str = ""
    sandbox: str = ""

    def __str__(self) -> str:
        if self.is_read_only:
            return "read-only"
        if self.is_for_metrics:
            return "metrics"
        return f"template={self.template}" if self.template else f"sandbox={self.sandbox}" if self.sandbox else ""

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
    """What is known of a key. Its sandboxes are those of `owner`, which is the id of that owner's first key."""

    id: str
    owner: str
    name: str
    created: float
    scope: Scope = ALL


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
    found = re.fullmatch("(template|sandbox)=([A-Za-z0-9_-]{1,64})", text)
    if found is None:
        raise InvalidRequest(f"a scope is read-only, metrics, template=ID or sandbox=ID, not {text!r:.100}")
    return Scope(template=found[2]) if found[1] == "template" else Scope(sandbox=found[2])
