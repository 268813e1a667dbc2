"""Templates by the SDK's builder, over a driver whose machines are fakes: steps, uploads, tags, ends, restarts."""

import asyncio
import errno
import io
import json
import sqlite3
import tarfile
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import HostFull, NotFound
from kernel_gateway.sandbox import builds, uploads
from kernel_gateway.sandbox.key import Scope
from tests.api.test_e2b import Box
from tests.fakes import FakeDriver, SavingDriver, Script, Service, error_of, eventually, serving

FILES = "a" * 64


@pytest.fixture
async def service(tmp_path: Path, driver: SavingDriver) -> AsyncIterator[Service]:
    """A service where a key may have three snapshots."""
    async with serving(tmp_path, driver, max_sandboxes=6, max_snapshots=3) as running:
        yield running


async def requested(service: Service, name: str = "mine", **fields: Any) -> Any:
    answer = await service.call("POST", "/v3/templates", {"name": name, **fields})
    assert answer.code == 202, answer.body
    return json.loads(answer.body)


async def start(service: Service, build: Any, *steps: Any, **fields: Any) -> int:
    path = f"/v2/templates/{build['templateID']}/builds/{build['buildID']}"
    body = {"fromTemplate": "base", "steps": [step(*each) for each in steps], **fields}
    return int((await service.call("POST", path, body)).code)


def step(kind: str, *args: str, **fields: Any) -> Any:
    files = {"filesHash": FILES} if kind == "COPY" else {}
    return {"type": kind, "args": list(args), **files, **fields}


async def status(service: Service, build: Any, query: str = "", key: str = "") -> Any:
    path = f"/templates/{build['templateID']}/builds/{build['buildID']}/status{query}"
    answer = await service.call("GET", path, key=key)
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def ended(service: Service, build: Any) -> Any:
    async with asyncio.timeout(30):
        while (found := await status(service, build))["status"] in ("waiting", "building"):
            await asyncio.sleep(0.01)
    return found


async def built(service: Service, *steps: Any, name: str = "mine", **fields: Any) -> Any:
    """A build that is over."""
    build = await requested(service, name)
    assert await start(service, build, *steps, **fields) == 202
    return {**build, **await ended(service, build)}


async def tags(service: Service, name: str = "mine") -> dict[str, str]:
    answer = await service.call("GET", f"/templates/{name}/tags")
    return {each["tag"]: each["buildID"] for each in json.loads(answer.body)}


