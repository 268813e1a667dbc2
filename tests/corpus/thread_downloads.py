"""Threads with a pool, a lock and events: results as they come, and one that fails."""

# %%
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

lock, log = threading.Lock(), []


def download(name, seconds):
    time.sleep(seconds)
    with lock:
        log.append(name)
    if name == "bad":
        raise OSError("no such host")
    return len(name)


# %%
with ThreadPoolExecutor(4) as pool:
    delays = {"slow": 0.03, "fast": 0.0, "bad": 0.01}
    futures = {pool.submit(download, name, delay): name for name, delay in delays.items()}
    found = {futures[future]: future.exception() or future.result() for future in as_completed(futures)}
for name, result in sorted(found.items()):
    print(name, repr(result))
sorted(log)

# %%
ready, local = threading.Event(), threading.local()


def waits(number):
    ready.wait(10)
    local.number = number
    results[number] = local.number


results = {}
threads = [threading.Thread(target=waits, args=(number,)) for number in range(5)]
for thread in threads:
    thread.start()
ready.set()
for thread in threads:
    thread.join()
print(sorted(results), hasattr(local, "number"))

# %%
barrier = threading.Barrier(2, action=lambda: print("both are there"))
thread = threading.Thread(target=barrier.wait)
thread.start()
barrier.wait(10)
thread.join()
barrier.n_waiting
