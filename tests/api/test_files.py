"""Files over HTTP: streamed both ways, ranges, multipart, directories, and what is refused."""

import asyncio
import base64
import hashlib
import json
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from select import select
from typing import Any
from urllib.parse import quote

import pytest

from guest_agent import wire
from tests.fakes import HOME, FakeGuest, Service, Stream, error_of, eventually, resident

BOUNDARY = "----boundary"
ANY_FILE: dict[str, Any] = {"kind": "file", "size": 0, "mode": 0o644, "owner": "", "group": "", "modified_ns": 0}
"""The fields of an entry beside its name and path."""


def multipart(*parts: tuple[str, str | None, bytes]) -> bytes:
    """A multipart body of (name, file name, content)."""
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


async def upload(service: Service, box: str, body: bytes, query: str = "", route: str = "files") -> object:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await service.call("POST", f"/sandboxes/{box}/{route}{query}", body=body, headers=headers, timeout=3)


@pytest.fixture
def guest(service: Service, box: str) -> FakeGuest:
    """The fake behind `box`."""
    return service.guest(box)


# -- downloads


@pytest.mark.parametrize("size", [0, 1, wire.CHUNK, 5_000_003])
async def test_download(service: Service, box: str, guest: FakeGuest, size: int) -> None:
    """The bytes come unchanged, as an attachment, with their length and a type by the file's name."""
    content = random.Random(size).randbytes(size)
    guest.files[f"{HOME}/ä 1.csv"] = content
    for route in ("files", "filesystem/download"):
        answer = await service.call("GET", f"/sandboxes/{box}/{route}?path={quote('ä 1.csv')}")
        assert (answer.code, answer.body) == (200, content)
        assert answer.headers["Content-Type"] == "text/csv"
        assert answer.headers["Content-Length"] == str(size)
        assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''%C3%A4%201.csv"
        assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "part", "told"),
    [
        ("bytes=0-0", slice(0, 1), "bytes 0-0/1000"),
        ("bytes=10-19", slice(10, 20), "bytes 10-19/1000"),
        ("bytes=990-", slice(990, 1000), "bytes 990-999/1000"),
        ("bytes=-5", slice(995, 1000), "bytes 995-999/1000"),
        ("bytes=-5000", slice(0, 1000), "bytes 0-999/1000"),
        ("bytes=900-5000", slice(900, 1000), "bytes 900-999/1000"),
    ],
)
async def test_ranges(service: Service, box: str, guest: FakeGuest, header: str, part: slice, told: str) -> None:
    """A range is 206 with just those bytes."""
    content = random.Random(1).randbytes(1000)
    guest.files[f"{HOME}/f"] = content
    answer = await service.call("GET", f"/sandboxes/{box}/files?path=f", headers={"Range": header})
    assert (answer.code, answer.body, answer.headers["Content-Range"]) == (206, content[part], told)


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=5-4", "bytes=-0", "bytes=99999999999999999999-"])
async def test_impossible_ranges(service: Service, box: str, guest: FakeGuest, header: str) -> None:
    """A range outside the file is 416 and tells the size. A range that makes no sense may be ignored."""
    guest.files[f"{HOME}/f"] = bytes(1000)
    answer = await service.call("GET", f"/sandboxes/{box}/files?path=f", headers={"Range": header})
    if header != "bytes=5-4" or answer.code != 200:
        assert (answer.code, error_of(answer)["error"]) == (416, "range_not_satisfiable")
        assert answer.headers["Content-Range"] == "bytes */1000"


@pytest.mark.parametrize("header", ["bytes=0-1,5-6", "lines=1-2", "bytes=a-b", "bytes=-", f"bytes={'9' * 5000}-", ""])
async def test_ranges_that_are_none(service: Service, box: str, guest: FakeGuest, header: str) -> None:
    """A header that is not one range of bytes is ignored, and the whole file comes."""
    guest.files[f"{HOME}/f"] = b"0123456789"
    answer = await service.call("GET", f"/sandboxes/{box}/files?path=f", headers={"Range": header})
    assert (answer.code, answer.body) == (200, b"0123456789")


