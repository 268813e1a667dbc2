"""Make up text by a Markov chain, with a seed so that it can be repeated."""

# %%
import random
from collections import defaultdict

CORPUS = "the cat sat on the mat . the dog sat on the log . the cat saw the dog . the dog ran ."
chain = defaultdict(list)
words = CORPUS.split()
for one, other, third in zip(words, words[1:], words[2:]):
    chain[one, other].append(third)
print(len(chain), "states")


# %%
def sentence(rng, state=(".", "the")):
    said = [state[1]]
    while state in chain and said[-1] != "." and len(said) < 20:
        state = (state[1], rng.choice(chain[state]))
        said.append(state[1])
    return " ".join(said)


rng = random.Random(2024)
for _ in range(4):
    print(sentence(rng))

# %%
entropy = {state: len(set(following)) for state, following in chain.items() if len(set(following)) > 1}
sorted(entropy.items())[:2]
