"""Conway's game of life on a torus, shown as it goes on."""

# %%
GLIDER = {(1, 0), (2, 1), (0, 2), (1, 2), (2, 2)}
SIZE = 6


def step(alive):
    around = {}
    for x, y in alive:
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                if dx or dy:
                    cell = ((x + dx) % SIZE, (y + dy) % SIZE)
                    around[cell] = around.get(cell, 0) + 1
    return {cell for cell, count in around.items() if count == 3 or (count == 2 and cell in alive)}


def show(alive):
    return "\n".join("".join("■" if (x, y) in alive else "·" for x in range(SIZE)) for y in range(SIZE))


# %% notebook
# from IPython.display import Pretty, clear_output, display
# world = GLIDER
# for _ in range(24):
#     clear_output(wait=True)
#     display({"text/plain": show(world)}, raw=True)
#     world = step(world)

# %% script
world = GLIDER
for _ in range(24):
    world = step(world)

# %%
print(show(world))
world == GLIDER
