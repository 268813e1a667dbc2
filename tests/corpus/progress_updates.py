"""Long work that shows how far it is: a line that is drawn anew, a display that is updated, output that is cleared."""

# %%
import sys
import time


def work(count):
    for number in range(count):
        time.sleep(0.001)
        yield number


# %%
done = 0
for number in work(20):
    done += 1
    sys.stdout.write(f"\r[{'#' * done}{'.' * (20 - done)}] {done * 5:>3}%")
    sys.stdout.flush()
print()

# %% notebook
# from IPython.display import ProgressBar, clear_output, display
# handle = display("0 of 5", display_id=True)
# other = display({"text/plain": "other"}, raw=True, display_id="other")
# for number in work(5):
#     handle.update(f"{number + 1} of 5")
# display("a copy", display_id="other")
# handle.update("all of 5")

# %% notebook
# for number in work(4):
#     display(f"step {number}")
#     print("text of step", number, file=sys.stderr)
#     clear_output(wait=number < 3)
# display("the end")

# %% notebook
# display("this stays until there is more")
# clear_output(wait=True)

# %%
done
