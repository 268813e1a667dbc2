"""Keep objects between runs: pickle of own classes, copyreg, shelve, json with dates, and a damaged file."""

# %%
import copy
import json
import pickle
from dataclasses import asdict, dataclass, field
from datetime import date
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    BOOK = "book"
    FILM = "film"


class Size(NamedTuple):
    width: int
    height: int


@dataclass(order=True)
class Item:
    title: str
    kind: Kind = Kind.BOOK
    size: Size = Size(1, 2)
    bought: date = date(2024, 2, 29)
    tags: list = field(default_factory=list)


shelf = [Item("Ulysses", tags=["long"]), Item("Metropolis", Kind.FILM)]
with open("shelf.pickle", "wb") as file:
    pickle.dump(shelf, file, protocol=4)

# %%
with open("shelf.pickle", "rb") as file:
    again = pickle.load(file)
print(again == shelf, again[0] is shelf[0], again[1].kind is Kind.FILM)
print(sorted(again)[0])
deep = copy.deepcopy(shelf)
deep[0].tags.append("sad")
shelf[0].tags

# %%
text = json.dumps(
    [asdict(item) for item in shelf],
    default=lambda value: value.value if isinstance(value, Enum) else value.isoformat(),
    indent=1,
)
with open("shelf.json", "w") as file:
    file.write(text)
print(text.splitlines()[:6])
pickle.loads(open("shelf.pickle", "rb").read()[:-10])
