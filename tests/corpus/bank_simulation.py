"""A bank with threads of customers in a discrete simulation, by generators and a heap of events."""

# %%
import heapq
import random
from statistics import mean

rng = random.Random(99)


class World:
    def __init__(self):
        self.now, self.events, self.count = 0.0, [], 0

    def start(self, process, delay=0.0):
        self.count += 1
        heapq.heappush(self.events, (self.now + delay, self.count, process))

    def run(self, until):
        while self.events and self.events[0][0] <= until:
            self.now, _, process = heapq.heappop(self.events)
            try:
                delay = next(process)
            except StopIteration:
                continue
            self.start(process, delay)


world, waits, desk_free = World(), [], 0.0


def customer(number):
    global desk_free
    begins = max(world.now, desk_free)
    desk_free = begins + rng.expovariate(1 / 3)
    waits.append(begins - world.now)
    yield begins - world.now
    if number % 10 == 0:
        print(f"{world.now:7.2f} customer {number} is served")


def arrivals():
    for number in range(60):
        world.start(customer(number))
        yield rng.expovariate(1 / 4)


# %%
world.start(arrivals())
world.run(until=500)
print(f"mean wait {mean(waits):.3f}, longest {max(waits):.3f}")

# %%
sum(wait > 5 for wait in waits)
