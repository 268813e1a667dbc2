"""Pack a bag by a genetic algorithm, and check it against dynamic programming."""

# %%
import random

rng = random.Random(11)
items = [(rng.randint(1, 30), rng.randint(5, 60)) for _ in range(24)]
ROOM = 150


def worth(genes):
    weight = sum(item[0] for item, take in zip(items, genes) if take)
    return sum(item[1] for item, take in zip(items, genes) if take) if weight <= ROOM else ROOM - weight


people = [[rng.random() < 0.3 for _ in items] for _ in range(60)]
history = []
for generation in range(60):
    people.sort(key=worth, reverse=True)
    history.append(worth(people[0]))
    parents = people[:20]
    people = parents[:2]
    while len(people) < 60:
        one, other = rng.sample(parents, 2)
        cut = rng.randrange(len(items))
        people.append([gene ^ (rng.random() < 0.03) for gene in one[:cut] + other[cut:]])
print("best by generation:", history[::10])

# %%
best = [0] * (ROOM + 1)
for weight, value in items:
    for room in range(ROOM, weight - 1, -1):
        best[room] = max(best[room], best[room - weight] + value)
print(f"found {history[-1]}, best {best[ROOM]}")
history[-1] / best[ROOM] > 0.95
