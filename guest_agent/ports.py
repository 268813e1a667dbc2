"""Connections to services inside the sandbox, with credit both ways. A slow reader at one end stops the other end."""

import asyncio
import socket

from guest_agent import wire
from guest_agent.channel import AgentError, Stream

LOOPBACK, CARD = "127.0.0.1", "198.19.0.2"


async def connect(stream: Stream, request: wire.Connect, uid: int | None) -> None:
    """Join a service's connection and the stream until the service closes it. A CANCEL of the stream closes it, too.

    Args:
        uid: the sandbox user; None if the machine's network is not ours.

    Raises:
        AgentError: port_closed, because nothing listens there.
    """
    stream.credit = request.window
    # Most services listen on loopback or everywhere, some only on the machine's card.
    addresses = (LOOPBACK,) if uid is None else (LOOPBACK, CARD)
    moving = asyncio.create_task(_join(stream, request.port, addresses))
    cancelled = asyncio.create_task(stream.cancelled.wait())
    try:
        await asyncio.wait({moving, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if moving.done():
            moving.result()
    finally:
        moving.cancel()
        cancelled.cancel()
    stream.reply(wire.Done())


async def _join(stream: Stream, port: int, addresses: tuple[str, ...]) -> None:
    with await _open(port, addresses) as sock:
        stream.event(wire.Connected())
        sending = asyncio.create_task(_send(stream, sock))
        try:
            await _receive(stream, sock)
        finally:
            sending.cancel()
            await asyncio.wait({sending})


async def _open(port: int, addresses: tuple[str, ...]) -> socket.socket:
    """A connection as a plain socket, because asyncio's streams drop received bytes when they can't write."""
    for address in addresses:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except (OSError, OverflowError) as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise AgentError("port_closed", f"port {port} is not open: {failure}") from failure


async def _receive(stream: Stream, sock: socket.socket) -> None:
    while True:
        await stream.wait_for_room()
        if stream.cancelled.is_set():
            return
        try:
            data = await asyncio.get_running_loop().sock_recv(sock, stream.room)
        except OSError:  # the service has reset the connection; its earlier bytes have been passed on
            return
        if not data:
            return
        stream.send_now(data, wire.STDOUT)


async def _send(stream: Stream, sock: socket.socket) -> None:
    try:
        while (data := await stream.receive()) is not None:
            await asyncio.get_running_loop().sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the service does not read any more; `_receive` notices its end
