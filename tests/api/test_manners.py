"""What clients of HTTP expect: HEAD, null for what is not set, names of files in any writing, errors with fields."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from guest_agent import wire
from kernel_gateway.api.app import ROUTES
from kernel_gateway.api.base import Route, decode, is_struct
from kernel_gateway.errors import InvalidRequest
from tests.api.test_files import BOUNDARY
from tests.api.test_malformed import VALID
from tests.fakes import ENDLESS, HOME, Service, error_of

BODIES = list({route.body.__name__: route.body for route in ROUTES if is_struct(route.body)}.values())
VARYING = {"Date", "Content-Length"}


def path_of(route: Route, service: Service, box: str) -> str:
    kernel = service.sandboxes.get(service.owner, box).kernel_id
    names = {"id": box, "kernel": kernel, "template": "base", "name": "python3", "file": "logo-svg.svg"}
    path = route.path
    for name in route.names:
        path = path.replace(f"{{{name}}}", names.get(name, "none"))
    return path.replace("/api/kernels/" + box, "/api/kernels/" + kernel) + "?path=a.csv"


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if r.method == "GET" and r.path != ENDLESS], ids=lambda route: route.path
)
async def test_head(service: Service, box: str, route: Route) -> None:
    """HEAD answers as GET does, without a body: load balancers, download managers and curl -I ask so."""
    service.guest(box).files[f"{HOME}/a.csv"] = b"a,b\n" * 100
    path = path_of(route, service, box)
    got, head = await service.call("GET", path), await service.call("HEAD", path)
    assert (head.code, head.body) == (got.code, b"")
    assert set(head.headers) | VARYING == set(got.headers) | VARYING
    assert head.headers.get("Content-Type") == got.headers.get("Content-Type")


async def test_head_of_a_file_reads_nothing(service: Service, box: str) -> None:
    """The size of a file is told without a transfer of the file."""
    service.guest(box).files[f"{HOME}/big"] = bytes(50_000_000)
    head = await service.call("HEAD", f"/sandboxes/{box}/files?path=big")
    assert (head.code, head.headers["Content-Length"], head.body) == (200, "50000000", b"")
    assert head.headers["Accept-Ranges"] == "bytes"
    part = await service.call("HEAD", f"/sandboxes/{box}/files?path=big", headers={"Range": "bytes=0-9"})
    assert (part.code, part.headers["Content-Length"]) == (206, "10")
    missing = await service.call("HEAD", f"/sandboxes/{box}/files?path=none")
    assert (missing.code, missing.body) == (404, b"")
    assert {each.length for each in service.guest(box).requests if isinstance(each, wire.Read)} == {0}


async def test_head_of_a_stream_does_not_wait(service: Service, box: str) -> None:
    """HEAD of a command's events ends at once, though the command runs."""
    await service.call("POST", f"/sandboxes/{box}/commands", {"cmd": "sleep", "args": ["60"], "tag": "long"})
    async with asyncio.timeout(5):
        path, accept = f"/sandboxes/{box}/commands/long", {"Accept": "text/event-stream"}
        head = await service.call("HEAD", path, headers=accept)
    assert (head.code, head.headers["Content-Type"]) == (200, "text/event-stream")


async def test_a_path_that_offers_head_says_so(service: Service, box: str) -> None:
    """Another method is still refused, and HEAD where there is no GET."""
    refused = await service.call("PUT", f"/sandboxes/{box}")
    assert (refused.code, refused.headers["Allow"]) == (405, "DELETE, GET, HEAD")
    assert (await service.call("HEAD", f"/sandboxes/{box}/execute")).code == 405


# -- null


