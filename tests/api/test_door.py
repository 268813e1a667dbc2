"""The front door: strangers without a key are counted, slow ones are cut off, and a lack of descriptors is a pause."""

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tornado.testing import bind_unused_port

from kernel_gateway.api import door as module
from kernel_gateway.api.app import application
from kernel_gateway.api.door import Door
from tests.fakes import Service, eventually

REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def door(service: Service) -> AsyncIterator[tuple[Door, int]]:
    """A door to the service, and its port."""
    door = Door(application(service.sandboxes, service.store))
    sock, port = bind_unused_port()
    door.add_sockets([sock])
    yield door, port
    door.stop()
    await door.close_all_connections()


async def opened(port: int, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    return reader, writer


async def answered(reader: asyncio.StreamReader) -> bool:
    return (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_connections_are_counted(door: tuple[Door, int], caplog: pytest.LogCaptureFixture) -> None:
    """Beyond its number the door closes new connections at once, and says so once. A place that is left is free."""
    door[0].most = 3
    kept = [await opened(door[1], REQUEST) for _ in range(3)]
    assert [await answered(reader) for reader, _ in kept] == [True] * 3
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            reader, writer = await opened(door[1])
            assert await reader.read() == b""
            writer.close()
    assert caplog.text.count("3 connections are open") == 1
    kept[0][1].close()
    await eventually(lambda: len(door[0]._addresses) == 2)
    reader, writer = await opened(door[1], REQUEST)
    assert await answered(reader)
    for _, each in [*kept, (reader, writer)]:
        each.close()


async def test_an_address_may_have_a_quarter(door: tuple[Door, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One address beyond this host can't take all places."""
    monkeypatch.setattr(
        "kernel_gateway.api.door.ipaddress.ip_address", lambda text: type("Address", (), {"is_loopback": False})
    )
    door[0].most = 8
    kept = [await opened(door[1], REQUEST) for _ in range(2)]
    assert [await answered(reader) for reader, _ in kept] == [True, True]
    reader, writer = await opened(door[1], REQUEST)
    assert await reader.read() == b""
    for _, each in [*kept, (reader, writer)]:
        each.close()


async def test_a_head_has_its_time(door: tuple[Door, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that has begun must end in time. A connection that has had an answer may idle longer."""
    monkeypatch.setattr(module, "HEAD", 0.2)
    monkeypatch.setattr(module, "TICK", 0.05)
    idle = await opened(door[1], REQUEST)
    assert await answered(idle[0])
    slow = await opened(door[1], b"GET / HT")
    assert await asyncio.wait_for(slow[0].read(), 5) == b""
    second = await opened(door[1], REQUEST + b"GET / HT")
    assert b"HTTP/1.1 200" in await asyncio.wait_for(second[0].read(), 5)
    head, _, _ = (await idle[0].readuntil(b"}")).partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head
    idle[1].write(REQUEST)
    assert b"HTTP/1.1 200" in await idle[0].readuntil(b"}")
    for _, each in (idle, slow, second):
        each.close()


async def test_a_new_connection_must_ask(door: tuple[Door, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that never sends anything is closed after a while."""
    monkeypatch.setattr(module, "FIRST_HEAD", 0.1)
    monkeypatch.setattr(module, "TICK", 0.05)
    reader, writer = await opened(door[1])
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_a_body_may_take_longer(door: tuple[Door, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only heads are watched. An answer that takes long, and its request's body, are not."""
    monkeypatch.setattr(module, "HEAD", 0.1)
    monkeypatch.setattr(module, "TICK", 0.05)
    reader, writer = await opened(door[1], b"POST /sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
    await asyncio.sleep(0.4)
    writer.write(b"{}")
    assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()


class Exhausted:
    """A listening socket for which there are no descriptors for a while."""

    def __init__(self, sock: socket.socket, failures: int) -> None:
        self._sock = sock
        self.failures = failures
        self.accepts = 0

    def accept(self) -> Any:
        self.accepts += 1
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._sock.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


async def test_no_descriptors(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """The door waits and tries again a few times a second, says so once, and then goes on."""
    door = Door(application(service.sandboxes, service.store))
    sock, port = bind_unused_port()
    exhausted = Exhausted(sock, 3)
    door.add_sockets([exhausted])  # type: ignore[list-item]
    with caplog.at_level(logging.WARNING):
        reader, writer = await opened(port, REQUEST)
        assert await asyncio.wait_for(answered(reader), 5)
    assert exhausted.accepts <= 3 + 2
    assert caplog.text.count("Too many open files") == 1
    writer.close()
    door.stop()
    await door.close_all_connections()
