"""Find out how old text files are encoded, and rewrite them as UTF-8."""

# %%
from pathlib import Path

TEXTS = {
    "german.txt": ("Grüße aus Köln", "cp1252"),
    "greek.txt": ("Καλημέρα", "iso8859-7"),
    "japanese.txt": ("日本語のテキスト", "shift_jis"),
}
TEXTS |= {"bom.txt": ("with a mark", "utf-8-sig"), "wide.txt": ("wide 🎉", "utf-16")}
for name, (text, encoding) in TEXTS.items():
    Path(name).write_bytes(text.encode(encoding))


# %%
def decode(data):
    if data.startswith(b"\xef\xbb\xbf"):
        return data.decode("utf-8-sig"), "utf-8-sig"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16"), "utf-16"
    for encoding in ("utf-8", "shift_jis", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError as error:
            print(f"  not {encoding}: byte {error.start}")
    return data.decode("latin-1"), "latin-1"


right = 0
for path in sorted(Path().glob("*.txt")):
    text, encoding = decode(path.read_bytes())
    right += text == TEXTS[path.name][0]
    print(f"{path.name}: {encoding}: {text}")
    path.write_text(text, encoding="utf-8")

# %%
f"{right} of {len(TEXTS)} read as they were meant"
