"""Run programs side by side with asyncio, and read what they print line by line."""

# %%
import asyncio
import sys

CODE = "import sys\nfor n in range(3): print(sys.argv[1], n, flush=True)\nsys.exit(int(sys.argv[2]))"


async def run(name, code):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CODE, name, str(code), stdout=asyncio.subprocess.PIPE
    )
    lines = [line.decode().strip() async for line in process.stdout]
    return name, lines, await process.wait()


async def main():
    return await asyncio.gather(*(run(name, code) for name, code in (("ä", 0), ("b", 3))))


# %% script
found = asyncio.run(main())

# %% notebook
# found = await main()

# %%
for name, lines, code in found:
    print(name, lines, "exit", code)
{name: code for name, _, code in found}
