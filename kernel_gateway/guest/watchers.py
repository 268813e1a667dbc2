"""Watches that live on between requests, for clients that ask from time to time what has changed."""

import asyncio
import secrets
from contextlib import suppress

from kernel_gateway.errors import CellvmError, NotFound, TooManyRequests
from kernel_gateway.guest.files import Files, Watch

MAX_WATCHERS = 64
"""Watches of one sandbox."""


class Watchers:
    """The watches of one sandbox, by their ids."""

    def __init__(self) -> None:
        self._watches: dict[str, tuple[Watch, asyncio.Task[None]]] = {}

    async def add(self, files: Files, path: str, **options: bool) -> str:
        """The id of a new watch. `options` are those of `Files.watch`.

        Raises:
            TooManyRequests: there are MAX_WATCHERS already.
            CellvmError: the directory can't be watched.
        """
        if len(self._watches) >= MAX_WATCHERS:
            raise TooManyRequests(f"{MAX_WATCHERS} directories are watched in this sandbox already", hint="remove some")
        begun: asyncio.Future[Watch] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._hold(files, path, options, begun))
        try:
            watch = await begun
        except BaseException:
            task.cancel()
            raise
        name = secrets.token_hex(8)
        self._watches[name] = watch, task
        task.add_done_callback(lambda _: self._watches.pop(name, None))
        return name

    async def _hold(self, files: Files, path: str, options: dict[str, bool], begun: "asyncio.Future[Watch]") -> None:
        """Keep a watch until it is removed or the link is closed."""
        with suppress(asyncio.CancelledError):
            try:
                async with files.watch(path, **options) as watch:
                    begun.set_result(watch)
                    await watch.closed()
            except CellvmError as error:
                if not begun.done():
                    begun.set_exception(error)

    def find(self, name: str) -> Watch:
        """The watch of that id.

        Raises:
            NotFound: there is none.
        """
        if name not in self._watches:
            raise NotFound("no such watcher in this sandbox")
        return self._watches[name][0]

    def remove(self, name: str) -> None:
        """End a watch.

        Raises:
            NotFound: there is none.
        """
        self.find(name)
        self._watches.pop(name)[1].cancel()
