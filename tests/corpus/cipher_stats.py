"""Break a Caesar cipher by the frequencies of letters, and hash the result."""

# %%
import codecs
import hashlib
import string

SECRET = codecs.encode("The quick brown fox jumps over the lazy dog, and then it rests beneath the elm tree.", "rot13")
EXPECTED = dict(zip("etaoinshr", (12.7, 9.1, 8.2, 7.5, 7.0, 6.7, 6.3, 6.1, 6.0)))
print(SECRET)


# %%
def shift(text, by):
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    table = str.maketrans(lower + upper, lower[by:] + lower[:by] + upper[by:] + upper[:by])
    return text.translate(table)


scores = {by: sum(EXPECTED.get(char, 0) for char in shift(SECRET, by).lower()) for by in range(26)}
best = max(scores, key=scores.get)
print(best, shift(SECRET, best))

# %%
hashlib.sha256(shift(SECRET, best).encode()).hexdigest()
