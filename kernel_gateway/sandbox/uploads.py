"""Files that owners send for the steps of their builds. They have no names on the host's disk, so none is ever left."""

import asyncio
import secrets
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from kernel_gateway.errors import Conflict, InsufficientStorage, NotFound, TooManyRequests
from kernel_gateway.images.cache import in_thread
from kernel_gateway.sandbox.places import Places

MOST, SIZE = 64, 1024 * 1024 * 1024
"""Uploads that wait for one owner's builds, and bytes of them together."""
HINT = "the operator must free some space"


class Upload:
    """The files of a COPY in a template's builds. Whoever has the `token` may send them.

    `disk` is where they are, and `size` what they have there, also while they come. `coming` ends the request that
    sends them.
    """

    def __init__(self, owner: str, template: str, files: str) -> None:
        self.owner = owner
        self.template = template
        self.files = files
        self.token = secrets.token_hex(24)
        self.disk: BinaryIO | None = None
        self.size = 0
        self.coming: asyncio.Timeout | None = None

    @property
    def file(self) -> BinaryIO | None:
        """The files, once all of them are here."""
        return self.disk if self.coming is None else None


class Uploads:
    """All uploads that wait for builds.

    Args:
        places: the disk that sandboxes use, which uploads must leave enough of.
        directory: a directory on that disk; None for the system's own for such files.
    """

    def __init__(self, places: Places, directory: Path | None) -> None:
        self._places = places
        self._directory = directory
        self._by_token: dict[str, Upload] = {}
        self._sizes: Counter[str] = Counter()  # by owner, with what comes for builds that are over

    def find(self, token: str) -> Upload | None:
        """The upload of that token."""
        return self._by_token.get(token)

    def of_template(self, template: str) -> dict[str, Upload]:
        """A template's uploads by the hashes that name their files."""
        return {each.files: each for each in self._by_token.values() if each.template == template}

    def has(self, template: str, files: str) -> bool:
        """Whether a template's files are here."""
        known = self.of_template(template).get(files)
        return known is not None and known.file is not None

    def link(self, owner: str, template: str, files: str) -> Upload:
        """The upload of a template's files, which is a new one if there is none.

        Raises:
            TooManyRequests: too many wait.
        """
        if known := self.of_template(template).get(files):
            return known
        if sum(each.owner == owner for each in self._by_token.values()) >= MOST:
            raise TooManyRequests(f"{MOST} uploads of yours wait for their builds", hint="start or delete those")
        upload = Upload(owner, template, files)
        self._by_token[upload.token] = upload
        return upload

    async def receive(self, upload: Upload, chunks: AsyncIterator[bytes]) -> None:
        """Take the files of an upload. Those that came before are replaced.

        Raises:
            Conflict: another request sends them at the moment.
            TooManyRequests: the owner's files would be more than SIZE.
            InsufficientStorage: the disk has no room.
            NotFound: their build is over.
        """
        if upload.coming is not None:
            raise Conflict("another request sends these files at the moment", hint="wait for its end")
        self._close(upload)
        try:
            with suppress(TimeoutError):  # the time is over when `drop` says so
                async with asyncio.timeout(None) as upload.coming:
                    await self._write(upload, chunks)
            if upload.token not in self._by_token:
                raise NotFound("the build of these files is over")
        except BaseException:
            self._close(upload)
            raise
        finally:
            upload.coming = None

    async def _write(self, upload: Upload, chunks: AsyncIterator[bytes]) -> None:
        try:
            upload.disk = tempfile.TemporaryFile(dir=self._directory, prefix="upload-")  # noqa: SIM115
            async for chunk in chunks:
                if self._sizes[upload.owner] + len(chunk) > SIZE:
                    raise TooManyRequests(
                        f"the files that wait for your builds would be over {SIZE >> 20} MiB",
                        hint="copy less, or fetch it in a step",
                    )
                if lack := self._places.lack_of_space():
                    raise InsufficientStorage(lack, hint=HINT)
                upload.size += len(chunk)
                self._sizes[upload.owner] += len(chunk)
                await in_thread(upload.disk.write, chunk)
            await in_thread(upload.disk.flush)
        except OSError as error:
            raise InsufficientStorage(f"the files can't be kept: {error.strerror}", hint=HINT) from error

    def drop(self, template: str) -> None:
        """Give up a template's uploads. The request of one that comes is refused at once."""
        for upload in self.of_template(template).values():
            del self._by_token[upload.token]
            if upload.coming is None:
                self._close(upload)
            else:
                upload.coming.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        """Give up all uploads."""
        for template in {each.template for each in self._by_token.values()}:
            self.drop(template)

    def _close(self, upload: Upload) -> None:
        if upload.disk is not None:
            with suppress(OSError):  # its last bytes may find no room, and nobody wants them
                upload.disk.close()
        self._sizes[upload.owner] -= upload.size
        upload.disk, upload.size = None, 0
