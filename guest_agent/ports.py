"""Connections to services inside the sandbox, with credit both ways: a slow reader at either end stops the other."""

import asyncio

from guest_agent import wire
from guest_agent.channel import AgentError, Stream

ADDRESSES = ("127.0.0.1", "198.19.0.2")
"""Where services listen: loopback or everywhere, or only on the machine's network card."""


async def connect(stream: Stream, request: wire.Connect) -> None:
    """Join a service's connection and the stream until the service closes it. A CANCEL of the stream closes it too.

    Raises:
        AgentError: port_closed, nothing listens there.
    """
    reader, writer = await _open(request.port)
    stream.event(wire.Connected())
    moving = [asyncio.create_task(_receive(stream, reader)), asyncio.create_task(_send(stream, writer))]
    cancelled = asyncio.create_task(stream.cancelled.wait())
    try:
        await asyncio.wait({moving[0], cancelled}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*moving, cancelled):
            task.cancel()
        writer.transport.abort()
    stream.reply(wire.Done())


async def _open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for address in ADDRESSES:
        try:
            return await asyncio.open_connection(address, port)
        except (OSError, OverflowError) as error:
            failure = error
    raise AgentError("port_closed", f"port {port} is not open: {failure}") from failure


async def _receive(stream: Stream, reader: asyncio.StreamReader) -> None:
    while True:
        await stream.wait_for_room()
        try:
            data = await reader.read(max(stream.room, 1))
        except OSError:  # the service has reset the connection: what it said before has been passed on
            return
        if not data:
            return
        stream.send_now(data, wire.STDOUT)


async def _send(stream: Stream, writer: asyncio.StreamWriter) -> None:
    try:
        while (data := await stream.receive()) is not None:
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass  # the service does not read any more; its end of the connection tells the rest
