"""How a recipe is done in a sandbox: its steps as commands, and what they say as the lines of a log."""

import asyncio
import codecs
import os
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import NamedTuple

from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.commands import Command
from kernel_gateway.guest.files import Files
from kernel_gateway.held import Holding
from kernel_gateway.images.cache import in_thread
from kernel_gateway.kernel.journal import Gap
from kernel_gateway.sandbox.recipe import ARCHIVE, Context, Recipe, Run, command, following, in_shell
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.uploads import Upload

READY_LIMIT, READY_PAUSE = 300.0, 0.5
"""Seconds within which a start command must be ready, times the driver's time scale, and between two looks."""
LOG_SIZE, LINE_SIZE, LINE_COST = 256 * 1024, 4096, 200
"""Bytes of one log, characters of one of its lines, and bytes that a line costs besides its text."""
CHUNK = 256 * 1024
BASE, FINALIZE = "base", "finalize"
"""E2B's words for what is no step: the start from the base, and all that follows the last step."""


class StepFailed(CellvmError):
    """A step has not ended well. The text is for the owner of the build."""

    code = "failed"


class Line(NamedTuple):
    """A line of a log. `moment` is in seconds since 1970."""

    moment: float
    message: str
    level: str
    step: str


class Log:
    """What a build says, up to LOG_SIZE. What comes after that is left out, because clients count the lines.

    `step` is the one that is being done.
    """

    def __init__(self, holding: Holding) -> None:
        self.lines: list[Line] = []
        self.step = BASE
        self._holding = holding
        self._is_full = False

    def begin(self, step: str, message: str) -> None:
        """Note that a step begins."""
        self.step = step
        self.add(message)

    def add(self, message: str, level: str = "info") -> None:
        """Note a line, if there is room."""
        if self._is_full:
            return
        size = len(message.encode("utf-8", "replace")) + LINE_COST
        if self._holding.size + size > LOG_SIZE or not self._holding.grow(size):
            self._is_full = True
            message, level = "the log is full; the rest of it is left out", "warn"
        self.lines.append(Line(time.time(), message, level, self.step))

    def drop(self) -> None:
        self.lines.clear()
        self._holding.release()


async def do_recipe(sandbox: Sandbox, recipe: Recipe, uploads: Mapping[str, Upload], log: Log) -> Context:
    """Do all steps in a sandbox, and start what runs on there. Returns how a further command would run.

    Args:
        uploads: what was uploaded, by the hashes that steps name.

    Raises:
        StepFailed: a step does not end well.
        CellvmError: the sandbox has ended, or does not answer.
    """
    guest = sandbox.guest
    context = Context(sandbox.defaults.user or guest.user, sandbox.defaults.workdir or guest.home, {})
    for number, step in enumerate(recipe.steps, 1):
        run = command(step, context)
        log.begin(str(number), run.told if run else f"{step.type} {' '.join(step.args[::2])}")
        if step.files:
            await send(sandbox, uploads.get(step.files))
        if run is not None:
            await do(sandbox, run, context, log)
        context = following(step, context)
    log.begin(FINALIZE, "finalizing")
    if recipe.start or recipe.ready:
        await get_ready(sandbox, recipe, context, log)
    return context


async def send(sandbox: Sandbox, upload: Upload | None) -> None:
    """Put files that were uploaded where a COPY finds them.

    Raises:
        StepFailed: they are not here, or are being sent again.
    """
    files, at = await Files.of(sandbox.guest, "root"), 0
    if upload is None or upload.file is None:
        raise StepFailed("the files of this step are not here; upload them, and request the build again")
    # It has a descriptor of its own, because files that are sent again close the other, whose number may be reused.
    with os.fdopen(os.dup(upload.file.fileno()), "rb", buffering=0) as file:
        async with files.write(ARCHIVE) as writing:
            while data := await in_thread(os.pread, file.fileno(), CHUNK, at):
                await writing.send(data)
                at += len(data)
            await writing.finish()


def begin(sandbox: Sandbox, run: Run, context: Context) -> Command:
    """Start a command of a build."""
    guest = sandbox.guest
    user = "" if run.user == guest.user else run.user
    return guest.commands.start(run.argv, env=context.env, cwd=context.workdir, user=user)


async def do(sandbox: Sandbox, run: Run, context: Context, log: Log | None) -> None:
    """Run a command to its end. Nothing is known of it afterwards.

    Args:
        log: gets its output; None for none.

    Raises:
        StepFailed: it does not end well.
    """
    commands = sandbox.guest.commands
    running = begin(sandbox, run, context)
    try:
        last = await follow(running, log)
    finally:
        if running.outcome is None:
            running.kill()
        commands.forget(running)
    if running.exited is None:
        assert running.outcome is not None
        assert running.outcome.error is not None
        raise running.outcome.error
    if running.exited.code:
        raise StepFailed(f"{run.told[:500]} {how_ended(running)}{f': {last[:1000]}' if last else ''}")


def how_ended(command: Command) -> str:
    """How a command ended, if not well."""
    exited = command.exited
    assert exited is not None
    return f"was ended by signal {exited.signal}" if exited.signal else f"ended with exit status {exited.code}"


async def get_ready(sandbox: Sandbox, recipe: Recipe, context: Context, log: Log) -> None:
    """Start what runs on in the template's sandboxes, and wait until it can be used.

    Raises:
        StepFailed: it fails before that, or takes too long.
    """
    started: Command | None = None
    following: asyncio.Task[str] | None = None
    limit = READY_LIMIT * sandbox.guest.link.time_scale
    if recipe.start:
        started = begin(sandbox, Run(in_shell(recipe.start), context.user, recipe.start), context)
        await started.running()
        following = asyncio.create_task(follow(started, log))
    check = Run(in_shell(recipe.ready or "true"), context.user, "the ready command")
    try:
        async with asyncio.timeout(limit):
            while True:
                with suppress(StepFailed):
                    return await do(sandbox, check, context, None)
                if started is not None and started.exited is not None and started.exited.code:
                    raise StepFailed(f"the start command {how_ended(started)}")
                await asyncio.sleep(READY_PAUSE)
    except TimeoutError:
        raise StepFailed(f"the template was not ready within {limit:.0f} s") from None
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def follow(command: Command, log: Log | None) -> str:
    """Note a command's output until its end, and return its last line that is not empty."""
    last = ""
    async with aclosing(lines(command)) as found:
        async for line, level in found:
            if log is not None:
                log.add(line, level)
            last = line.strip() or last
    return last


async def lines(command: Command) -> AsyncGenerator[tuple[str, str], None]:
    """The lines of a command's output, each with its level in a log. A long one comes in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")
    decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}
    rest: defaultdict[str, str] = defaultdict(str)

    def told(kind: str, line: str) -> tuple[str, str]:
        return line.rstrip("\r"), "warn" if kind == "stderr" else "info"

    async with aclosing(command.output()) as output:
        async for each in output:
            if isinstance(each, Gap):
                continue
            kind = each.kind
            *whole, rest[kind] = (rest[kind] + decoders[kind].decode(each.parts[0])).split("\n")
            if len(rest[kind]) > LINE_SIZE:
                whole.append(rest.pop(kind))
            for line in whole:
                for at in range(0, max(len(line), 1), LINE_SIZE):
                    yield told(kind, line[at : at + LINE_SIZE])
    for kind, line in rest.items():
        if line:
            yield told(kind, line)
