"""Templates, and their builds by the SDK's builder: shapes over `sandbox/builds`."""

from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from kernel_gateway.api.base import Call, refused
from kernel_gateway.api.rest import ENVD_VERSION, LEGAL_NAME, rfc3339
from kernel_gateway.errors import Conflict, InvalidRequest, NotFound
from kernel_gateway.images.templates import Template
from kernel_gateway.sandbox.builds import DEFAULT_TAG, MAX_TAGS, Build, Builds, Status
from kernel_gateway.sandbox.recipe import FILES_HASH, Recipe, Step, StepType, template_of_image
from kernel_gateway.sandbox.steps import Line

PAGE = 100
"""Lines of a build's log in one answer, which is what E2B's clients count on."""
RESERVED = ("tags", "aliases")
"""Names that would be other paths."""


class TemplateModel(Struct, omit_defaults=True):
    """A template: one of the server's, or one that you have built. The latter is not `public`, and tells its build."""

    templateID: str
    aliases: list[str]
    description: str
    cpuCount: int
    memoryMB: int
    diskSizeMB: int
    envdVersion: str
    public: bool
    names: list[str]
    buildID: str | UnsetType = UNSET
    buildStatus: str | UnsetType = UNSET
    buildCount: int | UnsetType = UNSET
    createdAt: str | UnsetType = UNSET
    updatedAt: str | UnsetType = UNSET


class RequestBuild(Struct):
    """A template to be built. `name` may end with a colon and a tag; without tags it gets `default`.

    A machine has what its base has, so that more processors, memory or disk are refused when the build is started.
    """

    name: str
    tags: Annotated[list[str], Meta(max_length=MAX_TAGS)] = []
    cpuCount: int | None = None
    memoryMB: int | None = None
    minFreeDiskMb: int | None = None


class BuildModel(Struct):
    """A build that waits for its start."""

    templateID: str
    buildID: str
    public: bool
    names: list[str]
    tags: list[str]
    aliases: list[str]


class UploadLink(Struct, omit_defaults=True):
    """Whether the files are here, and where they may be sent with PUT and without a key."""

    present: bool
    url: str = ""


class UploadPermit(Struct):
    """What permits an upload."""

    upload: str = ""


class StepModel(Struct):
    """A step: COPY (source, target, owner, mode), ENV (names and values), RUN (command, user), WORKDIR or USER."""

    type: StepType
    args: list[str] = []
    filesHash: str = ""
    force: bool = False


class StartBuild(Struct):
    """What a template is built from. One of `fromTemplate` and `fromImage` is its base.

    `fromImageRegistry` is not offered. With `force`, also of one step, nothing is taken from an earlier build.
    """

    fromImage: str = ""
    fromTemplate: str = ""
    fromImageRegistry: Any = None
    startCmd: str = ""
    readyCmd: str = ""
    force: bool = False
    steps: list[StepModel] = []


class StatusQuery(Struct):
    """Which lines of the log are wanted."""

    logsOffset: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE)] = PAGE


class LogEntry(Struct, omit_defaults=True):
    timestamp: str
    message: str
    level: str
    step: str = ""


class Reason(Struct, omit_defaults=True):
    """Why a build has failed, and at which step."""

    message: str
    step: str = ""


class StatusModel(Struct, omit_defaults=True):
    """How a build goes: waiting, building, ready or error. `logEntries` are lines of its log."""

    templateID: str
    buildID: str
    status: str
    logs: list[str]
    logEntries: list[LogEntry]
    reason: Reason | None = None


class AssignTags(Struct):
    """Tags for the build that `target` means, a template's name with a colon and a tag or without."""

    target: str
    tags: Annotated[list[str], Meta(min_length=1, max_length=MAX_TAGS)]


class AssignedTags(Struct):
    tags: list[str]
    buildID: str


class RemoveTags(Struct):
    """Tags to be removed from a template. A build without any is deleted."""

    name: str
    tags: Annotated[list[str], Meta(min_length=1, max_length=MAX_TAGS)]


class TagModel(Struct):
    tag: str
    buildID: str
    createdAt: str


