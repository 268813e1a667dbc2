"""A naive Bayes classifier for reviews, with the standard library alone."""

# %%
import math
from collections import Counter

TRAINING = [
    ("a wonderful film with great actors", 1),
    ("great fun and a wonderful story", 1),
    ("I loved every minute", 1),
    ("boring and far too long", 0),
    ("a terrible story with bad actors", 0),
    ("I hated the boring plot", 0),
]


class Bayes:
    def fit(self, pairs):
        self.words = {0: Counter(), 1: Counter()}
        self.labels = Counter(label for _, label in pairs)
        for text, label in pairs:
            self.words[label].update(text.lower().split())
        self.known = len(set(self.words[0]) | set(self.words[1]))
        return self

    def score(self, text, label):
        total = sum(self.words[label].values())
        prior = math.log(self.labels[label] / sum(self.labels.values()))
        return prior + sum(
            math.log((self.words[label][word] + 1) / (total + self.known)) for word in text.lower().split()
        )

    def predict(self, text):
        return max((0, 1), key=lambda label: self.score(text, label))

    def __repr__(self):
        return f"Bayes({self.known} words)"


model = Bayes().fit(TRAINING)
model

# %%
for text in ("a great story", "bad and boring", "wonderful"):
    print(f"{text!r:<20} {'+' if model.predict(text) else '-'} {model.score(text, 1) - model.score(text, 0):+.3f}")

# %%
accuracy = sum(model.predict(text) == label for text, label in TRAINING) / len(TRAINING)
accuracy
