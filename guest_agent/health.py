"""The port of E2B's code interpreter inside the machine, where programs ask whether it is up.

Everything else of the code interpreter is the gateway's. A program may open many connections here, so only a few are
answered at a time, each for a moment.
"""

import asyncio
from contextlib import suppress

PORT = 49999
AT_ONCE = 8
LIMIT = 5.0
"""Seconds for one request."""
HEAD = 4096
"""Bytes of a request's head."""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"


async def serve() -> asyncio.Server:
    """Answer every request with 200 until the server is closed."""
    answering: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(answering) < AT_ONCE:
            answering.add(writer)
            with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, OSError):
                async with asyncio.timeout(LIMIT):
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(ANSWER)
                    await writer.drain()
            answering.discard(writer)
        writer.close()

    return await asyncio.start_server(answer, "0.0.0.0", PORT, limit=HEAD)  # noqa: S104  this machine's own network