def archive(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def link(service: Service, build: Any, files: str = FILES) -> Any:
    answer = await service.call("GET", f"/templates/{build['templateID']}/files/{files}")
    assert answer.code == 201, answer.body
    return json.loads(answer.body)


async def put(service: Service, url: str, content: bytes) -> int:
    return int((await service.call("PUT", url.removeprefix(service.url), body=content, key=None)).code)


def snapshots(tmp_path: Path) -> int:
    return len(list((tmp_path / "snapshots").iterdir()))


async def test_a_template(service: Service, tmp_path: Path) -> None:
    """Steps are done in their order and context, and sandboxes start from the result by id, name and tag."""
    build = await requested(service, "mine:v1", tags=["v2"])
    assert (build["names"], build["tags"], build["aliases"]) == (["mine"], ["v1", "v2"], ["mine"])
    told = await link(service, build)
    assert told["present"] is False
    assert await put(service, told["url"], archive(app__main=b"print(1)", app__lib__x=b"2")) == 200
    assert (await link(service, build))["present"] is True
    assert await start(
        service,
        build,
        ("ENV", "A", "1", "B", "2"),
        ("WORKDIR", "/srv"),
        ("WORKDIR", "deep"),
        ("COPY", "app", "/srv/app"),
        ("RUN", "echo $B"),
        ("RUN", "whoami"),
        ("RUN", "whoami", "root"),
        ("USER", "root"),
        ("RUN", "whoami"),
        startCmd="sleep 600",
        readyCmd="test -e /srv/app/main",
    ) == 202  # fmt: skip
    found = await ended(service, build)
    assert (found["status"], found["logs"]) == ("ready", [])
    said = [(each.get("step"), each["message"]) for each in found["logEntries"]]
    assert ("5", "2") in said
    assert [text for _, text in said if " in " in text] == [
        "user in /srv/deep", "root in /srv/deep", "root in /srv/deep",
    ]  # fmt: skip
    assert len(service.sandboxes) == 0
    for name in (build["templateID"] + ":v1", "mine:v1", "mine:v2"):
        box = await service.create(templateID=name)
        guest = service.guest(box)
        assert (guest.files["/srv/app/main"], guest.files["/srv/app/lib/x"]) == (b"print(1)", b"2")
        assert guest.env["E2B_TEMPLATE_ID"] == build["templateID"]
        assert "A" not in guest.env
        shown = json.loads((await service.call("GET", f"/sandboxes/{box}")).body)
        assert (shown["templateID"], shown["alias"]) == (build["templateID"], "mine")
        commands = json.loads((await service.call("GET", f"/sandboxes/{box}/commands")).body)
        assert [each["args"][-1] for each in commands] == ["sleep 600"]
    assert (await service.call("POST", "/sandboxes", {"templateID": "mine"})).code == 400
    assert json.loads((await service.call("GET", "/snapshots")).body) == []
    assert json.loads((await service.call("GET", "/limits")).body)["snapshots"]["used"] == 1
    assert snapshots(tmp_path) == 1


async def test_lists_and_owners(service: Service) -> None:
    """A template is listed and found by its owner alone."""
    build = await built(service, ("RUN", "touch x"))
    for path in ("/templates", "/v2/templates"):
        found = {each["templateID"]: each for each in json.loads((await service.call("GET", path)).body)}
        assert found.keys() == {"code_interpreter", "base", build["templateID"]}
        mine = found[build["templateID"]]
        assert (mine["names"], mine["public"], mine["buildID"], mine["buildStatus"], mine["memoryMB"]) == (
            ["mine"], False, build["buildID"], "ready", 512,
        )  # fmt: skip
        assert build["templateID"] not in (await service.call("GET", path, key=service.other_key)).body.decode()
    alias = json.loads((await service.call("GET", "/templates/aliases/mine")).body)
    assert (alias["templateID"], alias["public"]) == (build["templateID"], False)
    at = f"/templates/{build['templateID']}"
    for method, path, body in (
        ("GET", "/templates/aliases/mine", None),
        ("GET", at, None),
        ("GET", f"{at}/tags", None),
        ("GET", f"{at}/files/{FILES}", None),
        ("GET", f"{at}/builds/{build['buildID']}/status", None),
        ("POST", f"/v2{at}/builds/{build['buildID']}", {"fromTemplate": "base"}),
        ("POST", "/templates/tags", {"target": "mine", "tags": ["x"]}),
        ("DELETE", "/templates/tags", {"name": "mine", "tags": ["default"]}),
        ("DELETE", at, None),
    ):
        answer = await service.call(method, path, body, key=service.other_key)
        assert (answer.code, error_of(answer)["error"]) == (404, "not_found"), path
    assert (await service.call("POST", "/sandboxes", {"templateID": "mine"}, key=service.other_key)).code == 400


async def test_keys_with_limits(service: Service) -> None:
    """A key for one template builds none, and a read-only one only looks."""
    build = await built(service)
    for number, scope in enumerate((Scope(template="base"), Scope(is_read_only=True), Scope(is_for_metrics=True))):
        key = f"e2b_{number}" + "b" * 39
        service.store.add_key(key, "limited", owner=service.owner, scope=scope)
        at = f"/templates/{build['templateID']}"
        for method, path, body in (
            ("POST", "/v3/templates", {"name": "x"}),
            ("GET", f"{at}/files/{FILES}", None),
            ("DELETE", at, None),
            ("POST", "/templates/tags", {"target": "mine", "tags": ["x"]}),
        ):
            assert (await service.call(method, path, body, key=key)).code == 403, (scope, path)
        looks = await service.call("GET", f"{at}/builds/{build['buildID']}/status", key=key)
        assert looks.code == (200 if scope.is_read_only else 403)
    assert len(await tags(service)) == 1


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("e2bdev/base", 202), ("debian", 202), ("debian:bookworm-slim", 202), ("debian:12.9", 202),
        ("python:3", 202), ("python:3.11-slim", 202), ("docker.io/library/python:3.11.9-slim-bookworm", 202),
        ("e2bdev/code-interpreter", 202),
        ("python:3.12", 400), ("python:2", 400), ("debian:13", 400), ("debian:trixie", 400), ("ubuntu", 400),
        ("alpine:3", 400), ("node:lts", 400), ("ghcr.io/x/python:3", 400), ("", 400),
    ],
)  # fmt: skip
async def test_images(service: Service, image: str, status: int) -> None:
    """What our templates can stand for is built on. Other images are refused, and the answer names what is possible."""
    build = await requested(service)
    path = f"/v2/templates/{build['templateID']}/builds/{build['buildID']}"
    answer = await service.call("POST", path, {"fromImage": image})
    assert answer.code == status
    if status == 202:
        assert (await ended(service, build))["status"] == "ready"
    elif image:
        assert "debian:12" in error_of(answer)["hint"]


