"""Clean an export of a shop's sales: dates in three formats, decimal commas, duplicates and missing cities."""

# %%
import csv
import io
from collections import Counter, defaultdict
from datetime import datetime

RAW = """order;date;city;amount
1001;2024-03-01;Berlin;1.234,50
1002;01.03.2024;berlin ;99,00
1003;03/05/2024;;12,5
1002;01.03.2024;berlin ;99,00
1004;2024-03-07;Köln;n/a
1005;2024-03-07;KÖLN;1.000.000,01
"""

# %%
FORMATS = ("%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y")


def parse_date(text):
    for form in FORMATS:
        try:
            return datetime.strptime(text, form).date()
        except ValueError:
            continue
    raise ValueError(f"no date: {text!r}")


def parse_amount(text):
    try:
        return float(text.replace(".", "").replace(",", "."))
    except ValueError:
        return None


rows, seen = [], set()
for row in csv.DictReader(io.StringIO(RAW), delimiter=";"):
    if row["order"] in seen:
        print("duplicate:", row["order"])
        continue
    seen.add(row["order"])
    city = row["city"].strip().title() or "unknown"
    rows.append(
        {
            "order": int(row["order"]),
            "date": parse_date(row["date"]),
            "city": city,
            "amount": parse_amount(row["amount"]),
        }
    )
len(rows)

# %%
missing = Counter(name for row in rows for name, value in row.items() if value in (None, "unknown"))
by_city = defaultdict(float)
for row in rows:
    by_city[row["city"]] += row["amount"] or 0
for city, total in sorted(by_city.items()):
    print(f"{city:<10} {total:>14,.2f}")
with open("clean.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
missing
