"""What libraries do that are asynchronous inside: a loop in a thread of its own serves ordinary calls."""

# %%
import asyncio
import threading


class Background:
    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, coroutine, timeout=10):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def add(one, other):
    await asyncio.sleep(0.001)
    return one + other


async def fail():
    await asyncio.sleep(0)
    raise LookupError("not there")


# %%
background = Background()
print(background.call(add(1, 2)))
try:
    background.call(fail())
except LookupError as error:
    print("failed:", error)


# %%
def in_own_loop():
    print("asyncio.run in a thread:", asyncio.run(add("a", "b")))


thread = threading.Thread(target=in_own_loop)
thread.start()
thread.join()
background.close()
background.thread.is_alive()
