"""What a template is built from: a base and steps. Pure.

Recipe ── check ──▶ for each step: command(step, context) ──▶ runs in the build's sandbox
                                   following(step, context) ─▶ the context of the next step
"""

import hashlib
import posixpath
import re
from typing import Literal, NamedTuple

import msgspec

from kernel_gateway.errors import InvalidRequest

MAX_STEPS = 200
MAX_TEXT = 128 * 1024 - 1
"""Bytes of one argument, which is what Linux passes to a program at most."""
FILES_HASH = re.compile("[0-9a-f]{64}")
ARCHIVE = "/root/.cellvm-build.tar"
"""Where the files of a COPY are in the build's sandbox before they are unpacked."""
COPY = r"""
set -eu
archive=$1 source=$2 target=$3 owner=$4 mode=$5
work=$(mktemp -d)
trap 'rm -rf "$work" "$archive"' EXIT
tar -xf "$archive" -C "$work" --no-same-owner
cd "$work"
if [ -e "$source" ] || [ -L "$source" ]; then found=("$source")
else shopt -s globstar nullglob; IFS=; found=($source); unset IFS; fi
[ ${#found[@]} -gt 0 ] || { echo "nothing that was uploaded is named $source" >&2; exit 1; }
chown -hR "$owner" .
[ -z "$mode" ] || chmod -R "$mode" "${found[@]}"
folder() { [ -d "$1" ] || { mkdir -p "$1" && chown "$owner" "$1"; }; }
for each in "${found[@]}"; do
    if [ -d "$each" ] && [ ! -L "$each" ]; then folder "$target"; cp -a "$each/." "$target/"
    elif [ ${#found[@]} -gt 1 ] || [ -d "$target" ] || [ "${target%/}" != "$target" ]; then
        folder "$target"; cp -a "$each" "$target/"
    else folder "$(dirname "$target")"; cp -a "$each" "$target"; fi
done
"""
"""Unpacks an archive and copies from it as Docker's COPY does: of a directory its content, of several files each."""
WORKDIR = '[ -d "$1" ] || { mkdir -p "$1" && chown "$2:" "$1"; }'
IMAGES = {
    r"e2bdev/base(:latest)?": "base",
    r"e2bdev/code-interpreter(:latest)?": "code_interpreter",
    r"debian(:(latest|stable|bookworm|12(\.\d+)?)(-slim)?)?": "base",
    r"python(:(latest|slim|bookworm|3(\.11(\.\d+)?)?(-slim)?(-bookworm)?))?": "base",
}
"""The images that templates of ours can stand for: Debian 12 and Python 3.11, or whichever is there."""


StepType = Literal["COPY", "ENV", "RUN", "WORKDIR", "USER"]


class Step(msgspec.Struct, omit_defaults=True):
    """One step. `files` names what was uploaded for it."""

    type: StepType
    args: list[str]
    files: str = ""


class Recipe(msgspec.Struct, omit_defaults=True):
    """What is done to a base. `start` runs on in every sandbox, and `ready` ends well once it can be used."""

    base: str
    steps: list[Step]
    start: str = ""
    ready: str = ""

    @property
    def size(self) -> int:
        """Bytes that it has while it waits."""
        return len(msgspec.json.encode(self))

    @property
    def digest(self) -> str:
        """What two recipes have in common only if they build the same."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Context(NamedTuple):
    """How the next command of a build runs."""

    user: str
    workdir: str
    env: dict[str, str]


class Defaults(msgspec.Struct, frozen=True):
    """Whose commands of E2B's clients are that name no user, and where they run. Empty for what every guest has."""

    user: str = ""
    workdir: str = ""


class Run(NamedTuple):
    """A command of a build, the user that it runs as, and what the log says of it."""

    argv: list[str]
    user: str
    told: str


def template_of_image(image: str) -> str:
    """The template that stands for an image.

    Raises:
        InvalidRequest: none does.
    """
    for pattern, template in IMAGES.items():
        if re.fullmatch(pattern, image.removeprefix("docker.io/").removeprefix("library/")):
            return template
    raise InvalidRequest(
        f"fromImage {image[:200]!r} can't be built on here",
        hint="possible are e2bdev/base, e2bdev/code-interpreter, debian:12 and python:3.11 (also -slim, and without a "
        "version), or fromTemplate with a template of this server or your own",
    )


def check(recipe: Recipe) -> None:
    """Refuse steps that can't be.

    Raises:
        InvalidRequest: one is malformed; the message has its number.
    """
    if len(recipe.steps) > MAX_STEPS:
        raise InvalidRequest(f"a template has at most {MAX_STEPS} steps")
    for text in (recipe.start, recipe.ready):
        _check_text("startCmd and readyCmd", text)
    for number, step in enumerate(recipe.steps, 1):
        what = f"step {number} ({step.type})"
        for text in step.args:
            _check_text(what, text)
        count = len(step.args)
        wanted = {"COPY": 2 <= count <= 4, "ENV": count % 2 == 0, "RUN": 1 <= count <= 2}.get(step.type, count == 1)
        if not wanted or (step.type != "ENV" and not step.args[0]):
            raise InvalidRequest(f"{what} has {count} arguments, which are not what it takes")
        if step.type == "COPY" and not FILES_HASH.fullmatch(step.files):
            raise InvalidRequest(f"{what} needs `filesHash`, a SHA-256 in small hexadecimal digits")
        if step.type == "ENV" and not all(name and "=" not in name for name in step.args[::2]):
            raise InvalidRequest(f"{what}: names of variables are not empty and need no `=`")


def _check_text(what: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what}: text with a lone surrogate can't be passed on") from None
    if "\0" in text or size > MAX_TEXT:
        raise InvalidRequest(f"{what}: an argument has no NUL, and at most {MAX_TEXT} bytes")


def in_shell(script: str) -> list[str]:
    """The command of a script as the SDK's own commands run."""
    return ["/bin/bash", "-l", "-c", script]


def command(step: Step, context: Context) -> Run | None:
    """What a step runs; None if it only changes the context."""
    told = f"{step.type} {' '.join(step.args)}"
    match step.type:
        case "RUN":
            user = step.args[1] if len(step.args) > 1 and step.args[1] else context.user
            return Run(in_shell(step.args[0]), user, f"RUN {step.args[0]}")
        case "COPY":
            source, target, owner, mode = [*step.args, "", ""][:4]
            target = posixpath.join(context.workdir, target)
            owner = owner or context.user
            arguments = [ARCHIVE, posixpath.normpath(source), target, owner if ":" in owner else f"{owner}:", mode]
            return Run(["/bin/bash", "-c", COPY, "copy", *arguments], "root", told)
        case "WORKDIR":
            path = posixpath.join(context.workdir, step.args[0])
            return Run(["/bin/bash", "-c", WORKDIR, "workdir", path, context.user], "root", told)
        case "USER":
            return Run(["id", "-u", "--", step.args[0]], "root", told)
    return None


def following(step: Step, context: Context) -> Context:
    """The context after a step."""
    match step.type:
        case "ENV":
            return context._replace(env={**context.env, **dict(zip(step.args[::2], step.args[1::2], strict=True))})
        case "WORKDIR":
            return context._replace(workdir=posixpath.normpath(posixpath.join(context.workdir, step.args[0])))
        case "USER":
            return context._replace(user=step.args[0])
    return context