@pytest.mark.parametrize(
    "body",
    [
        {"steps": [step("RUN")]},
        {"steps": [step("RUN", "")]},
        {"steps": [step("RUN", "a", "b", "c")]},
        {"steps": [step("ENV", "A")]},
        {"steps": [step("ENV", "A=", "1")]},
        {"steps": [step("COPY", "a")]},
        {"steps": [step("COPY", "a", "b", filesHash="")]},
        {"steps": [step("COPY", "a", "b", filesHash="../x")]},
        {"steps": [step("COPY", "a", "b")]},
        {"steps": [step("WORKDIR", "a\0b")]},
        {"steps": [step("EXPOSE", "80")]},
        {"steps": [step("RUN", "x" * 200_000)]},
        {"steps": [step("RUN", "true")] * 201},
        {"startCmd": "a\0"},
        {"fromTemplate": "none"},
        {"fromTemplate": ""},
        {"fromImage": "debian"},
        {"fromImageRegistry": {"type": "registry", "username": "u", "password": "p"}},
    ],
)
async def test_what_can_not_be_built(service: Service, body: Any) -> None:
    """It is 400 at once, and the build may still be started with what can be."""
    build = await requested(service)
    path = f"/v2/templates/{build['templateID']}/builds/{build['buildID']}"
    answer = await service.call("POST", path, {"fromTemplate": "base", **body})
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")
    assert await start(service, build) == 202
    assert await start(service, build) == 409
    await ended(service, build)


async def test_requests_that_are_refused(service: Service) -> None:
    """Names, tags and sizes that can't be, and a name that is taken."""
    for name in ("", "a/b", "-a", "a:", "a:b:c", "ü", "tags", "aliases", "a" * 65):
        assert (await service.call("POST", "/v3/templates", {"name": name})).code == 400
    assert (await service.call("POST", "/v3/templates", {"name": "a", "tags": ["a b"]})).code == 400
    many = [f"t{number}" for number in range(100)]
    for fields in ({"name": "a", "tags": [*many, "x"]}, {"name": "a:x", "tags": many}):
        assert (await service.call("POST", "/v3/templates", fields)).code == 400
    assert (await service.call("POST", "/v3/templates", {"name": "base"})).code == 409
    box = await service.create()
    assert (await service.call("POST", f"/sandboxes/{box}/snapshots", {"name": "kept"})).code == 201
    assert (await service.call("POST", "/v3/templates", {"name": "kept"})).code == 409
    for wants in ({"cpuCount": 2}, {"memoryMB": 513}, {"minFreeDiskMb": 2000}):
        assert await start(service, await requested(service, **wants)) == 400
    assert await start(service, await requested(service, cpuCount=1, memoryMB=512, minFreeDiskMb=1)) == 202
    assert (await service.call("POST", f"/sandboxes/{box}/snapshots", {"name": "mine"})).code == 409


