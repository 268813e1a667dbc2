"""A report as a notebook shows it: tables in HTML, Markdown, LaTeX, JSON, a class with its own looks."""

# %%
from dataclasses import dataclass
from html import escape


@dataclass
class Table:
    head: list
    rows: list

    def _repr_html_(self):
        cells = "".join(
            "<tr>" + "".join(f"<td>{escape(str(each))}</td>" for each in row) + "</tr>" for row in self.rows
        )
        return "<table><tr>" + "".join(f"<th>{escape(each)}</th>" for each in self.head) + f"</tr>{cells}</table>"

    def __repr__(self):
        return f"Table of {len(self.rows)} rows"


table = Table(["city", "population"], [["São Paulo", 12_300_000], ["<Tokyo>", 13_960_000]])
with open("table.html", "w", encoding="utf-8") as file:
    file.write(table._repr_html_())
table

# %% notebook
# from IPython.display import HTML, JSON, Javascript, Latex, Markdown, display
# display(HTML("<b>bold</b>"), Markdown("**bold** 日本"), Latex(r"$\frac{1}{2}$"), JSON({"a": [1, None]}))
# display({"text/plain": "both", "text/html": "<i>both</i>"}, raw=True, metadata={"text/html": {"isolated": True}})

# %% notebook
# %%html
# <h1>A heading</h1>

# %%
table
