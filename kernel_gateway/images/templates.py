"""Templates: what a sandbox is made of, read from small files (`rootfs/templates/`). Adding one is adding a file."""

import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One template.

    `memory_mb` and `disk_mb` in MiB. `debian` and `python` are packages beyond those every guest has, the latter with
    versions pinned in `rootfs/requirements.lock`. `warm` is imported and `exercise` run once before the snapshot.
    A template `on_request` is not built before somebody names it.
    """

    id: str
    description: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    aliases: list[str] = []
    debian: list[str] = []
    python: list[str] = []
    warm: list[str] = []
    exercise: str = ""
    on_request: bool = False


def rootfs_dir() -> Path:
    """Where the recipes of the guest image are: beside the packages in a checkout, inside ours when installed."""
    installed = Path(__file__).parents[1] / "_rootfs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "rootfs"


class Templates:
    """The templates this server offers, by id or alias.

    `built_unasked` are those that need no request: all but those `on_request`, which an operator has not named.
    """

    def __init__(self, templates: list[Template], named: Collection[str] = ()) -> None:
        self._by_id = {template.id: template for template in templates}
        self._ids = {alias: template.id for template in templates for alias in (template.id, *template.aliases)}
        self.built_unasked = [
            template
            for template in templates
            if not template.on_request or template.id in named or template is self.default
        ]

    @property
    def default(self) -> Template:
        """What one gets who names none; the server keeps machines of it ready."""
        return self.find("code_interpreter") or next(iter(self))

    @classmethod
    def load(cls, directory: Path, only: list[str] | None = None) -> "Templates":
        """Read every file of the directory, or those of the given ids.

        Raises:
            ValueError: a file is not a template, or an id has none; the text names it.
        """
        templates = []
        for path in sorted(directory.glob("*.toml")):
            try:
                templates.append(msgspec.convert(tomllib.loads(path.read_text()), Template))
            except (msgspec.ValidationError, tomllib.TOMLDecodeError) as error:
                raise ValueError(f"{path}: {error}") from error
        known = {template.id for template in templates}
        for wanted in only or []:
            if wanted not in known:
                raise ValueError(f"no template {wanted!r}; there are {', '.join(sorted(known))}")
        return cls([template for template in templates if only is None or template.id in only], only or ())

    def find(self, name: str) -> Template | None:
        """The template of that id or alias."""
        return self._by_id.get(self._ids.get(name, ""))

    def label(self, template: Template) -> str:
        """What figures call a template: its id, or one word for all that owners have built."""
        return template.id if template.id in self._by_id else "built"

    def __iter__(self) -> Iterator[Template]:
        return iter(self._by_id.values())
