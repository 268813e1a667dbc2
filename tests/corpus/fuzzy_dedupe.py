"""Find customers that are in the list twice under slightly different names."""

# %%
import difflib
import unicodedata
from itertools import combinations

CUSTOMERS = [
    "Müller GmbH",
    "Mueller GmbH",
    "ACME Inc.",
    "Acme, Inc",
    "Société Générale",
    "Societe Generale SA",
    "Zeta Ltd",
]


# %%
def plain(name):
    text = unicodedata.normalize("NFKD", name.replace("ü", "ue")).encode("ascii", "ignore").decode()
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return " ".join(word for word in words if word not in {"gmbh", "inc", "sa", "ltd"})


pairs = []
for one, other in combinations(CUSTOMERS, 2):
    score = difflib.SequenceMatcher(None, plain(one), plain(other)).ratio()
    if score > 0.85:
        pairs.append((one, other))
        print(f"{score:.2f}  {one}  ==  {other}")

# %%
groups = {name: {name} for name in CUSTOMERS}
for one, other in pairs:
    union = groups[one] | groups[other]
    for name in union:
        groups[name] = union
sorted({len(group) for group in groups.values()})
