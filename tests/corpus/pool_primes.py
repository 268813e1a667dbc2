"""Count primes over several processes: Pool, ProcessPoolExecutor, results and exceptions of workers."""

# %%
import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def count_primes(bounds):
    low, high = bounds
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(low, 2), high))


def fail(number):
    if number == 3:
        raise ValueError(f"not {number}")
    return number


# %%
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        parts = pool.map(count_primes, [(n, n + 500) for n in range(0, 3000, 500)])
    print(parts)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        futures = [executor.submit(fail, number) for number in range(5)]
    print([repr(future.exception()) if future.exception() else future.result() for future in futures])

# %%
sum(parts)
