"""A spelling corrector in the manner of a well-known essay, with edits of one letter."""

# %%
from collections import Counter

WORDS = Counter(
    (
        "spelling " * 9
        + "correct " * 7
        + "corrected " * 3
        + "bicycle " * 4
        + "inconvenient arranged poetry poetry word words"
    ).split()
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def edits(word):
    splits = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    yield from (left + right[1:] for left, right in splits if right)
    yield from (left + right[1] + right[0] + right[2:] for left, right in splits if len(right) > 1)
    yield from (left + letter + right[1:] for left, right in splits if right for letter in LETTERS)
    yield from (left + letter + right for left, right in splits for letter in LETTERS)


def correct(word):
    if word in WORDS:
        return word
    near = set(edits(word)) & WORDS.keys()
    further = near or {other for each in edits(word) for other in edits(each)} & WORDS.keys()
    return max(further, key=lambda each: (WORDS[each], each), default=word)


# %%
for wrong in ("speling", "korrectud", "bycycle", "inconvient", "arrainged", "peotry", "word", "quintessential"):
    print(f"{wrong:<15} {correct(wrong)}")

# %%
len(set(edits("somthing")))
