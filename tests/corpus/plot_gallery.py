"""A gallery of plots with matplotlib: lines, bars, a histogram, subplots, a heat map, text in several scripts."""

# %%
import matplotlib.pyplot as plt
import numpy as np

x = np.linspace(0, 2 * np.pi, 100)
plt.figure(figsize=(4, 3))
plt.plot(x, np.sin(x), label="sin")
plt.plot(x, np.cos(x), "--", label="cos")
plt.legend()
plt.title("Größe 日本語")
plt.show()

# %%
fig, axes = plt.subplots(1, 2, figsize=(5, 2))
axes[0].bar(["a", "b", "c"], [3, 1, 2])
axes[1].hist(np.random.default_rng(1).normal(size=500), bins=20)
fig.savefig("bars.svg", metadata={"Date": None})
plt.show()

# %%
fig, ax = plt.subplots(figsize=(3, 3))
image = ax.imshow(np.outer(np.sin(x[::10]), np.cos(x[::10])), cmap="viridis")
fig.colorbar(image)
plt.show()

# %%
plt.scatter(*np.random.default_rng(2).normal(size=(2, 50)))
plt.annotate("here", (0, 0))
plt.show()
print("drawn")
import os

os.remove("bars.svg")  # its ids are random
fig.get_size_inches().tolist()
