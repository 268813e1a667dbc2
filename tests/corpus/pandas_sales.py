"""Clean and summarise sales with pandas: types, gaps, groups, a pivot, a join, a rolling mean."""

# %%
import io

import numpy as np
import pandas as pd

RAW = """date,city,product,qty,price
2024-01-03,Berlin,tea,3,4.50
2024-01-03,berlin ,coffee,1,7.25
2024-01-10,Köln,tea,,4.50
2024-02-01,Köln,coffee,2,not known
2024-02-14,,tea,5,4.40
2024-02-14,,tea,5,4.40
"""
df = pd.read_csv(io.StringIO(RAW), parse_dates=["date"])
df.head()

# %%
df = df.drop_duplicates()
df["city"] = df["city"].str.strip().str.title().fillna("unknown")
df["price"] = pd.to_numeric(df["price"], errors="coerce")
df["qty"] = df["qty"].fillna(df["qty"].median())
df["total"] = (df["qty"] * df["price"]).round(2)
print(df.dtypes)
print(df.isna().sum().to_dict())
df.describe()

# %%
monthly = df.groupby([df["date"].dt.month.rename("month"), "city"])["total"].agg(["sum", "count"])
print(monthly)
pivot = df.pivot_table(index="city", columns="product", values="total", aggfunc="sum", fill_value=0)
pivot

# %%
people = pd.DataFrame({"city": ["Berlin", "Köln"], "people": [3_700_000, 1_080_000]})
joined = df.merge(people, on="city", how="left")
joined.to_csv("joined.csv", index=False)
rng = np.random.default_rng(0)
series = pd.Series(rng.normal(size=30).cumsum(), index=pd.date_range("2024-01-01", periods=30))
print(series.rolling(7).mean().dropna().round(4).tail(3))
joined["people"].sum()

# %%
joined["total"].sum()
