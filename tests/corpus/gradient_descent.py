"""Logistic regression by gradient descent; the loss is shown as it falls."""

# %%
import math
import random
import sys

random.seed(0)
data = [((x := random.uniform(-3, 3)), random.random() < 1 / (1 + math.exp(-(2 * x - 1)))) for _ in range(300)]
slope = offset = 0.0


def loss():
    total = 0.0
    for x, label in data:
        p = 1 / (1 + math.exp(-(slope * x + offset)))
        total -= math.log(p if label else 1 - p)
    return total / len(data)


# %%
for epoch in range(50):
    errors = [1 / (1 + math.exp(-(slope * x + offset))) - label for x, label in data]
    slope -= 0.5 * sum(error * x for error, (x, _) in zip(errors, data)) / len(data)
    offset -= 0.5 * sum(errors) / len(data)
    if epoch % 10 == 9:
        print(f"\repoch {epoch + 1:>3}  loss {loss():.5f}", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)
print(f"p = 1 / (1 + exp(-({slope:.3f} x {offset:+.3f})))")

# %%
accuracy = sum((slope * x + offset > 0) == label for x, label in data) / len(data)
accuracy
