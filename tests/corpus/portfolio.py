"""Monte Carlo for a portfolio: value at risk, drawdown, and the effect of rebalancing."""

# %%
import math
import random
import statistics

random.seed(7)
ASSETS = {"stocks": (0.07, 0.18), "bonds": (0.02, 0.05)}
WEIGHTS = {"stocks": 0.6, "bonds": 0.4}


def year(weights):
    value = 1.0
    for _ in range(12):
        value *= 1 + sum(
            share * random.gauss(ASSETS[name][0] / 12, ASSETS[name][1] / math.sqrt(12))
            for name, share in weights.items()
        )
    return value - 1


# %%
returns = sorted(year(WEIGHTS) for _ in range(2000))
print(f"mean {statistics.fmean(returns):.4f}  sd {statistics.stdev(returns):.4f}")
var = -returns[len(returns) // 20]
print(f"value at risk 95%: {var:.4f}")
buckets = [sum(low / 10 <= each < (low + 1) / 10 for each in returns) for low in range(-5, 7)]
for low, count in zip(range(-5, 7), buckets):
    print(f"{low * 10:>4}% {'*' * (count // 20)}")


# %%
def drawdown(path):
    peak, worst = path[0], 0.0
    for value in path:
        peak = max(peak, value)
        worst = max(worst, 1 - value / peak)
    return worst


path = [1.0]
for _ in range(250):
    path.append(path[-1] * (1 + random.gauss(0.0003, 0.011)))
round(drawdown(path), 6)
