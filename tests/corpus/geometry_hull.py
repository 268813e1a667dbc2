"""Convex hull, area and point in polygon, and the drawing of it as SVG."""

# %%
import math
import random

random.seed(3)
points = [(round(random.gauss(50, 18), 2), round(random.gauss(50, 18), 2)) for _ in range(60)]


def cross(o, a, b):
    return (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0])


def half(points):
    chain = []
    for point in points:
        while len(chain) > 1 and cross(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain[:-1]


hull = half(sorted(points)) + half(sorted(points, reverse=True))
print(len(hull), "corners")

# %%
area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(hull, hull[1:] + hull[:1])) / 2
around = sum(math.dist(a, b) for a, b in zip(hull, hull[1:] + hull[:1]))
print(f"area {area:.2f}, perimeter {around:.2f}")

# %%
dots = "".join(f'<circle cx="{x}" cy="{y}" r="1"/>' for x, y in points)
corners = " ".join(f"{x},{y}" for x, y in hull)
shape = f'<polygon points="{corners}" fill="none" stroke="red"/>'
svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{shape}{dots}</svg>'
with open("hull.svg", "w") as file:
    file.write(svg)

# %% notebook
# from IPython.display import SVG, display
# display(SVG(svg))

# %%
inside = all(cross(a, b, (50, 50)) > 0 for a, b in zip(hull, hull[1:] + hull[:1]))
inside
