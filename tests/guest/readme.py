"""The README's code blocks, and a terminal into which they are pasted one after the other."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ADDRESS = "127.0.0.1:8888"
"""The server's address in the README. In a block, tests replace only this text, by the address of a free port."""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "*-results", "site", "__pycache__", ".*_cache")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the heading above it, its language, its text."""

    section: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    """All blocks of the README in order."""
    section = ""
    pieces = re.finditer(r"^## (.+)$|^```(.*)\n((?:.*\n)*?)```$", README.read_text(), re.MULTILINE)
    for heading, language, text in (piece.groups() for piece in pieces):
        section = heading or section
        if heading is None:
            yield Block(section, language, text)


def checkout(directory: Path) -> Path:
    """A copy of the tree, like a clone. Its `.venv` is the environment of these tests."""
    venv = Path(sys.prefix)
    assert (venv / ".ready").exists(), "these tests need the environment that `make` sets up"
    tree = Path(shutil.copytree(ROOT, directory / "cellvm", ignore=LEFT_OUT))
    (tree / ".venv").symlink_to(venv)
    for name in ("pyproject.toml", "requirements-dev.lock"):
        os.utime(tree / name, (0, 0))  # older than the environment, so that `make` does not set it up again
    return tree


def documents(text: str) -> list[Any]:
    """The JSON objects and arrays in a block's output, in order. curl prints no newline between two answers."""
    found, decoder, at = [], json.JSONDecoder(), 0
    while (start := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            document, at = decoder.raw_decode(text, start.start())
        except ValueError:
            at = start.end()
        else:
            found.append(document)
    return found


def failures(text: str) -> list[Any]:
    """Answers that tell of a failure: errors of the server, exceptions of a cell, failed commands."""
    return [
        answer
        for answer in documents(text)
        if isinstance(answer, dict) and (answer.get("error") or answer.get("exitCode"))
    ]


class Terminal:
    """A bash session in a folder, with the server at `address`."""

    def __init__(self, directory: Path, address: str, environment: Mapping[str, str]) -> None:
        self.address = address
        self.directory = directory
        self.shell = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=environment,
        )
        # A command that fails in the middle of a block, or in a pipe, fails the block.
        self.run("set -E -o pipefail; failed=0; trap 'failed=$?' ERR")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shell.stdin.close()
        self.shell.wait(10)
        self.shell.stdout.close()

    def run(self, text: str) -> str:
        """Paste a block and return its output, with standard error. It must succeed, and print no failure."""
        script = self.directory.parent / "block.sh"
        script.write_text(text.replace(ADDRESS, self.address))
        self.shell.stdin.write(f"failed=0; . {script} < /dev/null; printf '\\nfailed: %s\\n' $failed\n")
        self.shell.stdin.flush()
        printed = ""
        while not (end := re.search(r"\nfailed: (\d+)\n\Z", printed)):
            line = self.shell.stdout.readline()
            assert line, f"the shell has ended:\n{printed}"
            printed += line
        printed = printed[: end.start()]
        assert end[1] == "0", f"{text}\nfailed with status {end[1]}:\n{printed}"
        assert not failures(printed), f"{text}\nprinted:\n{printed}"
        return printed