def at(moment: float) -> str:
    return rfc3339(datetime.fromtimestamp(moment, UTC))


def builds_of(call: Call) -> Builds:
    """The builds, for a key that sees all that its owner has.

    Raises:
        Forbidden: it sees a part.
    """
    call.mine.key.scope.check_whole("build templates")
    return call.sandboxes.builds


def parse_name(text: str) -> tuple[str, str]:
    """A template's name and the tag behind it, which may be empty.

    Raises:
        InvalidRequest: it is no name.
    """
    name, _, tag = text.partition(":")
    if not LEGAL_NAME.fullmatch(name) or name in RESERVED or (":" in text and not LEGAL_NAME.fullmatch(tag)):
        raise InvalidRequest(
            "a template's name, and the tag behind its colon, have 1 to 64 letters, digits or any of _ . - and begin "
            "with no mark"
        )
    return name, tag


def check_tags(tags: list[str]) -> None:
    """Refuse what can be no tag, and more than a template has."""
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"a template has at most {MAX_TAGS} tags")
    if not all(LEGAL_NAME.fullmatch(each) for each in tags):
        raise InvalidRequest("a tag has 1 to 64 letters, digits or any of _ . - and begins with no mark")


def model(template: Template, builds: list[Build]) -> TemplateModel:
    """A template, with its builds, the newest first, if it is an owner's."""
    told = TemplateModel(
        templateID=template.id,
        aliases=template.aliases,
        description=template.description,
        cpuCount=template.vcpus,
        memoryMB=template.memory_mb,
        diskSizeMB=template.disk_mb,
        envdVersion=ENVD_VERSION,
        public=not builds,
        names=template.aliases,
    )
    if builds:
        told.buildID, told.buildStatus, told.buildCount = builds[0].id, builds[0].status, len(builds)
        told.createdAt, told.updatedAt = at(builds[-1].created), at(builds[0].ended or builds[0].created)
    return told


def built(call: Call) -> list[TemplateModel]:
    """The templates in the key's sight that its owner has built."""
    found, builds = [], call.sandboxes.builds
    for name in dict.fromkeys(each.name for each in builds.of(call.owner)):
        mine = builds.of_template(call.owner, name)
        ready = (call.sandboxes.snapshots.find(each.snapshot) for each in mine)
        result = next((each for each in ready if each is not None), None)
        if result is not None and call.mine.key.scope.covers(result.sandbox, result.template.id):
            found.append(model(result.template, mine))
    return found


async def list_templates(call: Call) -> list[TemplateModel]:
    """The templates that this server offers, and those that you have built."""
    return [model(template, []) for template in call.sandboxes.templates] + built(call)


async def get_template(call: Call) -> TemplateModel:
    """One template, by id or alias."""
    name = call.path["template"]
    template = call.sandboxes.templates.find(name)
    if template is not None:
        return model(template, [])
    for each in built(call):
        if name.partition(":")[0] in (each.templateID, *each.names):
            return each
    raise NotFound("template not found")


async def delete_template(call: Call) -> None:
    """Delete a template that you have built, or a snapshot, which is a template to E2B's clients.

    The server's own templates are not found here.
    """
    name = call.path["template"]
    if call.mine.find_snapshot(name) is not None:
        await call.mine.delete_snapshot(name)
    else:
        await builds_of(call).delete(call.owner, name)


async def request_build(call: Call, body: RequestBuild) -> BuildModel:
    """Request a build, which waits for its files and its start."""
    builds, (name, tag) = builds_of(call), parse_name(body.name)
    tags = list(dict.fromkeys([*([tag] if tag else []), *body.tags])) or [DEFAULT_TAG]
    check_tags(tags)
    if call.sandboxes.templates.find(name) is not None:
        raise Conflict(f"{name!r} is the name of a template of this server", hint="choose another name")
    wants = {"vcpus": body.cpuCount or 0, "memory_mb": body.memoryMB or 0, "disk_mb": body.minFreeDiskMb or 0}
    build = await builds.request(call.owner, name, tags, wants)
    return BuildModel(build.template, build.id, False, [name], tags, [name])


