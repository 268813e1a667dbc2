"""Two bodies by leapfrog: energy is kept, and the orbit closes."""

# %%
from math import hypot, pi

x, y, vx, vy = 1.0, 0.0, 0.0, 2 * pi * 0.9
step, track = 0.001, []


def pull(x, y):
    cube = hypot(x, y) ** 3
    return -4 * pi**2 * x / cube, -4 * pi**2 * y / cube


def energy():
    return (vx**2 + vy**2) / 2 - 4 * pi**2 / hypot(x, y)


before = energy()
ax, ay = pull(x, y)
for count in range(2000):
    vx, vy = vx + ax * step / 2, vy + ay * step / 2
    x, y = x + vx * step, y + vy * step
    ax, ay = pull(x, y)
    vx, vy = vx + ax * step / 2, vy + ay * step / 2
    if count % 100 == 0:
        track.append((round(x, 3), round(y, 3)))
print(f"energy changes by {abs(energy() / before - 1):.1e}")

# %%
grid = [[" "] * 41 for _ in range(15)]
for px, py in track:
    grid[int(7 - py * 6)][int(22 + px * 17)] = "o"
grid[7][22] = "*"
print("\n".join("".join(row).rstrip() for row in grid))

# %%
track[:3]
