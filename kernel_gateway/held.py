"""What the server keeps in memory while it waits for somebody, counted by owner. Pure.

    Held ── account(owner) ──▶ Account ── hold(what, size) ──▶ Holding ── resize, release

Code of cells that wait, bodies and headers of requests, input and output of commands, unfinished messages, listings,
answers and connections to ports all draw on one account of their owner. So an owner can't get more by a mix of them. An
owner at the bound is refused, and nobody else notices.

Growth is a request, and may be refused. Shrinking and release are facts. Journals are not counted here, because each
has a bound of its own, in memory and on disk.
"""

from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kernel_gateway.errors import CellvmError, HostFull, TooManyRequests

MIB = 1024 * 1024
SMALL = 64 * 1024
"""Bytes of one body or message that its reader need not count, because requests and connections are counted
themselves. So an owner at the bound can still interrupt, delete and ask."""
MODEST = 1 * MIB
"""An owner that holds at most so many bytes is let in however much all others hold."""


class Held:
    """The bytes held for every owner.

    Args:
        most: bytes that may be held for one owner.
        total: bytes that may be held for all owners together.
    """

    def __init__(self, most: int = 64 * MIB, total: int = 1024 * MIB) -> None:
        self.most = most
        self.total = total
        self.size = 0
        self._by_owner: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Held {self.size} bytes of {len(self._by_owner)} owners>"

    def of(self, owner: str) -> int:
        """Bytes held for an owner."""
        return self._by_owner[owner]

    def account(self, owner: str) -> "Account":
        return Account(self, owner)

    def check(self, owner: str, what: str, size: int, share: float) -> None:
        """Check that an owner may hold `size` bytes more; `Account.hold` has the arguments and errors."""
        after = self._by_owner[owner] + size
        if after > self.most * share:
            raise TooManyRequests(
                f"{self._by_owner[owner]} bytes wait in the server for your key, and at most {int(self.most * share)} "
                f"may: there is no room for {size} bytes more ({what})",
                hint="wait until some of it is done, or end it; the operator sets the limit with --max-held-mb",
            )
        if self.size + size > self.total and after > MODEST:
            raise HostFull(
                f"{self.size} bytes wait in the server for all keys, and at most {self.total} may: there is no room "
                f"for {size} bytes more ({what})",
                hint="try again later; the operator sets the limit with --max-held-total-mb",
            )

    def add(self, owner: str, size: int) -> None:
        """Count bytes, or with a negative size no more. `Holding` is the only caller."""
        self.size += size
        self._by_owner[owner] += size
        if not self._by_owner[owner]:
            del self._by_owner[owner]


@dataclass(frozen=True, slots=True)
class Account:
    """One owner's part of what is held."""

    held: Held
    owner: str

    def hold(self, what: str, size: int = 0, *, share: float = 1.0) -> "Holding":
        """Hold bytes until the holding is released.

        Args:
            what: what they are, for the refusal's message.
            share: the part of the owner's bound that may be in use afterwards. What strangers cause gets less than
                the whole, because it must not shut the owner out.

        Raises:
            TooManyRequests: the owner would hold more than may be held for one.
            HostFull: all owners together would hold more than may be.
        """
        holding = Holding(self, what, share)
        holding.resize(size)
        return holding


class Holding:
    """Bytes that are held for an owner until their release, or for the time of a block. Make it with `Account.hold`."""

    def __init__(self, account: Account, what: str, share: float) -> None:
        self.size = 0
        self._account = account
        self._what = what
        self._share = share
        self._is_released = False

    def __repr__(self) -> str:
        return f"<Holding {self.size} bytes of {self._what}{' (released)' * self._is_released}>"

    def resize(self, size: int) -> None:
        """Hold that many bytes from now on. A holding that was released stays at none.

        Raises:
            TooManyRequests, HostFull: as `Account.hold`; the size stays as it was.
        """
        if self._is_released:
            return
        held, owner = self._account.held, self._account.owner
        more = size - self.size
        if more > 0:
            held.check(owner, self._what, more, self._share)
        self.size = size
        held.add(owner, more)

    def grow(self, size: int) -> bool:
        """Hold so many bytes more if that is possible, and return whether it was."""
        try:
            self.resize(self.size + size)
        except CellvmError:
            return False
        return not self._is_released

    def release(self) -> None:
        """Hold nothing any more. A second call does nothing."""
        self.resize(0)
        self._is_released = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
