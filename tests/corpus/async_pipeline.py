"""A pipeline of producer, workers and collector over asyncio queues, with a timeout and a cancellation."""

# %%
import asyncio


async def produce(queue, count):
    for number in range(count):
        await queue.put(number)
    for _ in range(3):
        await queue.put(None)


async def work(name, queue, results):
    while (number := await queue.get()) is not None:
        await asyncio.sleep(0.001 * (number % 3))
        results.append((number, number**2))
    return name


async def pipeline():
    queue, results = asyncio.Queue(maxsize=2), []
    async with asyncio.TaskGroup() as group:
        group.create_task(produce(queue, 12))
        workers = [group.create_task(work(f"w{n}", queue, results)) for n in range(3)]
    print("workers:", [worker.result() for worker in workers])
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
    except TimeoutError:
        print("too slow")
    task = asyncio.create_task(asyncio.sleep(10))
    await asyncio.sleep(0)
    task.cancel()
    print("cancelled:", await asyncio.gather(task, return_exceptions=True))
    return sorted(results)


# %% script
results = asyncio.run(pipeline())

# %% notebook
# results = await pipeline()

# %%
print(results)
sum(square for _, square in results)
