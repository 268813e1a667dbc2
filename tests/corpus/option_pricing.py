"""Price options by Black and Scholes, and find the implied volatility by bisection."""

# %%
from statistics import NormalDist
from math import exp, log, sqrt

cdf = NormalDist().cdf


def call(spot, strike, rate, volatility, years):
    d1 = (log(spot / strike) + (rate + volatility**2 / 2) * years) / (volatility * sqrt(years))
    d2 = d1 - volatility * sqrt(years)
    return spot * cdf(d1) - strike * exp(-rate * years) * cdf(d2)


# %%
print("strike  price")
for strike in range(80, 125, 10):
    print(f"{strike:>6} {call(100, strike, 0.03, 0.2, 0.5):>6.3f}")


# %%
def implied(price, *terms):
    low, high = 1e-6, 5.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if call(*terms[:3], middle, terms[3]) < price else (low, middle)
    return low


smile = {
    strike: round(implied(call(100, strike, 0.03, 0.2 + (strike - 100) ** 2 / 1e4, 0.5), 100, strike, 0.03, 0.5), 4)
    for strike in (80, 100, 120)
}
smile
