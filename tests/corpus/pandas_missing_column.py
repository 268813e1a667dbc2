"""What happens when a column is not there: the error ends the notebook and the script alike."""

# %%
import pandas as pd

df = pd.DataFrame({"name": ["a", "b"], "value": [1, 2]})
print(df.to_string(index=False))
df.to_json("rows.json", orient="records")

# %%
df["amount"].sum()
