"""Much output at once: long lines, many lines, all kinds of characters, both streams."""

# %%
import sys

for number in range(3000):
    print(number, "αβγ", "🎉" * (number % 3))

# %%
print("x" * 200_000)
print("\x1b[31mred\x1b[0m", "tab\there", "bell\a", "null\0", "line\u2028separator", "cr\rover", "\ufeffmark", "e\u0301")
print(*range(10), sep=", ", end=".\n")
print("to the error stream", "日本語" * 100, file=sys.stderr)

# %%
import unicodedata
from contextlib import redirect_stdout
from io import StringIO

held = StringIO()
with redirect_stdout(held):
    print("held back")
    sys.stdout.write("too")
for text in ("日本", "abc", "é"):
    width = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
    print(text + "." * (10 - width) + "|")
held.getvalue()
