"""Errors on purpose: causes, contexts, groups, notes, retries; the last one ends the program."""

# %%
import traceback
from contextlib import ExitStack, suppress


class StoreError(Exception):
    """The store can't be reached."""


def connect(attempt):
    try:
        return {"host": "db"}["port"]
    except KeyError as error:
        raise StoreError(f"attempt {attempt}") from error


for attempt in range(2):
    try:
        connect(attempt)
    except StoreError as error:
        print(error, "because of", repr(error.__cause__))
        print(traceback.format_exception_only(error)[0].strip())


# %%
def many():
    raise ExceptionGroup("several", [ValueError("a"), TypeError("b"), ExceptionGroup("inner", [ValueError("c")])])


try:
    many()
except* ValueError as group:
    print("values:", [str(each) for each in group.exceptions])
except* TypeError as group:
    print("types:", group.exceptions)

# %%
with suppress(ZeroDivisionError), ExitStack() as stack:
    stack.callback(print, "cleaned up")
    1 / 0
error = ValueError("with a note")
error.add_note("a hint")
error.__notes__

# %%
raise StoreError("gave up after 2 attempts: ñandú")
