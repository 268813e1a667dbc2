"""Templates of owners. Their steps run in a sandbox of the owner's, whose end is kept as a snapshot.

    request ──▶ WAITING ── start, and its turn ──▶ BUILDING ──▶ READY   a snapshot, which the build's tags name
                   └──────────────────────────────────┴───────▶ ERROR   nothing is left but the reason

A template is what the builds of one name have in common. A tag names one build of it, and a build that no tag names any
more is given up with its snapshot.
"""

import asyncio
import logging
import secrets
import string
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum

import msgspec

from kernel_gateway.errors import CellvmError, Conflict, HostFull, InvalidRequest, NotFound, TooManyRequests
from kernel_gateway.held import Held
from kernel_gateway.images.templates import Template
from kernel_gateway.sandbox.recipe import Defaults, Recipe, check
from kernel_gateway.sandbox.sandbox import Sandbox
from kernel_gateway.sandbox.snapshots import Snapshot, Snapshots
from kernel_gateway.sandbox.steps import BASE, FINALIZE, Line, Log, do_recipe
from kernel_gateway.sandbox.store import Store
from kernel_gateway.sandbox.uploads import Upload, Uploads
from kernel_gateway.tasks import to_its_end

log = logging.getLogger(__name__)

PREFIX, ID_LENGTH = "tpl", 20
DEFAULT_TAG = "default"
TIME_LIMIT = 3600
"""Seconds that a build may take from its turn on, and that one may wait to be started."""
MAX_OPEN = 10
"""Builds of one owner that are not over. One of them runs, and the others wait for their turn."""
LOGS_KEPT = 5
"""Builds of one owner that are over and whose logs are kept."""
KEPT = 20
"""Builds of one owner that are over without a snapshot and are still known."""
MAX_TAGS = 100
"""Tags of one template, and so its builds that are ready."""


class Status(StrEnum):
    """What E2B's clients are told of a build."""

    WAITING = "waiting"
    BUILDING = "building"
    READY = "ready"
    ERROR = "error"


class Build(msgspec.Struct, kw_only=True):
    """One build of a template. `tags` name it, each since a time; `wanted` are the tags that it gets at its end.

    `wants` is what its base must have at least, by the fields of Template.

    `snapshot` is the id of its result. `step` is the number of the step that failed, or a word for what is no step.
    """

    id: str
    owner: str
    template: str
    name: str
    wanted: list[str]
    wants: dict[str, int]
    created: float
    tags: dict[str, float] = {}
    status: Status = Status.WAITING
    ended: float = 0.0
    digest: str = ""
    snapshot: str = ""
    reason: str = ""
    step: str = ""

    @property
    def is_open(self) -> bool:
        return self.status in (Status.WAITING, Status.BUILDING)


