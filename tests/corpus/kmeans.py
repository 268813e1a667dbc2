"""k-means and k nearest neighbours in plain Python, with a plot of characters."""

# %%
import math
import random

random.seed(1)
CENTERS = [(0, 0), (6, 1), (3, 6)]
points = [(random.gauss(x, 0.9), random.gauss(y, 0.9)) for x, y in CENTERS for _ in range(40)]


def kmeans(points, k, rounds=25):
    means = points[:: len(points) // k][:k]
    for turn in range(rounds):
        clusters = [[] for _ in means]
        for point in points:
            clusters[min(range(k), key=lambda n: math.dist(point, means[n]))].append(point)
        new = [tuple(sum(axis) / len(cluster) for axis in zip(*cluster)) for cluster in clusters]
        if new == means:
            print("settled after", turn, "rounds")
            break
        means = new
    return means, clusters


means, clusters = kmeans(points, 3)
for mean, cluster in zip(means, clusters):
    print(f"({mean[0]:.2f}, {mean[1]:.2f}): {len(cluster)}")

# %%
canvas = {(round(x * 3), round(y * 1.5)): "abc"[n] for n, cluster in enumerate(clusters) for x, y in cluster}
for row in range(12, -4, -1):
    print("".join(canvas.get((column, row), " ") for column in range(-8, 27)).rstrip())

# %%
inertia = sum(math.dist(point, mean) ** 2 for mean, cluster in zip(means, clusters) for point in cluster)
round(inertia, 3)
