"""The sandboxes' files in JupyterLab's file browser."""

import base64
import json
import mimetypes
from datetime import UTC, datetime
from typing import Any

import nbformat
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import AuthenticatedFileHandler
from jupyter_server.services.contents.filecheckpoints import AsyncFileCheckpoints, AsyncGenericFileCheckpoints
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.services.contents.manager import AsyncContentsManager
from tornado import web
from traitlets import Unicode, default

from cellvm_lab.path import SandboxPath


class SandboxContents(AsyncLargeFileManager):
    """Local files as always, and the home directories of the key's sandboxes in the folder `sandboxes`."""

    folder = Unicode("sandboxes", config=True, help="Name of the top-level folder that holds the sandboxes' files.")

    @default("checkpoints_class")
    def _checkpoints_class(self) -> type:
        return Checkpoints

    @default("files_handler_class")
    def _files_handler_class(self) -> type:
        return Files

    def place(self, path: str) -> SandboxPath | None:
        """A path's place in a sandbox, or (without an id) the folder of them all; None if it is on the local disk."""
        first, *names = path.strip("/").split("/")
        return SandboxPath("".join(names[:1]), tuple(names[1:])) if first == self.folder else None

    def _file_place(self, path: str) -> SandboxPath | None:
        """A path's `place`, for requests that change files."""
        place = self.place(path)
        if place is not None and not place.names:
            raise web.HTTPError(403, "Sandboxes are not made, renamed or ended as folders; REST does that")
        return place

    async def _entry(self, place: SandboxPath) -> dict[str, Any] | None:
        return await place.entry() if place.sandbox else {"isDir": True, "type": "dir"}

    def exists(self, path: str) -> Any:
        """Awaitable for a sandbox's path, because callers allow it; not for a local one, because the base does not."""
        place = self.place(path)
        return super().exists(path) if place is None else self._entry(place)

    async def dir_exists(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return bool(await super().dir_exists(path))
        return bool((await self._entry(place) or {}).get("isDir"))

    async def file_exists(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return await super().file_exists(path)
        return (await self._entry(place) or {}).get("type") == "file"

    async def is_hidden(self, path: str) -> bool:
        place = self.place(path)
        if place is None:
            return bool(await super().is_hidden(path))
        return any(name.startswith(".") for name in place.names)

    async def get(
        self,
        path: str,
        content: bool = True,
        type: str | None = None,  # noqa: A002  the base class's names
        format: str | None = None,  # noqa: A002
        require_hash: bool = False,
    ) -> dict[str, Any]:
        path, place = path.strip("/"), self.place(path)
        model: dict[str, Any]
        if place is None:
            model = await super().get(path, content, type, format, require_hash)
            if content and not path:
                shown = [each for each in model["content"] if each["name"] != self.folder]
                model["content"] = [*shown, model_of(self.folder, {"isDir": True})]
            return model
        entry = await self._entry(place)
        if entry is None or entry["type"] == "other":
            raise web.HTTPError(404, f"No such file or directory: {path}")
        model = model_of(path, entry)
        is_directory = model["type"] == "directory"
        if type is not None and is_directory != (type == "directory"):
            raise web.HTTPError(400, f"{path} is {'a' if is_directory else 'no'} directory", reason="bad type")
        model["type"] = type or model["type"]
        if is_directory:
            if content:
                model |= {"format": "json", "content": await self._listing(path, place)}
        elif content or require_hash:
            data = b"".join([piece async for piece in place.pieces(entry["size"])])
            if content:
                self._fill(model, data, format)
            if require_hash:
                model |= self._get_hash(data)
        return model

    async def _listing(self, path: str, place: SandboxPath) -> list[dict[str, Any]]:
        if not place.sandbox:
            boxes = json.loads(await place.request("GET", ""))
            return [model_of(f"{path}/{box['sandboxID']}", {"isDir": True, **box}) for box in boxes]
        return [
            model_of(f"{path}/{entry['name']}", entry)
            for entry in await place.list()
            if entry["type"] != "other" and self.should_list(entry["name"])
            if self.allow_hidden or not entry["name"].startswith(".")
        ]

    def _fill(self, model: dict[str, Any], data: bytes, wanted: str | None) -> None:
        """Put a file's content into its model."""
        text = None
        if wanted != "base64" or model["type"] == "notebook":
            try:
                text = data.decode()
            except UnicodeDecodeError:
                if wanted == "text" or model["type"] == "notebook":
                    raise web.HTTPError(400, f"{model['path']} is not UTF-8", reason="bad format") from None
        if model["type"] == "notebook":
            try:
                model |= {"format": "json", "content": nbformat.reads(text, as_version=4)}
            except Exception as error:  # nbformat does not say which types it raises
                raise web.HTTPError(400, f"{model['path']} is not a notebook: {error}") from error
            self.mark_trusted_cells(model["content"], model["path"])
            self.validate_notebook_model(model)
            return
        if text is None:
            model |= {"format": "base64", "content": base64.encodebytes(data).decode()}
        else:
            model |= {"format": "text", "content": text}
        plain = "application/octet-stream" if text is None else "text/plain"
        model["mimetype"] = mimetypes.guess_type(model["name"])[0] or plain

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        path, place = path.strip("/"), self._file_place(path)
        saved: dict[str, Any]
        if place is None:
            saved = await super().save(model, path)
            return saved
        is_first = model.get("chunk", 1) == 1
        if is_first:
            self.run_pre_save_hooks(model=model, path=path)
        if model.get("type") == "directory":
            await place.make_directory()
        elif model.get("content") is None:
            raise web.HTTPError(400, "No file content provided")
        else:
            data = self._data(model, path)
            await (place.write(data) if is_first else place.append(data))
        saved = await self.get(path, content=False)
        if model.get("type") == "notebook":
            self.validate_notebook_model(model)
            saved["message"] = model.get("message")
        self.emit(data={"action": "save", "path": path})
        return saved

    def _data(self, model: dict[str, Any], path: str) -> bytes:
        """The bytes of a model's file."""
        if model.get("type") == "notebook":
            notebook = nbformat.from_dict(model["content"])
            self.check_and_sign(notebook, path)
            return str(nbformat.writes(notebook, version=nbformat.NO_CONVERT)).encode()
        if model.get("format") == "base64":
            return base64.b64decode(model["content"])
        return str(model["content"]).encode()

    async def delete_file(self, path: str) -> None:
        place = self._file_place(path)
        await (super().delete_file(path) if place is None else place.delete())

    async def rename_file(self, old_path: str, new_path: str) -> None:
        old, new = self._file_place(old_path), self._file_place(new_path)
        if old is None and new is None:
            await super().rename_file(old_path, new_path)
        elif old is None or new is None or old.sandbox != new.sandbox:
            raise web.HTTPError(400, "A file can't be moved into or out of a sandbox: copy it, then delete it")
        elif await new.entry():
            raise web.HTTPError(409, f"File already exists: {new_path}")
        else:
            await old.move(new)

    async def copy(self, from_path: str, to_path: str | None = None) -> dict[str, Any]:
        # The base class copies directories, too, but only on the local disk. The class above it copies contents.
        is_local = self.place(from_path) is None and self.place(to_path or "") is None
        kind = AsyncLargeFileManager if is_local else AsyncContentsManager
        copied: dict[str, Any] = await kind.copy(self, from_path, to_path)
        return copied


class Checkpoints(AsyncGenericFileCheckpoints):
    """Checkpoints: beside a local file, as always; in the temporary directory for a sandbox's file."""

    async def create_checkpoint(self, contents_mgr: SandboxContents, path: str) -> Any:
        kind = AsyncFileCheckpoints if contents_mgr.place(path) is None else AsyncGenericFileCheckpoints
        return await kind.create_checkpoint(self, contents_mgr, path)

    async def restore_checkpoint(self, contents_mgr: SandboxContents, checkpoint_id: str, path: str) -> None:
        kind = AsyncFileCheckpoints if contents_mgr.place(path) is None else AsyncGenericFileCheckpoints
        await kind.restore_checkpoint(self, contents_mgr, checkpoint_id, path)


class Files(AuthenticatedFileHandler):
    """Files that the browser downloads or shows by itself."""

    @web.authenticated
    @authorized
    async def get(self, path: str, include_body: bool = True) -> None:  # type: ignore[override]
        contents = self.contents_manager
        assert isinstance(contents, SandboxContents)
        place = contents.place(path)
        if place is None:
            await super().get(path, include_body=include_body)  # type: ignore[misc]  # authorized() makes it a coroutine
            return
        self.check_xsrf_cookie()
        if not contents.allow_hidden and await contents.is_hidden(path):
            raise web.HTTPError(404)
        entry = await place.entry()
        if entry is None or entry["type"] != "file":
            raise web.HTTPError(404)
        if self.get_argument("download", ""):
            self.set_attachment_header(entry["name"])
        self.set_header("Content-Type", mimetypes.guess_type(path)[0] or "application/octet-stream")
        self.set_header("Content-Length", entry["size"])
        if include_body:
            async for piece in place.pieces(entry["size"]):
                self.write(piece)
                await self.flush()


def model_of(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A contents model, without content, of a directory's entry or of a sandbox."""
    told = entry.get("modified") or entry.get("startedAt")
    when = datetime.fromisoformat(told) if told else datetime.now(UTC)
    kind = "directory" if entry["isDir"] else "notebook" if path.endswith(".ipynb") else "file"
    names = ("content", "format", "mimetype", "hash", "hash_algorithm")
    return dict.fromkeys(names) | {
        "name": path.rpartition("/")[2],
        "path": path,
        "type": kind,
        "size": entry.get("size") if kind != "directory" else None,
        "created": when,
        "last_modified": when,
        "writable": "size" in entry,
    }