class Builds:
    """All builds of the server.

    Args:
        create: `Sandboxes.create`.
        kill: `Sandboxes.kill`.
    """

    def __init__(
        self,
        create: Callable[..., Awaitable[Sandbox]],
        kill: Callable[[Sandbox], Awaitable[None]],
        snapshots: Snapshots,
        uploads: Uploads,
        store: Store,
        held: Held,
    ) -> None:
        self.uploads = uploads
        self._create = create
        self._kill = kill
        self._snapshots = snapshots
        self._store = store
        self._held = held
        self._builds: dict[str, Build] = {}
        self._logs: dict[str, Log] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by owner
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changes: dict[str, asyncio.Task[None]] = {}  # the newest of each owner

    def load(self) -> None:
        """Find the builds of earlier servers. Those that were not over have failed."""
        for build_id, text in self._store.builds().items():
            try:
                build = msgspec.json.decode(text, type=Build)
            except msgspec.MsgspecError as error:  # a later version's; its server may come back
                log.error("build %s can't be read, and is left as it is: %s", build_id, error)
                continue
            if build.is_open:
                self._fail(build, "the server was stopped while the template was being built", "")
                if result := self._snapshots.of_name(build.owner, build.id):
                    self._begin(build, self._discard({result.id}))
            self._builds[build_id] = build

    async def close(self) -> None:
        """End all builds that are not over."""
        while changes := [each for each in self._changes.values() if not each.done()]:
            await asyncio.wait(changes)  # a build that is just written down as ready is so
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self.uploads.close()

    def expire(self) -> None:
        """Give up builds that were not started in time."""
        for build in self._builds.values():
            if self._is_unstarted(build) and time.time() - build.created > TIME_LIMIT:
                self._fail(build, "it was never started", "")
                self._drop_uploads(build)
                self._begin(build, self._tidy(build))

    def _is_unstarted(self, build: Build) -> bool:
        return build.status is Status.WAITING and build.id not in self._tasks

    def _begin(self, build: Build, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._tasks[build.id] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(build.id, None))
        return task

    # -- what there is

    def of(self, owner: str) -> list[Build]:
        """An owner's builds, the newest first."""
        mine = [each for each in self._builds.values() if each.owner == owner]
        return sorted(mine, key=lambda each: each.created, reverse=True)

    def of_template(self, owner: str, template: str) -> list[Build]:
        """The builds of the owner's template of that id or name, the newest first.

        Raises:
            NotFound: there is no such template.
        """
        found = [each for each in self.of(owner) if template in (each.template, each.name)]
        if not found:
            raise NotFound("template not found")
        return found

    def get(self, owner: str, template: str, build_id: str) -> Build:
        """One build.

        Raises:
            NotFound: there is none.
        """
        build = self._builds.get(build_id)
        if build is None or build.owner != owner or template not in (build.template, build.name):
            raise NotFound("build not found")
        return build

    def named(self, owner: str, name: str) -> tuple[Build, Snapshot] | None:
        """The build that a template's id or name means, with a colon and a tag or without, and its result."""
        template, _, tag = name.partition(":")
        for build in self.of(owner):
            if template in (build.template, build.name) and (tag or DEFAULT_TAG) in build.tags:
                snapshot = self._snapshots.find(build.snapshot)
                return None if snapshot is None else (build, snapshot)
        return None

    def results(self, owner: str) -> set[str]:
        """The ids of the owner's snapshots that are results of builds."""
        return {each.snapshot for each in self.of(owner) if each.snapshot}

    def log_of(self, build: Build) -> list[Line]:
        """What is known of a build's log."""
        return self._logs[build.id].lines if build.id in self._logs else []

    # -- what owners do

    async def request(self, owner: str, name: str, tags: list[str], wants: dict[str, int]) -> Build:
        """A new build, which waits for its start.

        Args:
            wants: what its base must have at least, by the fields of Template.

        Raises:
            Unavailable: machines of this server can't be saved.
            TooManyRequests: the owner has as many that are not over as there may be.
            Conflict: a snapshot has the name.
            HostFull: it can't be written down.
        """
        self._snapshots.check_offered("build templates")
        await self._settled(owner)
        mine = self.of(owner)
        if sum(each.is_open for each in mine) >= MAX_OPEN:
            raise TooManyRequests(f"{MAX_OPEN} of your builds are not over yet", hint="wait for one, or delete it")
        if self._snapshots.of_name(owner, name) is not None:
            raise Conflict(f"you have a snapshot {name!r} already", hint="delete it, or choose another name")
        template = next((each.template for each in mine if each.name == name), None) or PREFIX + "".join(
            secrets.choice(string.digits + string.ascii_lowercase) for _ in range(ID_LENGTH)
        )
        build = Build(
            id=str(uuid.uuid4()),
            owner=owner,
            template=template,
            name=name,
            wanted=tags,
            wants=wants,
            created=time.time(),
        )
        self._builds[build.id] = build
        await self._change(owner, self._write([build], lambda: self._builds.pop(build.id)))
        return build

    def link(self, owner: str, template: str, files: str) -> Upload:
        """Where files for the template's builds are sent, or are already.

        Raises:
            NotFound: there is no such template.
            Conflict: no build of it waits for files.
            TooManyRequests: too many files wait.
        """
        builds = self.of_template(owner, template)
        if not any(each.status is Status.WAITING for each in builds):
            raise Conflict("no build of this template waits for files", hint="request a build first")
        return self.uploads.link(owner, builds[0].template, files)

    def start(self, build: Build, recipe: Recipe, base: Template, source: Snapshot | None, *, force: bool) -> None:
        """Let a build begin at its turn. A recipe that the template was built from before costs nothing.

        Args:
            base: what its machine is made of.
            source: the snapshot that it starts from; None for the base as it is.
            force: build it in any case.

        Raises:
            Conflict: it was started before.
            InvalidRequest: a step can't be, its files were not uploaded, or the base has less than is asked for.
            TooManyRequests, HostFull: too much waits for the owner, or for all.
        """
        if not self._is_unstarted(build):
            raise Conflict("this build was started already", hint="request another one")
        check(recipe)
        for field, least in build.wants.items():
            if getattr(base, field) < least:
                raise InvalidRequest(
                    f"{recipe.base} has {getattr(base, field)} {field}, and {least} are asked for; a template that is "
                    "built here has what its base has",
                    hint="ask for no more, or take another base; cellvm's own template files set what those have",
                )
        build.digest = recipe.digest
        uploads = self.uploads.of_template(build.template)
        lacking = {
            step.files for step in recipe.steps if step.files and not self.uploads.has(build.template, step.files)
        }
        if lacking and (force or self._same(build) is None):
            raise InvalidRequest(
                f"the files {min(lacking)} were not uploaded", hint="GET …/files/{hash} tells where to"
            )
        account = self._held.account(build.owner)
        waiting = account.hold("steps of a build", recipe.size)
        self._logs[build.id] = Log(account.hold("logs of builds"))
        task = self._begin(build, self._run(build, recipe, base, source, uploads, force=force))
        task.add_done_callback(lambda _: waiting.release())

    def _same(self, build: Build) -> Snapshot | None:
        """The result of an earlier build of the template from the same recipe."""
        same = [
            self._snapshots.find(each.snapshot)
            for each in self.of(build.owner)
            if (each.template, each.digest, each.status) == (build.template, build.digest, Status.READY)
        ]
        return next((each for each in same if each is not None), None)

    async def assign(self, build: Build, tags: Iterable[str]) -> None:
        """Let tags name a build that is ready, and no other build of its template.

        Raises:
            NotFound: somebody has just given it up.
            TooManyRequests: the template would have too many.
            HostFull: it can't be written down.
        """
        await self._settled(build.owner)
        self.get(build.owner, build.template, build.id)
        await self._name(build.template, set(tags), build)

    async def remove(self, owner: str, template: str, tags: Iterable[str]) -> None:
        """Let tags name no build of a template any more.

        Raises:
            NotFound: there is no such template, or no such tag.
            HostFull: it can't be written down.
        """
        await self._settled(owner)
        builds, gone = self.of_template(owner, template), set(tags)
        if missing := gone - {tag for each in builds for tag in each.tags}:
            raise NotFound(f"the template has no tag {min(missing)!r}")
        await self._name(builds[0].template, gone, None)

    async def delete(self, owner: str, template: str) -> None:
        """Delete a template with all its builds. Sandboxes that were made from it go on.

        Raises:
            NotFound: there is no such template.
            HostFull: it can't be written down. Those that were being built have failed all the same.
        """
        await self._settled(owner)
        builds = self.of_template(owner, template)
        for each in builds:  # from this turn on nobody finds one, and so nobody starts it
            del self._builds[each.id]
        await self._change(owner, self._delete(builds))

    async def _delete(self, builds: list[Build]) -> None:
        tasks = [self._tasks[each.id] for each in builds if each.id in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._write(builds, lambda: self._builds.update((each.id, each) for each in builds))

    # -- how a build goes

    async def _run(
        self,
        build: Build,
        recipe: Recipe,
        base: Template,
        source: Snapshot | None,
        uploads: Mapping[str, Upload],
        *,
        force: bool,
    ) -> None:
        """Build a template to its end, whatever that is."""
        log_ = self._logs[build.id]
        made = known = None
        try:
            async with self._turns[build.owner]:
                build.status = Status.BUILDING
                known = None if force else self._same(build)  # builds before this one may have changed it
                if known is not None:
                    log_.begin(BASE, "an earlier build had the same steps, and its result is taken")
                    made = known
                else:
                    async with asyncio.timeout(TIME_LIMIT):
                        made = await self._made(build, recipe, base, source, uploads)
                await self._finish(build, made)
                log_.begin(FINALIZE, f"ready as {', '.join(f'{build.name}:{tag}' for tag in build.tags)}")
        except asyncio.CancelledError:
            self._fail(build, "the build was cancelled", log_.step)
            raise
        except TimeoutError:
            self._fail(build, f"the build took longer than {TIME_LIMIT} s", log_.step)
        except CellvmError as error:
            self._fail(build, str(error), log_.step)
        except Exception:
            log.exception("build %s failed", build.id)
            self._fail(build, "the server failed; its log says why", log_.step)
        finally:
            if build.status is Status.ERROR:
                log_.add(build.reason, "error")
                if made is not None and made is not known:
                    await self._discard({made.id})
            self._drop_uploads(build)
            await self._tidy(build)

    async def _made(
        self,
        build: Build,
        recipe: Recipe,
        base: Template,
        source: Snapshot | None,
        uploads: Mapping[str, Upload],
    ) -> Snapshot:
        """The result of a build: a snapshot of a sandbox in which its recipe was done."""
        log_ = self._logs[build.id]
        log_.begin(BASE, f"starting from {recipe.base}")
        metadata = {"buildID": build.id, "template": build.name}
        sandbox = await self._create(build.owner, base, timeout=TIME_LIMIT, metadata=metadata, env={}, snapshot=source)
        try:
            context = await do_recipe(sandbox, recipe, uploads, log_)
            sandbox.defaults = Defaults(context.user, context.workdir)
            template = msgspec.structs.replace(
                base, id=build.template, aliases=[build.name], description="", on_request=False
            )
            return await self._taken(sandbox, build, template)
        finally:
            await self._kill(sandbox)

    async def _taken(self, sandbox: Sandbox, build: Build, template: Template) -> Snapshot:
        """The snapshot of a build's sandbox. Its name is the build's id, by which a later server knows it."""
        taking = asyncio.create_task(self._snapshots.take(sandbox, build.id, template=template))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # it is taken to its end all the same
            with suppress(CellvmError):
                await self._discard({(await taking).id})
            raise

    # -- its end

    async def _finish(self, build: Build, made: Snapshot) -> None:
        """Let a build be ready, and its tags name it."""
        await self._settled(build.owner)
        build.ended, build.snapshot = time.time(), made.id
        await self._name(build.template, set(build.wanted), build)

    def _fail(self, build: Build, reason: str, step: str) -> None:
        build.status, build.ended, build.reason, build.step = Status.ERROR, time.time(), reason, step
        build.snapshot, build.tags = "", {}

    # -- changes of what is known, of one owner one after the other, each done to its end even if its client has gone

    async def _settled(self, owner: str) -> None:
        """Return when no change of the owner's builds is under way, so that another may begin in the same turn."""
        while (change := self._changes.get(owner)) is not None and not change.done():
            await asyncio.wait({change})

    async def _change(self, owner: str, work: Coroutine[None, None, None]) -> None:
        self._changes[owner] = asyncio.create_task(work)
        await to_its_end(self._changes[owner])

    async def _write(self, builds: list[Build], undo: Callable[[], object]) -> None:
        """Write builds down as they are known, and give up those that are not known any more.

        Args:
            undo: takes back what was changed of them.

        Raises:
            HostFull: it can't be written down. Nothing has changed then.
        """
        try:
            await self._write_known(builds)
        except HostFull:
            undo()
            await self._write_known(builds)  # a write that was only late happens all the same, and before this one
            raise
        await self._gone([each for each in builds if each.id not in self._builds])

    async def _write_known(self, builds: list[Build]) -> None:
        """Let the database have of builds what memory has."""
        known = [each for each in builds if each.id in self._builds]
        await self._store.builds_changed(map(_row, known), {each.id for each in builds} - self._builds.keys())

    async def _name(self, template: str, tags: set[str], named: Build | None) -> None:
        """Let tags of a template name one of its builds, or none. What no tag names any more is given up.

        Args:
            named: the one that they name, which is ready from now on.

        Raises:
            TooManyRequests: the template would have more than MAX_TAGS.
            HostFull: it can't be written down. Nothing has changed then.
        """
        builds = [each for each in self._builds.values() if each.template == template]
        if len(tags.union(*(each.tags for each in builds))) > MAX_TAGS:
            raise TooManyRequests(f"a template has at most {MAX_TAGS} tags", hint="remove some")
        before = [(each, each.tags) for each in builds]
        status = Status.READY if named is None else named.status
        for each in builds:
            each.tags = {tag: since for tag, since in each.tags.items() if tag not in tags}
        if named is not None:
            named.status, named.tags = Status.READY, {**named.tags, **dict.fromkeys(tags, time.time())}
        gone = {each.id: each for each in builds if each.status is Status.READY and not each.tags}
        for each in gone.values():
            del self._builds[each.id]

        def undo() -> None:
            self._builds.update(gone)
            for each, had in before:
                each.tags = had
            if named is not None:
                named.status = status

        await self._change(builds[0].owner, self._write(builds, undo))

    async def _gone(self, builds: list[Build]) -> None:
        """Give up builds that are not written down any more, and those of their results that are no other build's."""
        for each in builds:
            self._builds.pop(each.id, None)  # somebody else may have been faster
            if each.id in self._logs:
                self._logs.pop(each.id).drop()
            self._drop_uploads(each)
        used = {each.snapshot for each in self._builds.values()}
        await self._discard({each.snapshot for each in builds if each.snapshot} - used)

    async def _discard(self, snapshots: set[str]) -> None:
        for each in snapshots:
            found = self._snapshots.find(each)
            if found is not None:
                with suppress(NotFound):  # somebody else was faster
                    await self._snapshots.delete(found)

    def _drop_uploads(self, build: Build) -> None:
        """Close the files of a template that has no build any more which may need them."""
        if any(each.is_open for each in self._builds.values() if each.template == build.template):
            return
        self.uploads.drop(build.template)

    async def _tidy(self, build: Build) -> None:
        """Write down how a build ended, and forget old logs and failures."""
        over = [each for each in self.of(build.owner) if not each.is_open]
        for each in over[LOGS_KEPT:]:
            if each.id in self._logs:
                self._logs.pop(each.id).drop()
        try:
            failed = [each for each in over if not each.snapshot][KEPT:]
            await self._gone(failed)
            await self._write_known([build, *failed])
        except CellvmError as error:  # the next server calls a build that was not over a failure
            log.error("the end of build %s can't be written: %s", build.id, error)


def _row(build: Build) -> tuple[str, str]:
    return build.id, msgspec.json.encode(build).decode()
