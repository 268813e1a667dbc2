"""Processes that share memory, a lock, a queue and a value."""

# %%
import multiprocessing as mp
from multiprocessing.shared_memory import SharedMemory

context = mp.get_context("fork")


def fill(name, part):
    memory = SharedMemory(name)
    memory.buf[part * 8 : part * 8 + 8] = bytes([65 + part]) * 8
    memory.close()


def count(total, queue, number):
    for _ in range(100):
        with total.get_lock():
            total.value += 1
    queue.put(number)


# %%
memory = SharedMemory(create=True, size=32)
workers = [context.Process(target=fill, args=(memory.name, part)) for part in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(bytes(memory.buf[:32]).decode(), [worker.exitcode for worker in workers])
memory.close()
memory.unlink()

# %%
total, queue = context.Value("i", 0), context.Queue()
workers = [context.Process(target=count, args=(total, queue, number)) for number in range(3)]
for worker in workers:
    worker.start()
print(sorted(queue.get(timeout=10) for _ in workers))
for worker in workers:
    worker.join()
total.value
