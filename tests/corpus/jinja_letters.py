"""Letters from a template with Jinja, and tables for terminals with rich."""

# %%
from pathlib import Path

from jinja2 import Environment, StrictUndefined, UndefinedError
from rich.console import Console
from rich.table import Table

env = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=True)
env.filters["money"] = lambda value: f"{value:,.2f} €"
LETTER = """Dear {{ name }},
{% for item in items %}
{{ loop.index }}. {{ item.text|upper }}: {{ item.price|money }}
{% else %}
Nothing was bought.
{% endfor %}
Total: {{ items|sum(attribute="price")|money }}
"""
template = env.from_string(LETTER)
people = [
    {"name": "Ann & Co", "items": [{"text": "tea", "price": 4.5}, {"text": "pot", "price": 1234}]},
    {"name": "Bob", "items": []},
]
for person in people:
    text = template.render(person)
    Path(f"{person['name'].split()[0]}.txt").write_text(text, encoding="utf-8")
    print(text)

# %%
try:
    template.render(name="x")
except UndefinedError as error:
    print("undefined:", error)

# %%
table = Table("name", "items")
for person in people:
    table.add_row(person["name"], str(len(person["items"])))
console = Console(width=40, force_jupyter=False, color_system=None, record=True)
console.print(table)
len(console.export_text().splitlines())
