"""Flatten nested JSON from an API into a table, and write it as JSON lines."""

# %%
import json
from pathlib import Path

ANSWER = json.loads(
    """
{"items": [
  {"id": 1, "user": {"name": "Zoë", "tags": ["a", "b"]}, "price": 12.50},
  {"id": 2, "user": {"name": "李雷", "tags": []}, "price": null},
  {"id": 3, "user": null, "extra": {"deep": {"er": true}}}
]}"""
)


# %%
def flatten(value, prefix=""):
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from flatten(each, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from flatten(each, f"{prefix}[{number}]")
    else:
        yield prefix, value


rows = [dict(flatten(item)) for item in ANSWER["items"]]
columns = list(dict.fromkeys(name for row in rows for name in row))
print("\t".join(columns))
for row in rows:
    print("\t".join(json.dumps(row.get(name), ensure_ascii=False) for name in columns))

# %%
out = Path("items.jsonl")
out.write_text("".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
assert again == rows
out.stat().st_size
