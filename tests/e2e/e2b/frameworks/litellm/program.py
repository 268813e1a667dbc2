"""LiteLLM's code interpreter on E2B: python program.py PROXY. E2B_API_KEY, E2B_DOMAIN and SSL_CERT_FILE are set.

LiteLLM has its own client of E2B's API, which reaches sandboxes by their names.
"""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # otherwise the import fetches a list from the internet
os.environ |= {"AIOHTTP_TRUST_ENV": "true", "HTTPS_PROXY": sys.argv[1]}

from litellm.sandbox.main import (
    acode_interpreter_tool,
    acreate_sandbox,
    adelete_sandbox,
    arun_code,
)

API = f"https://api.{os.environ['E2B_DOMAIN']}"


async def main() -> None:
    once = await acode_interpreter_tool("e2b", "print('hello')\n6 * 7", api_base=API)
    assert (once.stdout, once.results[0]["text"], once.error) == ("hello\n", "42", None), once
    box = await acreate_sandbox("e2b", timeout=60, api_base=API)
    await arun_code("e2b", box, "import os\nkept = os.environ['GIVEN']", env_vars={"GIVEN": "yes"})
    assert (await arun_code("e2b", box, "kept")).results[0]["text"] == "yes"
    failed = await arun_code("e2b", box, "1 / 0")
    assert failed.error is not None, failed
    assert failed.error["name"] == "ZeroDivisionError", failed
    assert await adelete_sandbox("e2b", box)
    assert not await adelete_sandbox("e2b", box)


asyncio.run(main())
