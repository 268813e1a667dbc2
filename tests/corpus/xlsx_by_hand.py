"""An Excel report with nothing but zipfile and XML: two sheets, formulas, read back and summed."""

# %%
import zipfile
from xml.etree import ElementTree
from xml.sax.saxutils import escape

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
REL = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
SHEETS = {
    "Sales": [["month", "amount"], ["Jän", 120.5], ["Feb", 99], ["Mär & Apr", 310.25]],
    "Totals": [["sum", "=SUM(Sales!B2:B4)"]],
}


def cell(name, value):
    if isinstance(value, str) and value.startswith("="):
        return f'<c r="{name}"><f>{escape(value[1:])}</f></c>'
    if isinstance(value, str):
        return f'<c r="{name}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'
    return f'<c r="{name}"><v>{value}</v></c>'


def sheet(rows):
    body = "".join(
        f'<row r="{n}">' + "".join(cell(f"{'AB'[at]}{n}", each) for at, each in enumerate(row)) + "</row>"
        for n, row in enumerate(rows, 1)
    )
    return f'<worksheet xmlns="{MAIN}"><sheetData>{body}</sheetData></worksheet>'


# %%
parts = {f"xl/worksheets/sheet{n}.xml": sheet(rows) for n, rows in enumerate(SHEETS.values(), 1)}
parts["xl/workbook.xml"] = (
    f'<workbook xmlns="{MAIN}" xmlns:r="{REL}"><sheets>'
    + "".join(f'<sheet name="{name}" sheetId="{n}" r:id="rId{n}"/>' for n, name in enumerate(SHEETS, 1))
    + "</sheets></workbook>"
)
with zipfile.ZipFile("report.xlsx", "w") as book:
    for name, text in sorted(parts.items()):
        book.writestr(
            zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)),
            '<?xml version="1.0" encoding="UTF-8"?>' + text,
            zipfile.ZIP_DEFLATED,
        )

# %%
with zipfile.ZipFile("report.xlsx") as book:
    print(book.testzip(), book.namelist())
    tree = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
rows = [
    [each.findtext(f".//{{{MAIN}}}t") or float(each.findtext(f"{{{MAIN}}}v")) for each in row]
    for row in tree.iter(f"{{{MAIN}}}row")
]
for row in rows:
    print(row)
sum(row[1] for row in rows[1:])