async def test_a_large_download_is_streamed(service: Service, box: str, guest: FakeGuest) -> None:
    """A client that reads slowly makes the guest wait, so 150 MB cost the server less than 16 MiB."""
    guest.files[f"{HOME}/big"] = bytes(150_000_000)
    before, peak, total = resident(), 0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"GET /sandboxes/{box}/files?path=big HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"
    writer.write(head.encode())
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.3)
    while total < 150_000_000:
        total += len(await reader.read(1 << 20))
        peak = max(peak, resident())
    writer.close()
    await writer.wait_closed()
    assert total == 150_000_000
    assert peak - before <= 16 << 20


async def test_a_file_that_shrinks(service: Service, box: str, guest: FakeGuest) -> None:
    """A download that can't be completed is cut off, so that it does not look whole."""

    async def short(stream: Stream, body: wire.Read) -> None:
        await stream.event(guest._entry(f"{HOME}/f"))
        await stream.data(b"half")
        await stream.end()
        await stream.reply(wire.Done())

    guest.files[f"{HOME}/f"] = bytes(1000)
    guest.script.handlers[wire.Read] = short
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"GET /sandboxes/{box}/files?path=f HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b"Content-Length: 1000" in answer
    assert answer.endswith(b"\r\n\r\nhalf")


# -- uploads


async def test_upload(service: Service, box: str, guest: FakeGuest) -> None:
    """A file is stored at `path`, from a field before it or from the query, or else under its own name."""
    content = random.Random(2).randbytes(3_000_000)
    for body, query, path in (
        (multipart(("path", None, b"/tmp/a/b.bin"), ("file", "x", content)), "", "/tmp/a/b.bin"),
        (multipart(("file", "x", content)), "?path=" + quote("ü.bin"), f"{HOME}/ü.bin"),
        (multipart(("file", "own.bin", content)), "", f"{HOME}/own.bin"),
    ):
        for route in ("files", "filesystem/upload"):
            guest.files.pop(path, None)
            answer = await upload(service, box, body, query, route)
            assert answer.code == 200, answer.body
            (entry,) = json.loads(answer.body)
            assert (entry["path"], entry["size"], entry["type"], entry["isDir"]) == (path, len(content), "file", False)
            assert guest.files[path] == content


async def test_several_files(service: Service, box: str, guest: FakeGuest) -> None:
    """Each file goes to the path before it. A file without one goes to its own file name."""
    parts = [("path", None, b"one"), ("file", "x", b"1"), ("path", None, b"two"), ("file", "y", b"22")]
    answer = await upload(service, box, multipart(*parts, ("file", "three", b"")))
    assert answer.code == 200, answer.body
    assert [entry["name"] for entry in json.loads(answer.body)] == ["one", "two", "three"]
    assert (guest.files[f"{HOME}/one"], guest.files[f"{HOME}/two"]) == (b"1", b"22")


async def test_a_path_after_its_file(service: Service, box: str, guest: FakeGuest) -> None:
    """A form whose fields come in another order works too, and leaves nothing under another name."""
    answer = await upload(service, box, multipart(("file", "x", b"content"), ("path", None, b"late")))
    assert answer.code == 200, answer.body
    assert [entry["path"] for entry in json.loads(answer.body)] == [f"{HOME}/late"]
    assert {path for path, content in guest.files.items() if content is not None} == {f"{HOME}/late"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no part|malformed"),
        (b"garbage", "malformed|no part"),
        (multipart(), "no part|malformed"),
        (multipart(("path", None, b"a")), "no part"),
        (multipart(("other", None, b"a")), "unknown part"),
        (multipart(("file", None, b"a")), "where to"),
        (multipart(("file", "", b"a")), "where to"),
        (multipart(("path", None, b"\xff"), ("file", "x", b"a")), "UTF-8"),
        (multipart(("path", None, b"a" * 5000), ("file", "x", b"a")), "4096"),
        (multipart(("path", None, b"dir/"), ("file", "x", b"a")), "directory"),
        (multipart(("path", None, b"a\0b"), ("file", "x", b"a")), "NUL"),
        (multipart(("file", "x", b"a"))[:-20], "malformed"),
    ],
)
async def test_uploads_refused(service: Service, box: str, body: bytes, says: str) -> None:
    """A body that is no proper upload gets 400 with a sentence."""
    answer = await upload(service, box, body)
    error = error_of(answer)
    assert (answer.code, error["error"]) == (400, "invalid_request"), error
    assert any(word in error["message"] for word in says.split("|")), error
    assert (await service.run(box, "true"))["exitCode"] == 0


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x", "ü"])
async def test_uploads_of_another_type(service: Service, box: str, kind: str) -> None:
    """Anything but multipart/form-data with a boundary is 400."""
    headers = {"Content-Type": kind} if kind else {}
    answer = await service.call("POST", f"/sandboxes/{box}/files", body=b"x" * 100_000, headers=headers, timeout=3)
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


