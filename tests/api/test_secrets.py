"""Promise R30 without machines: no secret is in a log, an error or a list, whether a request fails or not."""

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from tornado.httpclient import HTTPResponse

from tests.fakes import Service

CANARY = "canary-9d1f27"


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """The whole log as the server writes it, with tracebacks."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.setLevel(before)
    root.removeHandler(handler)


async def every_form_of_a_key(service: Service, path: str, key: str) -> list[HTTPResponse]:
    """One request for each way in which a client may send its key."""
    mark = "&" if "?" in path else "?"
    return [
        await service.call("GET", path, key=key),
        await service.call("GET", path, key=None, headers={"Authorization": f"token {key}"}),
        await service.call("GET", path, key=None, headers={"X-API-Key": key}),
        await service.call("GET", f"{path}{mark}token={key}", key=None),
        await service.call("GET", f"/t/{key}{path}", key=None),
        await service.call("GET", f"/T/{key}{path}", key=None),
    ]


def everywhere(answers: list[HTTPResponse]) -> str:
    return "\n".join(f"{answer.headers} {answer.body.decode()}" for answer in answers)


@pytest.mark.parametrize("path", ["/sandboxes", "/api/kernels", "/sandboxes/sbxnone", "/nothing", "/sandboxes?limit=x"])
async def test_keys(service: Service, told: io.StringIO, path: str) -> None:
    """No key, right or wrong, is repeated or logged, whatever form it was sent in."""
    wrong = "e2b_" + CANARY
    answers = [
        *await every_form_of_a_key(service, path, service.key),
        *await every_form_of_a_key(service, path, wrong),
    ]
    assert {answer.code for answer in answers} & {401, 404}
    for place in (everywhere(answers), told.getvalue()):
        assert service.key not in place
        assert CANARY not in place
    assert path.partition("?")[0] in told.getvalue()


async def use(service: Service, box: str) -> list[HTTPResponse]:
    """Send secrets in every way, also to routes that refuse them."""

    def secret(name: str) -> str:
        return f"{CANARY}-{name}"

    head = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    parts = [head.format("path", ""), "/home/user/x\r\n", head.format("file", '; filename="x"'), secret("content")]
    form = "".join([*parts, "\r\n--b--\r\n"])
    upload = {"Content-Type": "multipart/form-data; boundary=b"}
    path = f"/sandboxes/{box}"
    return [
        await service.call("POST", "/sandboxes", {"templateID": "base", "envVars": {"A": secret("env"), "B": 7}}),
        await service.call("POST", "/sandboxes", {"templateID": "base", "envVars": secret("env")}),
        await service.call("POST", f"{path}/processes", {"cmd": "true", "envVars": {"A": secret("own")}}),
        await service.call(
            "POST", f"{path}/processes", {"cmd": "true", "args": [secret("arg")], "stdin": secret("in")}
        ),
        await service.call("POST", f"{path}/processes", {"cmd": "true", "envVars": {"A": [secret("own")]}}),
        await service.call("POST", f"{path}/execute", {"code": f"'{secret('code')}'; 1/0", "timeout": "x"}),
        await service.call("POST", f"{path}/execute", body=b'{"code": "' + secret("code").encode()),
        await service.call("POST", f"{path}/files", body=form.encode(), headers=upload),
        await service.call("POST", f"{path}/files", body=form.encode()[:-20], headers=upload),
    ]


async def test_what_is_handed_in(service: Service, told: io.StringIO) -> None:
    """Values of variables, input, arguments, code and files are in no answer to their sender and no log line."""
    answer = await service.call("POST", "/sandboxes", {"templateID": "base", "envVars": {"A": f"{CANARY}-env"}})
    assert answer.code == 201
    box = json.loads(answer.body)["sandboxID"]
    answers = [answer, *await use(service, box)]
    assert {answer.code for answer in answers} >= {200, 201, 400}
    answers += [await service.call("GET", path) for path in ("/sandboxes", "/health", "/api/kernels", "/api/status")]
    answers += [await service.call("GET", f"/sandboxes/{box}{path}") for path in ("", "/metrics", "/health")]
    assert CANARY not in everywhere(answers)
    assert CANARY not in told.getvalue()


async def test_a_failure_of_ours(service: Service, told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 500 tells nothing. Its traceback in the log holds neither the request's body, nor its headers or query."""

    async def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken by a test")

    monkeypatch.setattr(service.sandboxes, "create", broken)
    answer = await service.call(
        "POST",
        f"/t/{service.key}/sandboxes?token={service.key}",
        {"templateID": "base", "envVars": {"A": f"{CANARY}-env"}},
        key=None,
        headers={"X-API-Key": service.key, "X-Other": CANARY},
    )
    assert answer.code == 500
    assert "broken by a test" in told.getvalue()
    assert "Traceback" in told.getvalue()
    for place in (everywhere([answer]), told.getvalue()):
        assert CANARY not in place
        assert service.key not in place
    assert not re.search("broken by a test|Traceback", everywhere([answer]))
    for handler in logging.getLogger().handlers:
        if isinstance(found := getattr(handler, "found", None), list):
            found.clear()  # the fixture `tracebacks` must not complain, because this traceback was wanted
