"""Async generators, context managers and iterators; a notebook awaits them at the top."""

# %%
import asyncio
from contextlib import asynccontextmanager


@asynccontextmanager
async def connection(name):
    print("open", name)
    try:
        yield name.upper()
    finally:
        await asyncio.sleep(0)
        print("close", name)


async def ticks(count):
    for number in range(count):
        await asyncio.sleep(0)
        yield number


# %% notebook
# async with connection("db") as name:
#     seen = [f"{name}{number}" async for number in ticks(4) if number != 2]
#     async for number in ticks(2):
#         print("tick", number)


# %% script
async def main():
    async with connection("db") as name:
        seen = [f"{name}{number}" async for number in ticks(4) if number != 2]
        async for number in ticks(2):
            print("tick", number)
    return seen


seen = asyncio.run(main())

# %%
seen
