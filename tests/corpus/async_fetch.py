"""Fetch many things at once with asyncio, with a limit on how many at a time."""

# %%
import asyncio

active = most = 0


async def fetch(number, gate):
    global active, most
    async with gate:
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.005)
        active -= 1
    return number * number


async def main():
    gate = asyncio.Semaphore(3)
    results = await asyncio.gather(*(fetch(n, gate) for n in range(10)))
    print("results:", results)
    return sum(results)


# %% script
total = asyncio.run(main())

# %% notebook
# total = await main()

# %%
print("at once:", most)
total
