"""A loan's schedule of payments with exact decimals, as CSV and as a table."""

# %%
import csv
from decimal import ROUND_HALF_EVEN, Decimal, getcontext

getcontext().prec = 28
CENT = Decimal("0.01")
principal, rate, months = Decimal("25000"), Decimal("0.0475") / 12, 12
payment = (principal * rate / (1 - (1 + rate) ** -months)).quantize(CENT, ROUND_HALF_EVEN)
print("monthly:", payment)

# %%
rows, left = [], principal
for month in range(1, months + 1):
    interest = (left * rate).quantize(CENT)
    paid = min(payment, left + interest) if month < months else left + interest
    left -= paid - interest
    rows.append((month, paid, interest, left))
    print(f"{month:>2} {paid:>10} {interest:>8} {left:>10}")
with open("schedule.csv", "w", newline="") as file:
    csv.writer(file).writerows([("month", "payment", "interest", "left"), *rows])

# %%
sum(row[2] for row in rows)