async def test_a_driver_that_can_not(tmp_path: Path) -> None:
    """Without machines that can be saved, no build is taken."""
    async with serving(tmp_path, FakeDriver()) as service:
        answer = await service.call("POST", "/v3/templates", {"name": "mine"})
        assert (answer.code, error_of(answer)["error"]) == (501, "not_implemented")


@pytest.mark.parametrize(
    ("steps", "fields", "at", "word"),
    [
        ([("RUN", "true2"), ("RUN", "exit 3")], {}, "1", "exit status 2: sh: not in"),
        ([("ENV", "A", "1"), ("RUN", "exit 3")], {}, "2", "RUN exit 3 ended with exit status 3"),
        ([("RUN", "kill -9 $$")], {}, "1", "ended by signal 9"),
        ([("USER", "nobody2")], {}, "1", "no such user"),
        ([("RUN", "whoami", "nobody2")], {}, "1", "nobody2"),
        ([("WORKDIR", "/a")], {"startCmd": "exit 4", "readyCmd": "exit 1"}, "finalize", "start command ended with"),
    ],
)
async def test_a_step_that_fails(service: Service, tmp_path: Path, steps: Any, fields: Any, at: str, word: str) -> None:
    """The reason names the step and what it said, and nothing is left."""
    build = await built(service, *steps, **fields)
    assert (build["status"], build["reason"]["step"]) == ("error", at)
    assert word in build["reason"]["message"]
    assert (build["logEntries"][-1]["level"], build["logEntries"][-1]["step"]) == ("error", at)
    assert (snapshots(tmp_path), len(service.sandboxes)) == (0, 0)
    assert (await service.call("POST", "/sandboxes", {"templateID": "mine"})).code == 400
    assert (await service.call("GET", "/templates/aliases/mine")).code == 404


async def test_a_machine_that_fails(service: Service, driver: SavingDriver, tmp_path: Path) -> None:
    """No machine, one that dies, and one that can't be saved end the build, and nothing is left."""
    driver.script = Script(start_error=DriverError("no"))
    build = await built(service, ("RUN", "true"))
    assert (build["status"], build["reason"]["step"]) == ("error", "base")
    driver.script = Script(save_error=DriverError("no"))
    build = await built(service)
    assert (build["status"], build["reason"]["step"]) == ("error", "finalize")
    driver.script = Script()
    build = await requested(service)
    await start(service, build, ("RUN", "sleep 60"))
    await eventually(lambda: [each for each in service.sandboxes if each.kernel is not None])
    await eventually(lambda: any(iter(next(iter(service.sandboxes)).guest.commands)))
    box = next(iter(service.sandboxes)).id
    assert service.sandboxes.get(service.owner, box).metadata == {"buildID": build["buildID"], "template": "mine"}
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert (await ended(service, build))["status"] == "error"
    assert (snapshots(tmp_path), len(service.sandboxes), len(driver.alive)) == (0, 0, 0)