def with_nulls(kind: Any, valid: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Bodies in which one field that may be left out is null, each with the body without that field."""
    found = []
    for field in msgspec.structs.fields(kind):
        if not field.required:
            rest = {name: value for name, value in valid.items() if name != field.encode_name}
            found.append(({**rest, field.encode_name: None}, rest))
    return found


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_null_is_absent(kind: Any) -> None:
    """A field that is null means the same as one that is left out, one by one and all together, also inside objects."""
    valid = VALID.get(kind.__name__, {})
    pairs = with_nulls(kind, valid)
    everything = {name: None for body, _ in pairs for name, value in body.items() if value is None}
    pairs.append(({**valid, **everything}, {name: each for name, each in valid.items() if name not in everything}))
    for body, right in pairs:
        assert decode(json.dumps(body).encode(), kind) == decode(json.dumps(right).encode(), kind)


async def test_null_over_http(service: Service, box: str) -> None:
    """What typed clients send for a sandbox and a command is taken."""
    nothing = dict.fromkeys(["metadata", "envVars", "timeout", "network", "allow_internet_access"])
    assert (await service.call("POST", "/sandboxes", {"templateID": "base", **nothing})).code == 201
    inside = {"templateID": "base", "network": {"allowOut": None, "denyOut": None, "allowPublicTraffic": None}}
    assert (await service.call("POST", "/sandboxes", inside)).code == 201
    nothing = dict.fromkeys(["args", "envVars", "cwd", "timeout", "stdin"])
    answer = await service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "true", **nothing})
    assert (answer.code, json.loads(answer.body)["exitCode"]) == (200, 0)
    started = {"cmd": "true", "pty": {"rows": None, "cols": 100}, "stdin": None, "killOnHangUp": None}
    answer = await service.call("POST", f"/sandboxes/{box}/commands", started)
    assert json.loads(answer.body)["pty"] == {"rows": 24, "cols": 100}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ('{"code": null}', "code"),
        ('{"code": "1", "timeout": "null"}', "$.timeout"),
        ('{"timeout": null}', "code"),
        ('{"code": ["null"]}', "$.code"),
    ],
)
async def test_null_of_a_required_field(service: Service, box: str, body: str, where: str) -> None:
    """A required field that is null is missing, and the error names the field."""
    answer = await service.call("POST", f"/sandboxes/{box}/execute", body=body.encode())
    error = error_of(answer)
    assert (error["code"], where in str(error["message"])) == (400, True)


def test_the_value_null_in_a_map_is_refused() -> None:
    """A variable that is null is neither set nor left out, so the client is told."""
    from kernel_gateway.api.rest import CreateSandbox

    with pytest.raises(InvalidRequest, match="envVars"):
        decode(b'{"templateID": "base", "envVars": {"A": null}, "metadata": null}', CreateSandbox)


# -- errors that name the field


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/sandboxes", {"templateID": "base", "timeout": 0}, "timeout"),
        ("/sandboxes", {"templateID": "base", "network": {"allowOut": [3]}}, "network.allowOut"),
        ("/sandboxes/{box}/processes", {"cmd": "true", "cwd": "\0"}, "cwd"),
        ("/sandboxes/{box}/commands", {"cmd": "true", "pty": {"rows": 0}}, "pty.rows"),
        ("/sandboxes/{box}/filesystem", {"path": "x", "content": "?"}, "content"),
    ],
)
async def test_errors_name_the_field(service: Service, box: str, path: str, body: Any, field: str) -> None:
    answer = await service.call("POST", path.format(box=box), body=json.dumps(body).encode())
    error = error_of(answer)
    assert (error["code"], field in str(error["message"])) == (400, True), error


# -- names of files


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ('filename="plain.csv"', "plain.csv"),
        ("filename=plain.csv", "plain.csv"),
        ('filename="日本 1.csv"', "日本 1.csv"),
        ("filename*=UTF-8''%E6%97%A5%E6%9C%AC%201.csv", "日本 1.csv"),
        ("filename=\"__.csv\"; filename*=utf-8'ja'%E6%97%A5.csv", "日.csv"),
        ("filename*=utf-8''%E6%97%A5.csv; filename=\"__.csv\"", "日.csv"),
        ("filename*=ISO-8859-1''caf%E9.csv", "café.csv"),
        ('filename="a%22b.csv"', 'a"b.csv'),
        ('filename="a\\"b.csv"', 'a"b.csv'),
        ('filename="100%.csv"', "100%.csv"),
        ('filename="a; filename*=utf-8%27%27b.csv"', "a; filename*=utf-8%27%27b.csv"),
    ],
)
async def test_names_of_uploaded_files(service: Service, box: str, option: str, name: str) -> None:
    """A file without a `path` is stored under its name, however the client has written it."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; {option}\r\n\r\n'
    body = head.encode() + f"hi\r\n--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = await service.call("POST", f"/sandboxes/{box}/files", body=body, headers=headers)
    assert answer.code == 200, answer.body
    assert [each["name"] for each in json.loads(answer.body)] == [name]
    assert service.guest(box).files[f"{HOME}/{name}"] == b"hi"


@pytest.mark.parametrize("option", ["filename*=utf-8''%FF.csv", "filename*=klingon''%41.csv"])
async def test_names_that_can_not_be_read(service: Service, box: str, option: str) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; {option}\r\n\r\n'
    body = head.encode() + f"hi\r\n--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = await service.call("POST", f"/sandboxes/{box}/files", body=body, headers=headers)
    assert (answer.code, "file name" in str(error_of(answer)["message"])) == (400, True)