async def upload_link(call: Call) -> UploadLink:
    """Where the files of a COPY are to be sent, by the hash of theirs in that step."""
    call.mine.key.scope.check_change()
    files = call.path["files"]
    if not FILES_HASH.fullmatch(files):
        raise InvalidRequest("files are named by a SHA-256 in small hexadecimal digits")
    found = builds_of(call).link(call.owner, call.path["template"], files)
    request = call.http.request
    scheme = request.headers.get("X-Forwarded-Proto", request.protocol)
    url = f"{'https' if scheme == 'https' else 'http'}://{request.host}{call.http.application.settings['base_url']}"
    return UploadLink(found.file is not None, f"{url}/templates/{found.template}/files/{files}?upload={found.token}")


async def upload(call: Call) -> None:
    """Take the files of a COPY, a tar that may be compressed. The query permits it in place of a key."""
    uploads = call.sandboxes.builds.uploads
    found = uploads.find(call.query.upload)
    if found is None or (found.template, found.files) != (call.path["template"], call.path["files"]):
        guesses = call.http.application.settings["guesses"]
        raise refused(call.http.request, guesses, bool(call.query.upload), "GET of this path tells where to send files")
    await uploads.receive(found, call.http.body_chunks())


async def start_build(call: Call, body: StartBuild) -> None:
    """Start a build. It goes on when the client has gone, in a sandbox of yours."""
    builds = builds_of(call)
    build = builds.get(call.owner, call.path["template"], call.path["build"])
    if body.fromImageRegistry:
        raise InvalidRequest("fromImageRegistry is not offered, because no images are fetched here")
    if bool(body.fromImage) == bool(body.fromTemplate):
        raise InvalidRequest("one of fromImage and fromTemplate is needed")
    name = body.fromTemplate or template_of_image(body.fromImage)
    template = call.sandboxes.templates.find(name)
    source = None if template is not None else call.mine.find_source(name)
    if source is not None:
        template = source.template
    if template is None:
        known = ", ".join(each.id for each in call.sandboxes.templates)
        raise InvalidRequest(
            f"unknown template: {name[:100]}", hint=f"this server offers {known}, and your own snapshots and templates"
        )
    steps = [Step(each.type, each.args, each.filesHash) for each in body.steps]
    recipe = Recipe(source.id if source else template.id, steps, body.startCmd, body.readyCmd)
    force = body.force or any(each.force for each in body.steps)
    builds.start(build, recipe, template, source, force=force)


async def build_status(call: Call) -> StatusModel:
    """How a build goes, and lines of its log."""
    builds, query = builds_of(call), call.query
    build = builds.get(call.owner, call.path["template"], call.path["build"])
    lines = builds.log_of(build)[query.logsOffset : query.logsOffset + query.limit]
    return StatusModel(
        templateID=build.template,
        buildID=build.id,
        status=build.status,
        logs=[],
        logEntries=[entry(line) for line in lines],
        reason=Reason(build.reason, build.step) if build.status is Status.ERROR else None,
    )


def entry(line: Line) -> LogEntry:
    return LogEntry(at(line.moment), line.message, line.level, line.step)


async def assign_tags(call: Call, body: AssignTags) -> AssignedTags:
    """Let tags name a build. Other builds of its template lose them."""
    builds = builds_of(call)
    check_tags(body.tags)
    found = builds.named(call.owner, body.target)
    if found is None:
        raise NotFound("template not found")
    await builds.assign(found[0], body.tags)
    return AssignedTags(body.tags, found[0].id)


async def remove_tags(call: Call, body: RemoveTags) -> None:
    """Remove tags from a template. A build that no tag names any more is deleted."""
    await builds_of(call).remove(call.owner, body.name, body.tags)


async def list_tags(call: Call) -> list[TagModel]:
    """The tags of a template, the newest first."""
    found = builds_of(call).of_template(call.owner, call.path["template"])
    tags = [(since, tag, build.id) for build in found for tag, since in build.tags.items()]
    return [TagModel(tag, build, at(since)) for since, tag, build in sorted(tags, reverse=True)]
