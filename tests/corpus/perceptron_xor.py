"""A small neural net learns XOR, by backpropagation through closures."""

# %%
import math
import random


class Value:
    def __init__(self, data, parents=(), back=lambda grad: ()):
        self.data, self.grad, self.parents, self.back = data, 0.0, parents, back

    def __add__(self, other):
        return Value(self.data + other.data, (self, other), lambda grad: (grad, grad))

    def __mul__(self, other):
        return Value(self.data * other.data, (self, other), lambda grad: (grad * other.data, grad * self.data))

    def tanh(self):
        result = math.tanh(self.data)
        return Value(result, (self,), lambda grad: (grad * (1 - result**2),))

    def backward(self):
        order, seen = [], set()

        def visit(node):
            if node not in seen:
                seen.add(node)
                for parent in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.grad = 1.0
        for node in reversed(order):
            for parent, grad in zip(node.parents, node.back(node.grad)):
                parent.grad += grad


# %%
rng = random.Random(5)
weights = [Value(rng.uniform(-1, 1)) for _ in range(17)]


def net(a, b):
    ws, one = iter(weights), Value(1.0)
    hidden = [(next(ws) * a + next(ws) * b + next(ws) * one).tanh() for _ in range(4)]
    total = next(ws) * one
    for each in hidden:
        total = total + next(ws) * each
    return total.tanh()


for epoch in range(200):
    loss = Value(0.0)
    for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        error = net(Value(a), Value(b)) + Value(float(a == b) * 2 - 1.0)
        loss = loss + error * error
    loss.backward()
    for weight in weights:
        weight.data -= 0.05 * weight.grad
        weight.grad = 0.0
print("loss below 0.2:", loss.data < 0.2)

# %%
[net(Value(a), Value(b)).data > 0 for a in (-1, 1) for b in (-1, 1)]