async def test_a_broken_upload_leaves_the_old_content(service: Service, box: str, guest: FakeGuest) -> None:
    """A client that vanishes in the middle of a file changes nothing."""
    guest.files[f"{HOME}/f"] = b"old"
    whole = multipart(("path", None, b"f"), ("file", "x", bytes(1_000_000)))
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = (
        f"POST /sandboxes/{box}/files HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {len(whole)}\r\n\r\n"
    )
    writer.write(head.encode() + whole[:500_000])
    await eventually(lambda: any(isinstance(request, wire.Write) for request in guest.requests))
    writer.close()
    await eventually(lambda: not guest._tasks)
    assert guest.files[f"{HOME}/f"] == b"old"


async def test_a_full_disk(service: Service, box: str, guest: FakeGuest) -> None:
    """An upload to a full disk gets 507, and the answer arrives though the client still sends."""

    async def full(stream: Stream, body: wire.Write) -> None:
        await stream.received()
        await stream.fail("no_space", "no space left on device")

    guest.script.handlers[wire.Write] = full
    answer = await upload(service, box, multipart(("file", "x", bytes(20_000_000))))
    assert (answer.code, error_of(answer)["error"]) == (507, "no_space")


async def test_a_large_upload_is_streamed(service: Service, box: str, guest: FakeGuest) -> None:
    """100 MB cost the server less than 16 MiB, however slowly the guest takes them."""
    digest, peak = hashlib.sha256(), 0

    async def slow(stream: Stream, body: wire.Write) -> None:
        nonlocal peak
        await asyncio.sleep(0.3)
        while (data := await stream.received()) is not None:
            digest.update(data)
            peak = max(peak, resident())
        guest.files[body.path] = b""
        await stream.reply(guest._entry(body.path))

    guest.script.handlers[wire.Write] = slow
    piece = random.Random(3).randbytes(1_000_000)
    head = multipart(("file", "x", b""))[: -len(f"\r\n--{BOUNDARY}--\r\n")]

    async def produce(write: Callable[[bytes], Awaitable[None]]) -> None:
        await write(head)
        for _ in range(100):
            await write(piece)
        await write(f"\r\n--{BOUNDARY}--\r\n".encode())

    before = resident()
    answer = await service.call(
        "POST",
        f"/sandboxes/{box}/files",
        body_producer=produce,
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    assert answer.code == 200, answer.body
    expected = hashlib.sha256()
    for _ in range(100):
        expected.update(piece)
    assert digest.digest() == expected.digest()
    assert peak - before <= 16 << 20


async def test_a_2_gb_upload_to_an_unknown_sandbox(service: Service) -> None:
    """404 comes after a small part of the body, though the client goes on sending. The server keeps none of it."""
    before, loop, sent = resident(), asyncio.get_running_loop(), 0
    head = (
        f"POST /sandboxes/sbxnone/files?path=x HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {2 << 30}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port)) as sock:
        sock.setblocking(False)
        await loop.sock_sendall(sock, head.encode())
        with suppress(ConnectionError):  # the connection is closed after the answer
            while sent < 100 << 20 and not select([sock], [], [], 0)[0]:
                await asyncio.wait_for(loop.sock_sendall(sock, bytes(1 << 20)), 5)
                sent += 1 << 20
        answer = await loop.sock_recv(sock, 65536)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b'"error":"not_found"' in answer
    assert sent < 50 << 20
    assert resident() - before <= 16 << 20


# -- small files and directories


async def test_inline_files(service: Service, box: str, guest: FakeGuest) -> None:
    """Small files travel as base64 in JSON, up to 1 MiB."""
    content = random.Random(4).randbytes(1 << 20)
    body = {"path": "a/b", "content": base64.b64encode(content).decode()}
    answer = await service.call("POST", f"/sandboxes/{box}/filesystem", body)
    assert answer.code == 200
    assert json.loads(answer.body)["path"] == f"{HOME}/a/b"
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem?path=a/b")
    assert json.loads(answer.body) == {"path": f"{HOME}/a/b", "content": body["content"]}
    guest.files[f"{HOME}/big"] = bytes((1 << 20) + 1)
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem?path=big")
    assert answer.code == 400
    assert "download" in error_of(answer)["hint"]
    for bad in ("#", "YQ", "YQ==\n", "ü"):
        answer = await service.call("POST", f"/sandboxes/{box}/filesystem", {"path": "x", "content": bad})
        assert (answer.code, error_of(answer)["message"]) == (400, "`content` is not base64")
    answer = await service.call("POST", f"/sandboxes/{box}/filesystem", {"path": "", "content": ""})
    assert answer.code == 400


async def test_directories(service: Service, box: str) -> None:
    """Requests to make, list, stat, move and delete are answered with entries. Parents are made."""
    answer = await service.call("POST", f"/sandboxes/{box}/filesystem/mkdir", {"path": "a/b/c"})
    entry = json.loads(answer.body)
    assert entry.pop("modified").endswith("Z")
    assert (answer.code, entry) == (
        200,
        {
            "name": "c",
            "path": f"{HOME}/a/b/c",
            "isDir": True,
            "type": "dir",
            "size": 0,
            "mode": 0o755,
            "owner": "user",
            "group": "user",
        },
    )
    assert (await service.call("POST", f"/sandboxes/{box}/filesystem/mkdir", {"path": "a/b/c"})).code == 200
    fields = {"path": "~/a/f", "content": "YQ=="}
    await service.call("POST", f"/sandboxes/{box}/filesystem", fields)
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/stat?path=a/f")
    assert json.loads(answer.body)["size"] == 1
    move = {"source": "a", "destination": "z/y"}
    answer = await service.call("POST", f"/sandboxes/{box}/filesystem/move", move)
    assert json.loads(answer.body)["path"] == f"{HOME}/z/y"
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=z/y")
    assert [(each["name"], each["isDir"]) for each in json.loads(answer.body)] == [("b", True), ("f", False)]
    answer = await service.call("DELETE", f"/sandboxes/{box}/filesystem?path=z")
    assert (answer.code, answer.body) == (204, b"")
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list")
    assert json.loads(answer.body) == []


async def test_a_long_directory(service: Service, box: str, guest: FakeGuest) -> None:
    """A listing of many pages is whole and sorted."""
    names = sorted(f"f{number}" for number in range(1234))
    guest.files |= {f"/tmp/{name}": b"" for name in names}
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp")
    assert [each["name"] for each in json.loads(answer.body)] == names


async def test_a_directory_in_pages(service: Service, box: str, guest: FakeGuest) -> None:
    """Pages hold each name once, in order. `X-More` tells whether the page is the last one."""
    names = sorted(f"ä {number}&" for number in range(250))
    guest.files |= {f"/tmp/{name}": b"" for name in names}
    found: list[str] = []
    sizes, more = [], "true"
    while more:
        after = quote(found[-1]) if found else ""
        answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp&limit=120&after={after}")
        assert answer.code == 200, answer.body
        page = [each["name"] for each in json.loads(answer.body)]
        found, sizes, more = found + page, [*sizes, len(page)], answer.headers.get("X-More", "")
    assert (found, sizes) == (names, [120, 120, 10])
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp&after={quote(names[-3])}")
    assert [each["name"] for each in json.loads(answer.body)] == names[-2:]
    assert "X-More" not in answer.headers


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=-1", "limit=x", "limit=", "after=" + "x" * 4097])
async def test_pages_refused(service: Service, box: str, query: str) -> None:
    """A limit outside 1 to 10000, or a name that can't be, is 400."""
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp&{query}")
    assert (answer.code, error_of(answer)["error"]) == (400, "invalid_request")


async def test_a_directory_that_is_too_large_for_one_answer(service: Service, box: str, guest: FakeGuest) -> None:
    """A listing of over 10,000 entries without a limit is 413 and says how to get it. A page of 10,000 works."""

    async def many(stream: Stream, body: wire.ListDir) -> None:
        first = int(body.after or 0) + 1
        names = [f"{number:06}" for number in range(first, min(first + min(body.limit, 1000), 10_002))]
        entries = [wire.Entry(name=name, path=f"/{name}", **ANY_FILE) for name in names]
        await stream.reply(wire.Entries(entries=entries, more=names[-1] < "010001"))

    guest.script.handlers[wire.ListDir] = many
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp")
    assert (answer.code, error_of(answer)["error"]) == (413, "too_large")
    assert "`limit`" in error_of(answer)["hint"]
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp&limit=10000")
    assert (answer.code, len(json.loads(answer.body)), answer.headers["X-More"]) == (200, 10_000, "true")
    answer = await service.call("GET", f"/sandboxes/{box}/filesystem/list?path=/tmp&after=000001")
    assert (answer.code, len(json.loads(answer.body))) == (200, 10_000)


async def test_a_client_that_hangs_up_stops_a_delete(service: Service, box: str, guest: FakeGuest) -> None:
    """The guest is told that nobody waits for the delete any more."""
    stopped = asyncio.Event()

    async def slow(stream: Stream, body: wire.Delete) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    guest.script.handlers[wire.Delete] = slow
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"DELETE /sandboxes/{box}/filesystem?path=x HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n\r\n"
    writer.write(head.encode())
    await eventually(lambda: any(isinstance(request, wire.Delete) for request in guest.requests))
    writer.close()
    await asyncio.wait_for(stopped.wait(), 5)


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "files", None, (400, "invalid_request")),
        ("GET", "files?path=", None, (400, "invalid_request")),
        ("GET", "files?path=none", None, (404, "not_found")),
        ("GET", "files?path=/tmp", None, (400, "is_directory")),
        ("GET", "files?path=f/x", None, (400, "not_directory")),
        ("GET", "files?path=a%00b", None, (400, "invalid_request")),
        ("GET", "files?path=%ff", None, (400, "invalid_request")),
        ("GET", "filesystem?path=none", None, (404, "not_found")),
        ("GET", "filesystem?path=/tmp", None, (400, "is_directory")),
        ("GET", "filesystem/stat?path=none", None, (404, "not_found")),
        ("GET", "filesystem/list?path=none", None, (404, "not_found")),
        ("GET", "filesystem/list?path=f", None, (400, "not_directory")),
        ("DELETE", "filesystem?path=none", None, (404, "not_found")),
        ("DELETE", "filesystem", None, (400, "invalid_request")),
        ("POST", "filesystem", {"path": "/tmp", "content": ""}, (400, "is_directory")),
        ("POST", "filesystem", {"path": "x"}, (400, "invalid_request")),
        ("POST", "filesystem", {"path": "a\0", "content": ""}, (400, "invalid_request")),
        ("POST", "filesystem/mkdir", {"path": ""}, (400, "invalid_request")),
        ("POST", "filesystem/mkdir", {"path": "f"}, (409, "exists")),
        ("POST", "filesystem/move", {"source": "none", "destination": "x"}, (404, "not_found")),
        ("POST", "filesystem/move", {"source": "f", "destination": "/tmp"}, (400, "is_directory")),
        ("POST", "filesystem/move", {"source": "f"}, (400, "invalid_request")),
    ],
)
async def test_documented_errors(
    service: Service, box: str, guest: FakeGuest, method: str, path: str, body: object, expected: tuple[int, str]
) -> None:
    """Each route's errors have their status and word, and the sandbox goes on."""
    guest.files[f"{HOME}/f"] = b""
    answer = await service.call(method, f"/sandboxes/{box}/{path}", body)
    assert (answer.code, error_of(answer)["error"]) == expected
    assert (await service.run(box, "true"))["exitCode"] == 0


async def test_errors_of_the_agent_keep_their_word(service: Service, box: str, guest: FakeGuest) -> None:
    """Each failure of the wire has a status. An unknown one reads as `failed`."""
    for code in (*wire.FAILURES, "made_up"):

        async def refuse(stream: Stream, body: wire.Stat, code: str = code) -> None:
            await stream.fail(code, "because")

        guest.script.handlers[wire.Stat] = refuse
        answer = await service.call("GET", f"/sandboxes/{box}/filesystem/stat?path=x")
        error = error_of(answer)
        assert (error["error"], error["message"]) == (code if code in wire.FAILURES else "failed", "because")
        assert answer.code in (400, 403, 404, 409, 413, 502, 507)


async def test_head_of_a_path_with_blanks(service: Service, box: str, guest: FakeGuest) -> None:
    """Paths are taken literally, so blanks at the ends and control characters are part of a name."""
    guest.files[f"{HOME}/ a\tb "] = b"x"
    answer = await service.call("GET", f"/sandboxes/{box}/files?path={quote(' a' + chr(9) + 'b ')}")
    assert (answer.code, answer.body) == (200, b"x")
