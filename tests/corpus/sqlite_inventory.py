"""A stock of goods in SQLite: constraints, transactions, window functions, and a report."""

# %%
import sqlite3

db = sqlite3.connect("stock.db")
db.row_factory = sqlite3.Row
db.executescript("""
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, price REAL CHECK (price > 0));
CREATE TABLE move (item INTEGER REFERENCES item, day TEXT, count INTEGER);
""")
with db:
    db.executemany("INSERT INTO item (name, price) VALUES (?, ?)", [("bolt", 0.12), ("nut", 0.08), ("gear", 14.5)])
    db.executemany(
        "INSERT INTO move VALUES (?, ?, ?)", [(n % 3 + 1, f"2024-01-{n + 1:02d}", (n * 7) % 11 - 3) for n in range(12)]
    )
db.execute("SELECT count(*) FROM move").fetchone()[0]

# %%
try:
    with db:
        db.execute("INSERT INTO item (name, price) VALUES ('washer', 0.01)")
        db.execute("INSERT INTO item (name, price) VALUES ('bolt', 1)")
except sqlite3.IntegrityError as error:
    print("rolled back:", error)
print([row["name"] for row in db.execute("SELECT name FROM item ORDER BY name")])

# %%
QUERY = """
SELECT name, day, count, sum(count) OVER (PARTITION BY name ORDER BY day) AS stock
FROM move JOIN item ON item.id = move.item ORDER BY name, day
"""
for row in db.execute(QUERY):
    print("{name:<5} {day} {count:>3} {stock:>4}".format(**dict(row)))
with open("dump.sql", "w") as file:
    file.writelines(line + "\n" for line in db.iterdump())
db.close()

# %%
import os

os.unlink("stock.db")
sum(1 for _ in open("dump.sql"))
