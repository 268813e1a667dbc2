"""An Excel report with pandas and openpyxl: two sheets, formats, a chart, read back."""

# %%
import pandas as pd
from openpyxl import load_workbook
from openpyxl.chart import BarChart, Reference
from openpyxl.styles import Font

sales = pd.DataFrame({"month": ["Jän", "Feb", "Mär"], "amount": [120.5, 99.0, 310.25], "units": [3, 2, 7]})
with pd.ExcelWriter("report.xlsx", engine="openpyxl") as writer:
    sales.to_excel(writer, sheet_name="Sales", index=False)
    sales.describe().to_excel(writer, sheet_name="Summary")
sales

# %%
book = load_workbook("report.xlsx")
sheet = book["Sales"]
for cell in sheet[1]:
    cell.font = Font(bold=True, color="FF0000")
sheet["B5"] = "=SUM(B2:B4)"
chart = BarChart()
chart.add_data(Reference(sheet, min_col=2, min_row=1, max_row=4), titles_from_data=True)
sheet.add_chart(chart, "E2")
book.save("report.xlsx")

# %%
book = load_workbook("report.xlsx")
print(book.sheetnames, book["Sales"]["B5"].value, book["Sales"]["A1"].font.b)
again = pd.read_excel("report.xlsx", sheet_name="Sales", nrows=3)
print(again.equals(sales))
import os

os.rename("report.xlsx", ".report.xlsx")  # it holds the time at which it was made
again["amount"].sum()
