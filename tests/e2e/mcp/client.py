"""Use a server with the official client of MCP: python client.py MODE URL KEY, or MODE stdio COMMAND..."""

import asyncio
import os
import sys

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

DATA = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PNG = f"import base64; b = base64.b64decode({DATA!r})"


async def use(client: Client) -> None:
    names = [tool.name for tool in (await client.list_tools()).tools]
    assert "run_code" in names, names
    first = await client.call_tool("run_code", {"code": "x = 41"})
    given = {"sandbox": first.content[0].text[1:].split(" ")[0]}
    second = await client.call_tool("run_code", {"code": "x + 1", **given})
    assert second.content[0].text.endswith("\n42"), second
    image = await client.call_tool(
        "run_code", {"code": f"{PNG}\nfrom IPython.display import Image\nImage(data=b)", **given}
    )
    assert [block.type for block in image.content] == ["text", "image"], image
    failed = await client.call_tool("run_code", {"code": "1 / 0", **given})
    assert failed.is_error, failed
    assert "ZeroDivisionError" in failed.content[0].text, failed
    await client.call_tool("sandbox", {"action": "delete", **given})


async def main() -> None:
    mode, where, *rest = sys.argv[1:]
    if where == "stdio":
        transport = stdio_client(StdioServerParameters(command=rest[0], args=rest[1:], env=dict(os.environ)))
        async with Client(transport, mode=mode) as client:
            await use(client)
        return
    async with (
        create_mcp_http_client(headers={"Authorization": f"Bearer {rest[0]}"}) as http,
        Client(streamable_http_client(where, http_client=http), mode=mode) as client,
    ):
        await use(client)


asyncio.run(main())
