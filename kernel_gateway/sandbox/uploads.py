"""Files that owners send for the steps of their builds. They have no names on the host's disk, so none is ever left."""

import secrets
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from kernel_gateway.errors import Conflict, InsufficientStorage, NotFound, TooManyRequests
from kernel_gateway.images.cache import in_thread
from kernel_gateway.sandbox.places import Places

MOST, SIZE = 64, 1024 * 1024 * 1024
"""Uploads that wait for one owner's builds, and bytes of them together."""


class Upload:
    """The files of a COPY in a template's builds. Whoever has the `token` may send them. `file` has them afterwards.

    `size` is what they have on the disk, also while they come.
    """

    def __init__(self, owner: str, template: str, files: str) -> None:
        self.owner = owner
        self.template = template
        self.files = files
        self.token = secrets.token_hex(24)
        self.file: BinaryIO | None = None
        self.size = 0
        self.is_coming = False


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
        if upload.is_coming:
            raise Conflict("another request sends these files at the moment", hint="wait for its end")
        self._close(upload)
        upload.is_coming = True
        file = tempfile.TemporaryFile(dir=self._directory, prefix="upload-")  # noqa: SIM115
        try:
            async for chunk in chunks:
                self._check(upload)
                if self._sizes[upload.owner] + len(chunk) > SIZE:
                    raise TooManyRequests(
                        f"the files that wait for your builds would be over {SIZE >> 20} MiB",
                        hint="copy less, or fetch it in a step",
                    )
                if lack := self._places.lack_of_space():
                    raise InsufficientStorage(lack, hint="the operator must free some space")
                upload.size += len(chunk)
                self._sizes[upload.owner] += len(chunk)
                await in_thread(file.write, chunk)
            await in_thread(file.flush)
            self._check(upload)
        except BaseException:
            file.close()
            self._close(upload)
            raise
        finally:
            upload.is_coming = False
        upload.file = file

    def _check(self, upload: Upload) -> None:
        if upload.token not in self._by_token:
            raise NotFound("the build of these files is over")

    def drop(self, template: str) -> None:
        """Give up a template's uploads. One that comes is refused with its next bytes, and counts until then."""
        for upload in self.of_template(template).values():
            del self._by_token[upload.token]
            if not upload.is_coming:
                self._close(upload)

    def close(self) -> None:
        """Give up all uploads."""
        for template in {each.template for each in self._by_token.values()}:
            self.drop(template)

    def _close(self, upload: Upload) -> None:
        if upload.file is not None:
            upload.file.close()
        self._sizes[upload.owner] -= upload.size
        upload.file, upload.size = None, 0
