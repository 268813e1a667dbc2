"""Count words, pairs and the type-token ratio of a text."""

# %%
import re
from collections import Counter

TEXT = """
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness.
"""
STOP = set("it was the of a an and".split())
words = re.findall(r"[a-z']+", TEXT.lower())
len(words)

# %%
counts = Counter(word for word in words if word not in STOP)
for word, count in counts.most_common(5):
    print(f"{word:<14}{count:>3} {'█' * count}")

# %%
pairs = Counter(zip(words, words[1:]))
print(pairs.most_common(2))
print(f"type-token ratio {len(set(words)) / len(words):.3f}")
max(words, key=len)
