"""The magics of notebooks, and what a script does in their place."""

# %%
import subprocess
from pathlib import Path

# %% notebook
# %%writefile notes.txt
# first line
# second line: ünïcode

# %% script
Path("notes.txt").write_text("first line\nsecond line: ünïcode\n")
print("Writing notes.txt")

# %% notebook
# lines = !cat notes.txt
# name = "notes.txt"
# found = !grep -c second {name}
# print(found[0])

# %% script
lines = Path("notes.txt").read_text().splitlines()
print(subprocess.check_output(["grep", "-c", "second", "notes.txt"], text=True), end="")

# %% notebook
# %%bash
# for word in one two; do echo "bash says $word"; done

# %% script
print("bash says one\nbash says two")

# %% notebook
# %%capture held
# print("this is held back")

# %% notebook
# assert held.stdout == "this is held back\n"
# %env ANSWER=forty-two

# %% script
print("env: ANSWER=forty-two")

# %%
len(lines)