async def test_rebuilds(service: Service, tmp_path: Path) -> None:
    """The same steps cost nothing, other steps and `force` a build. The tag moves, and what no tag names is deleted."""
    first = await built(service, ("RUN", "touch /a"))
    creates = service.sandboxes.metrics.creates

    def machines() -> float:
        return sum(each.value for each in next(iter(creates.collect())).samples if each.name.endswith("_count"))

    made = machines()
    again = await built(service, ("RUN", "touch /a"))
    assert (again["status"], again["templateID"], machines()) == ("ready", first["templateID"], made)
    assert await tags(service) == {"default": again["buildID"]}
    for number, fields in enumerate(({"force": True}, {"readyCmd": "exit 0"}), 1):
        other = await built(service, ("RUN", "touch /a"), **fields)
        assert (other["status"], machines()) == ("ready", made + number)
        await eventually(lambda: snapshots(tmp_path) == 1)  # the other one goes when the build is ready
    changed = await built(service, ("RUN", "touch /b"))
    box = await service.create(templateID="mine")
    assert "/b" in service.guest(box).files
    assert await tags(service) == {"default": changed["buildID"]}
    on_top = await built(service, ("RUN", "touch /c"), name="child", fromTemplate="mine:default")
    box = await service.create(templateID="child")
    assert {"/b", "/c"} <= service.guest(box).files.keys()
    assert on_top["templateID"] != changed["templateID"]


async def test_tags(service: Service, tmp_path: Path) -> None:
    """A tag names one build. One that loses its last tag is deleted with its snapshot."""
    first = await built(service, ("RUN", "touch /a"))
    answer = await service.call("POST", "/templates/tags", {"target": "mine:default", "tags": ["old", "older"]})
    assert (answer.code, json.loads(answer.body)) == (201, {"tags": ["old", "older"], "buildID": first["buildID"]})
    second = await built(service, ("RUN", "touch /b"))
    assert await tags(service) == {
        "default": second["buildID"], "old": first["buildID"], "older": first["buildID"],
    }  # fmt: skip
    assert snapshots(tmp_path) == 2
    assert "/a" in service.guest(await service.create(templateID="mine:old")).files
    assert (await service.call("DELETE", "/templates/tags", {"name": "mine", "tags": ["old", "no"]})).code == 404
    assert (await service.call("DELETE", "/templates/tags", {"name": "mine", "tags": ["old", "older"]})).code == 204
    assert (await tags(service), snapshots(tmp_path)) == ({"default": second["buildID"]}, 1)
    assert (await service.call("POST", "/templates/tags", {"target": "mine:old", "tags": ["x"]})).code == 404
    assert (await service.call("DELETE", "/templates/mine")).code == 204
    assert (await service.call("DELETE", "/templates/mine")).code == 404
    assert snapshots(tmp_path) == 0


async def test_limits(service: Service, tmp_path: Path) -> None:
    """Templates count as snapshots. One build of a key runs at a time, and ten may wait."""
    for name in ("a", "b", "c"):
        assert (await built(service, name=name))["status"] == "ready"
    build = await built(service, name="d")
    assert (build["status"], snapshots(tmp_path)) == ("error", 3)
    assert "3 snapshots" in build["reason"]["message"]
    open_ = [await requested(service, "a") for _ in range(10)]
    assert (await service.call("POST", "/v3/templates", {"name": "a"})).code == 429
    for each in open_[:2]:
        await start(service, each, ("RUN", "sleep 60"))
    await eventually(lambda: len(service.sandboxes) == 1)
    assert [(await status(service, each))["status"] for each in open_[:3]] == ["building", "waiting", "waiting"]
    assert (await service.call("DELETE", "/templates/a")).code == 204
    assert (len(service.sandboxes), snapshots(tmp_path)) == (0, 2)


async def test_a_long_log(service: Service) -> None:
    """It comes in pages of 100 lines, and what is over its limit is left out and said so."""
    steps = [("RUN", f"echo line{number}") for number in range(60)]
    build = await built(service, *steps)
    page = build["logEntries"]
    assert len(page) == 100
    rest = (await status(service, build, "?logsOffset=100"))["logEntries"]
    texts = [each["message"] for each in page + rest]
    assert [text for text in texts if text.startswith("line")] == [f"line{number}" for number in range(60)]
    assert (await status(service, build, "?logsOffset=1000"))["logEntries"] == []
    build = await built(service, *[("RUN", f"echo {'x' * 100_000}")] * 10)
    found = service.sandboxes.builds.get(service.owner, "mine", build["buildID"])
    lines = service.sandboxes.builds.log_of(found)
    assert "the log is full" in lines[-1].message
    assert sum(len(line.message) for line in lines) < 300_000


