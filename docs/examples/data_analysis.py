"""A data analysis in a sandbox: create it, run pandas and matplotlib in it, download the chart, delete it.

CELLVM_API_KEY=e2b_… python docs/examples/data_analysis.py
"""

import os
from pathlib import Path

import requests

BASE = os.environ.get("CELLVM_URL", "http://127.0.0.1:8888")
HEADERS = {"Authorization": f"Bearer {os.environ['CELLVM_API_KEY']}"}

CODE = """
import numpy as np
import pandas as pd
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

data = pd.DataFrame({
    "date": pd.date_range("2024-01-01", periods=90),
    "revenue": np.random.normal(1000, 200, 90).cumsum(),
    "users": np.random.poisson(50, 90),
})
print(data.describe().to_string())
print(f"total revenue: {data['revenue'].iloc[-1]:,.0f}")

plt.figure(figsize=(10, 4))
plt.plot(data["date"], data["revenue"])
plt.title("Cumulative revenue")
plt.savefig("/home/user/chart.png", dpi=100)
"""


def main() -> None:
    """Run the pipeline and leave chart.png in the current directory."""
    created = requests.post(
        f"{BASE}/sandboxes", headers=HEADERS, json={"templateID": "code_interpreter", "timeout": 300}, timeout=60
    )
    created.raise_for_status()
    sandbox = f"{BASE}/sandboxes/{created.json()['sandboxID']}"
    try:
        result = requests.post(
            f"{sandbox}/processes",
            headers=HEADERS,
            json={"cmd": "python3", "args": ["-c", CODE], "timeout": 120},
            timeout=150,
        ).json()
        print(result["stdout"] or result)
        chart = requests.get(f"{sandbox}/files", headers=HEADERS, params={"path": "/home/user/chart.png"}, timeout=60)
        chart.raise_for_status()
        Path("chart.png").write_bytes(chart.content)
        print("saved chart.png")
    finally:
        requests.delete(sandbox, headers=HEADERS, timeout=60)


if __name__ == "__main__":
    main()
