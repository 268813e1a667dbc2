"""The server's errors, as facts. A table in `api/base.py` gives each its HTTP status.

CellvmError
├── InvalidRequest         the request itself can't be right
├── TooLarge               a body or file is over a limit
├── Unauthorized           no key, or one that is not known
├── Forbidden              the key may not do this
├── Misdirected            the request names another host
├── NotFound               no such sandbox, template or file (also: somebody else's)
├── Conflict               the sandbox is not in a state for this
│   ├── SandboxPaused      the sandbox is paused, or was while the request was answered
│   └── SandboxRestored    the sandbox went back to a checkpoint while the request was answered
├── Corrupt                the files of a paused sandbox are damaged
├── Incompatible           a paused sandbox can't go on with this host or this template
├── InsufficientStorage    the disk has no room to pause the sandbox, which still runs
├── TooManyRequests        the client has as much under way as it may
│   └── RateLimited        the client has created as many sandboxes in a minute as it may
├── Unavailable            not offered yet, or not on this server
├── TemplateNotReady       the template is still being built
├── HostFull               the server has no room for another sandbox
├── Draining               the server is going down
├── SandboxDied            the machine ended during the request
├── GuestUnresponsive      the machine does not answer, or breaks the protocol
└── GuestFailure           the agent refused: no such file, disk full, program can't be run, …
"""


class CellvmError(Exception):
    """Base of all errors. Clients may rely on `code`. The text says what happened, `hint` what to do.

    `outcome` tells what is known of the work that was asked for (see `outcome.py`); None if nothing of it was done.
    """

    code = "internal"
    hint: str | None = None
    outcome: str | None = None
    retry_after: int | None = None
    """Seconds after which a client may try again; None if waiting alone does not help."""

    def __init__(self, message: str, *, hint: str | None = None, outcome: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.outcome = outcome or type(self).outcome


class InvalidRequest(CellvmError):
    code = "invalid_request"


class TooLarge(CellvmError):
    code = "too_large"


class Unauthorized(CellvmError):
    code = "unauthorized"


class Forbidden(CellvmError):
    code = "forbidden"


class Misdirected(CellvmError):
    code = "misdirected"


class NotFound(CellvmError):
    code = "not_found"


class Conflict(CellvmError):
    code = "conflict"


class SandboxPaused(Conflict):
    code = "sandbox_paused"


class SandboxRestored(Conflict):
    code = "sandbox_restored"
    outcome = "unknown"


class Corrupt(CellvmError):
    code = "snapshot_corrupt"


class Incompatible(CellvmError):
    code = "snapshot_incompatible"


class InsufficientStorage(CellvmError):
    code = "insufficient_storage"


class TooManyRequests(CellvmError):
    code = "too_many_requests"
    retry_after = 5


class RateLimited(TooManyRequests):
    """`limit` events are allowed in a window of time; `retry_after` is when the next one will be."""

    def __init__(self, message: str, *, limit: int, retry_after: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit
        self.retry_after = retry_after


class Unavailable(CellvmError):
    code = "not_implemented"


class TemplateNotReady(CellvmError):
    code = "template_not_ready"
    retry_after = 10


class HostFull(CellvmError):
    code = "host_full"
    retry_after = 5


class Draining(CellvmError):
    code = "draining"
    retry_after = 10


class SandboxDied(CellvmError):
    code = "sandbox_died"
    outcome = "unknown"


class GuestUnresponsive(CellvmError):
    code = "guest_unresponsive"
    outcome = "unknown"


class GuestFailure(CellvmError):
    """The agent refused a request. `code` is one of the wire's FAILURES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
