"""Extract from CSV, transform with generators, load into SQLite, compare with a view."""

# %%
import csv
import gzip
import io
import sqlite3

with gzip.GzipFile("orders.csv.gz", "wb", mtime=0) as packed, io.TextIOWrapper(packed, newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "customer", "qty", "price"])
    writer.writerows([n, f"c{n % 4}", n % 5, f"{n * 1.25:.2f}"] for n in range(200))


# %%
def extract(path):
    with gzip.open(path, "rt", newline="") as file:
        yield from csv.DictReader(file)


def transform(rows):
    for row in rows:
        if int(row["qty"]):
            yield int(row["id"]), row["customer"].upper(), int(row["qty"]) * float(row["price"])


def load(db, rows):
    db.execute("CREATE TABLE fact (id INTEGER, customer TEXT, total REAL)")
    return db.executemany("INSERT INTO fact VALUES (?, ?, ?)", rows).rowcount


db = sqlite3.connect(":memory:")
print("loaded:", load(db, transform(extract("orders.csv.gz"))))

# %%
db.execute(
    "CREATE VIEW best AS SELECT customer, round(sum(total), 2) AS total FROM fact GROUP BY customer ORDER BY total DESC"
)
for customer, total in db.execute("SELECT * FROM best"):
    print(f"{customer} {total:>10,.2f}")
list(db.execute("SELECT customer FROM best LIMIT 1"))