async def test_uploads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the link may send files, within limits, and nothing is left of them when the build is over."""
    build = await requested(service)
    assert (await service.call("GET", f"/templates/{build['templateID']}/files/xyz")).code == 400
    url = (await link(service, build))["url"]
    for wrong in (url[:-1] + "g", url.partition("?")[0], url.replace(FILES, "b" * 64)):
        assert await put(service, wrong, b"x") == 401
    monkeypatch.setattr(uploads, "SIZE", 1000)
    assert await put(service, url, bytes(1001)) == 429
    assert await start(service, build, ("COPY", "a", "/a")) == 400
    assert await put(service, url, bytes(600)) == 200
    other = await link(service, build, "b" * 64)
    assert await put(service, other["url"], bytes(600)) == 429
    assert await put(service, url, archive(a=b"1")) == 200
    monkeypatch.setattr(uploads, "MOST", 2)
    assert (await service.call("GET", f"/templates/{build['templateID']}/files/{'c' * 64}")).code == 429
    monkeypatch.setattr(service.sandboxes.places, "_space", lambda: (0, 1 << 30))
    assert await put(service, url, b"x") == 507
    monkeypatch.undo()
    assert await put(service, url, archive(a=b"1")) == 200
    assert await start(service, build, ("COPY", "a", "/a")) == 202
    assert (await ended(service, build))["status"] == "ready"
    assert await put(service, url, b"x") == 401
    assert (await service.call("GET", f"/templates/{build['templateID']}/files/{FILES}")).code == 409


async def test_uploads_at_once(service: Service) -> None:
    """Files come from one request at a time. Those of a template that is deleted end it, even if nothing comes."""
    build = await requested(service)
    url = (await link(service, build))["url"]
    known = service.sandboxes.builds.uploads
    found = known.of_template(build["templateID"])[FILES]

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(1000)
        await asyncio.Event().wait()

    coming = asyncio.create_task(known.receive(found, chunks()))
    await eventually(lambda: found.size == 1000)
    assert await put(service, url, b"x") == 409
    assert await start(service, build, ("COPY", "a", "/a")) == 400
    assert (await service.call("DELETE", "/templates/mine")).code == 204
    assert await put(service, url, b"x") == 401
    async with asyncio.timeout(30):
        with pytest.raises(NotFound):
            await coming
    assert known._sizes[service.owner] == 0


async def test_uploads_that_the_disk_refuses(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 507 if their file can't be opened or written, and they may be sent again."""
    url = (await link(service, await requested(service)))["url"]

    def none(**_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    for broken in (none, lambda **_: Path("/dev/full").open("wb")):  # noqa: SIM115
        monkeypatch.setattr(uploads.tempfile, "TemporaryFile", broken)
        answer = await service.call("PUT", url.removeprefix(service.url), body=b"x", key=None)
        assert (answer.code, error_of(answer)["error"]) == (507, "insufficient_storage")
        assert service.sandboxes.builds.uploads._sizes[service.owner] == 0
    monkeypatch.undo()
    assert await put(service, url, b"x") == 200


def known(service: Service) -> dict[str, Any]:
    """The tags of the builds in memory."""
    return {each.id: each.tags for each in service.sandboxes.builds.of(service.owner)}


def written(service: Service) -> dict[str, Any]:
    """The tags of the builds in the database."""
    return {build: json.loads(record)["tags"] for build, record in service.store.builds().items()}


async def hang_up(service: Service, method: str, path: str, body: bytes = b"") -> None:
    """Send a request, and hang up when it waits for the database."""
    await eventually(lambda: written(service) == known(service))
    with closing(sqlite3.connect(service.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await eventually(lambda: written(service) != known(service))
        writer.close()
        await eventually(lambda: not len(service.app.settings["requests"]))
        other.execute("ROLLBACK")


async def test_clients_that_hang_up(service: Service, tmp_path: Path) -> None:
    """What they have begun is done to its end: a request, the last tag's removal, and a delete while a build runs."""
    await hang_up(service, "POST", "/v3/templates", b'{"name": "asked"}')
    await eventually(lambda: written(service) == known(service) != {})
    await built(service)
    await hang_up(service, "DELETE", "/templates/tags", b'{"name": "mine", "tags": ["default"]}')
    await eventually(lambda: written(service) == known(service) and not snapshots(tmp_path))
    await built(service)
    running, unstarted = await requested(service), await requested(service)
    assert await put(service, (await link(service, unstarted))["url"], b"x") == 200
    await start(service, running, ("RUN", "sleep 60"))
    await eventually(lambda: len(service.sandboxes) == 1)
    await hang_up(service, "DELETE", "/templates/mine")
    await eventually(lambda: written(service) == known(service) and not snapshots(tmp_path))
    assert [each.name for each in service.sandboxes.builds.of(service.owner)] == ["asked"]
    assert (len(service.sandboxes), service.sandboxes.builds.uploads._sizes[service.owner]) == (0, 0)
    assert service.sandboxes.builds._logs == {}


async def test_writes_that_are_late(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused because its write was late has not happened, and the database says so, too. The rest goes on."""
    await built(service)
    running = await requested(service)
    await start(service, running, ("RUN", "sleep 60"))
    await eventually(lambda: any(each.kernel is not None for each in service.sandboxes))
    is_written, may_end = asyncio.Event(), asyncio.Event()
    write = service.store.builds_changed

    async def late(kept: Any, gone: Any) -> None:
        monkeypatch.undo()
        await write(kept, gone)
        is_written.set()
        await may_end.wait()
        raise HostFull("the server's database can't be written: it is locked")

    monkeypatch.setattr(service.store, "builds_changed", late)
    removed = asyncio.create_task(service.call("DELETE", "/templates/tags", {"name": "mine", "tags": ["default"]}))
    await is_written.wait()
    box = next(iter(service.sandboxes)).id
    assert (await service.call("DELETE", f"/sandboxes/{box}")).code == 204
    assert (await ended(service, running))["status"] == "error"
    may_end.set()
    assert (await removed).code == 503
    assert (await status(service, running))["status"] == "error"
    for method, path, body in (
        ("POST", "/templates/tags", {"target": "mine", "tags": ["x"]}),
        ("POST", "/v3/templates", {"name": "other"}),
        ("DELETE", "/templates/mine", None),
    ):
        before = known(service)
        monkeypatch.setattr(service.store, "builds_changed", late)
        assert (await service.call(method, path, body)).code == 503
        assert written(service) == known(service) == before
    assert await service.create(templateID="mine")


async def test_a_build_that_is_never_started(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up with its files, though nobody asks."""
    build = await requested(service)
    assert await put(service, (await link(service, build))["url"], b"x") == 200
    monkeypatch.setattr(builds, "TIME_LIMIT", 0)
    assert (await ended(service, build))["reason"]["message"] == "it was never started"
    assert service.sandboxes.builds.uploads._sizes[service.owner] == 0
    assert await start(service, build) == 409


async def test_an_earlier_result_that_goes_while_its_user_waits(service: Service) -> None:
    """A build that would take it is done anew."""
    assert (await built(service, ("RUN", "touch /a")))["status"] == "ready"
    other, again = await requested(service), await requested(service)
    assert await start(service, other, ("RUN", "touch /b")) == 202
    assert await start(service, again, ("RUN", "touch /a")) == 202
    assert (await ended(service, again))["status"] == "ready"
    assert "/a" in service.guest(await service.create(templateID="mine")).files


async def test_deletes_and_tags_at_once(service: Service, tmp_path: Path) -> None:
    """A template is deleted once, its tags are removed once, and it has at most 100 of them."""
    await built(service)
    many = [f"t{number}" for number in range(100)]
    answer = await service.call("POST", "/templates/tags", {"target": "mine", "tags": many})
    assert (answer.code, list(await tags(service))) == (429, ["default"])
    gone = {"name": "mine", "tags": ["default"]}
    answers = await asyncio.gather(*(service.call("DELETE", "/templates/tags", gone) for _ in range(3)))
    assert sorted(each.code for each in answers) == [204, 404, 404]
    await built(service)
    answers = await asyncio.gather(*(service.call("DELETE", "/templates/mine") for _ in range(3)))
    assert sorted(each.code for each in answers) == [204, 404, 404]
    assert snapshots(tmp_path) == 0


async def test_the_server_comes_back(tmp_path: Path, driver: SavingDriver) -> None:
    """Templates are there after a restart. Builds that were not over have failed, and nothing is left of them."""
    async with serving(tmp_path, driver) as service:
        done = await built(service, ("RUN", "touch /a"))
        waiting = await requested(service, "later")
        running = await requested(service, "later")
        await start(service, running, ("RUN", "sleep 60"))
        await eventually(lambda: len(service.sandboxes) == 1)
    async with serving(tmp_path, driver) as service:
        for build in (waiting, running):
            found = await status(service, build)
            assert found["status"] == "error"
            assert found["reason"]["message"]
        assert await tags(service) == {"default": done["buildID"]}
        assert "/a" in service.guest(await service.create(templateID="mine")).files
        assert (len(service.sandboxes), snapshots(tmp_path)) == (1, 1)
        assert (await built(service, ("RUN", "touch /a")))["status"] == "ready"


async def test_a_server_that_died_with_a_result(tmp_path: Path, driver: SavingDriver) -> None:
    """A snapshot whose build was never written down as ready is deleted by the next server."""
    async with serving(tmp_path, driver) as service:
        build = await requested(service)
        box = await service.create()
        sandbox = service.sandboxes.get(service.owner, box)
        await service.sandboxes.snapshots.take(sandbox, build["buildID"])
        assert snapshots(tmp_path) == 1
    async with serving(tmp_path, driver) as service:
        await eventually(lambda: snapshots(tmp_path) == 0)
        assert (await status(service, build))["status"] == "error"


async def test_a_build_that_is_deleted_while_it_is_saved(
    service: Service, driver: SavingDriver, tmp_path: Path
) -> None:
    """The snapshot that was under way is deleted, too."""
    driver.script = Script(save_delay=0.2)
    build = await requested(service)
    await start(service, build)
    await eventually(lambda: service.sandboxes.snapshots._begun)
    assert (await service.call("DELETE", "/templates/mine")).code == 204
    await eventually(lambda: not service.sandboxes.snapshots._begun)
    assert (snapshots(tmp_path), len(service.sandboxes)) == (0, 0)


async def test_user_and_workdir(service: Service) -> None:
    """The last ones hold for E2B's commands that name none, also in forks and after a pause."""
    await built(service, ("WORKDIR", "/srv"), ("USER", "root"))
    box = await service.create(templateID="mine")
    fork = json.loads((await service.call("POST", f"/sandboxes/{box}/fork", {})).body)[0]["sandbox"]["sandboxID"]
    await service.call("POST", f"/sandboxes/{box}/pause", {})
    await service.call("POST", f"/sandboxes/{box}/resume", {})
    for each in (box, fork):
        e2b = Box(service, service.sandboxes.get(service.owner, each))
        whoami = {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", "whoami"]}}
        for options, said in (
            ({}, "root in /srv"),
            ({"headers": {"Authorization": "Basic " + b64encode(b"user:").decode()}}, "user in /srv"),
        ):
            events, _ = await e2b.stream("process.Process/Start", whoami, **options)
            told = [event["event"]["data"]["stdout"] for event in events if "data" in event["event"]]
            assert b64decode("".join(told)).decode() == f"{said}\n"
        entry = json.loads((await e2b.rpc("filesystem.Filesystem/MakeDir", {"path": "d"})).body)["entry"]
        assert entry["path"] == "/root/d"
