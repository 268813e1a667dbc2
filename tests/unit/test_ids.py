"""A sandbox's id and its kernel's are two forms of the same number."""

import re
import uuid

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernel_gateway.sandbox.sandbox import ID_ALPHABET, ID_LENGTH, PREFIX, kernel_id, new_id, sandbox_id
from kernel_gateway.sandbox.sandboxes import LEGAL_ID

SANDBOX_IDS = st.text(ID_ALPHABET, min_size=ID_LENGTH, max_size=ID_LENGTH).map(lambda digits: PREFIX + digits)


@given(SANDBOX_IDS)
@example(PREFIX + "0" * ID_LENGTH)
@example(PREFIX + "z" * ID_LENGTH)
def test_there_and_back(sandbox: str) -> None:
    """Every sandbox has a kernel id of five groups, as Jupyter's routes want it, and the id leads back to it."""
    kernel = kernel_id(sandbox)
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", kernel)
    assert sandbox_id(kernel) == sandbox


@given(SANDBOX_IDS, SANDBOX_IDS)
def test_no_two_share_one(one: str, other: str) -> None:
    """Different sandboxes have different kernels."""
    assert (kernel_id(one) == kernel_id(other)) is (one == other)


def test_new_ids() -> None:
    """New ids are legal, all different, and use the whole alphabet."""
    made = [new_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(LEGAL_ID.fullmatch(each) and sandbox_id(kernel_id(each)) == each for each in made)
    assert set("".join(each.removeprefix(PREFIX) for each in made)) == set(ID_ALPHABET)


@given(st.uuids(version=None) | st.integers(0, 2**128 - 1).map(lambda number: uuid.UUID(int=number)))
@example(uuid.UUID(int=0))
@example(uuid.UUID(int=2**128 - 1))
def test_any_uuid(kernel: uuid.UUID) -> None:
    """Every UUID, in any of its spellings, names the same legal sandbox id, whether there is one or not."""
    spellings = {str(kernel), str(kernel).upper(), kernel.hex, f"{{{kernel}}}", kernel.urn}
    (sandbox,) = {sandbox_id(each) for each in spellings}
    assert LEGAL_ID.fullmatch(sandbox)
    assert kernel_id(sandbox) == str(kernel)


@given(st.text(max_size=60) | st.text("0123456789abcdef-{}:urn", max_size=60))
@example("")
@example("sbx" + "a" * 20)
@example("g" * 32)
@example("٣" * 32)
@example("\ud800" * 32)
@example("0" * 100_000)
def test_any_text(text: str) -> None:
    """A text that is no UUID leads to an id that no sandbox has, and nothing raises."""
    found = sandbox_id(text)
    assert LEGAL_ID.fullmatch(found)
    if found == PREFIX:
        with pytest.raises(ValueError, match=r"."):
            uuid.UUID(text)
