"""The sandbox client of OpenAI's Agents SDK: python program.py, in a directory of its own. E2B_* are set."""

import asyncio
import io
from pathlib import Path

from agents.extensions.sandbox.e2b import E2BSandboxClient, E2BSandboxClientOptions
from agents.sandbox import Manifest


async def main(root: Path) -> None:
    client = E2BSandboxClient()
    options = E2BSandboxClientOptions("e2b_code_interpreter", timeout=60, on_timeout="kill", auto_resume=False)
    session = await client.create(manifest=Manifest(root=str(root)), options=options)
    async with session:
        await session.write(Path("notes.txt"), io.BytesIO(b"one\ntwo\n"))
        ran = await session.exec("wc -l < notes.txt; echo careful >&2; exit 3")
        assert (ran.exit_code, ran.stdout.strip(), ran.stderr.strip()) == (3, b"2", b"careful"), ran
        with await session.read(Path("notes.txt")) as file:
            assert file.read() == b"one\ntwo\n"
        assert await session.running()
    await client.delete(session)


asyncio.run(main(Path.cwd()))
