"""What waits for somebody is counted exactly, bounded for each owner, and comes back to nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.errors import CellvmError, HostFull, TooManyRequests
from kernel_gateway.held import MODEST, Held, Holding

OWNERS = "abc"
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "resize", "grow", "release"]),
        st.sampled_from(OWNERS),
        st.integers(0, 20),
        st.integers(0, 3 * MODEST),
        st.sampled_from([0.5, 1.0]),
    ),
    max_size=60,
)


@given(STEPS, st.integers(0, 4 * MODEST), st.integers(0, 8 * MODEST))
def test_any_use_is_counted_exactly(steps: list[tuple[str, str, int, int, float]], most: int, total: int) -> None:
    """After any use each owner's sum is that of its open holdings, within the bounds, and after all releases none."""
    held = Held(most, total)
    holdings: list[tuple[str, Holding]] = []
    released: set[int] = set()
    for step, owner, number, size, share in steps:
        before = {each: held.of(each) for each in OWNERS}
        if step == "hold":
            try:
                holdings.append((owner, held.account(owner).hold("of a test", size, share=share)))
            except CellvmError:
                assert before == {each: held.of(each) for each in OWNERS}
        elif holdings:
            owner, holding = holdings[number % len(holdings)]
            had = holding.size
            if step == "release":
                holding.release()
                released.add(number % len(holdings))
            elif step == "grow":
                grown = holding.grow(size)
                assert holding.size == had + size * grown
            else:
                try:
                    holding.resize(size)
                except CellvmError:
                    assert holding.size == had < size
        for each in OWNERS:
            own = [holding for name, holding in holdings if name == each]
            assert held.of(each) == sum(holding.size for holding in own) <= most
            assert before[each] == held.of(each) or each == owner
        assert held.size == sum(map(held.of, OWNERS)) <= total + len(OWNERS) * MODEST
        assert all(holdings[index][1].size == 0 for index in released)
    for _, holding in holdings:
        holding.release()
        holding.release()
        assert not holding.grow(1)
        holding.resize(1)
    assert (held.size, list(held._by_owner)) == (0, [])


def test_an_owner_at_the_bound_is_refused_alone() -> None:
    """The refusal is a 429 that names the bound and what there is no room for. Others are let in."""
    held = Held(most=100)
    mine = held.account("a").hold("code of cells", 90)
    with pytest.raises(TooManyRequests, match=r"90 bytes wait .* at most 100 may: .* 11 bytes more \(messages\)") as no:
        held.account("a").hold("messages", 11)
    assert "--max-held-mb" in (no.value.hint or "")
    assert held.account("b").hold("messages", 100).size == 100
    mine.resize(89)
    assert held.account("a").hold("messages", 11).size == 11


def test_a_full_server_refuses_only_who_holds_much() -> None:
    """At the total, growth is a 503 for owners that hold much. Whoever holds little is let in."""
    held = Held(most=10 * MODEST, total=12 * MODEST)
    for owner in "ab":
        held.account(owner).hold("output", 6 * MODEST)
    with pytest.raises(HostFull, match="for all keys"):
        held.account("a").hold("output", 1)
    assert held.account("c").hold("output", MODEST).size == MODEST
    with pytest.raises(HostFull):
        held.account("c").hold("output", 1)


def test_strangers_leave_their_host_a_part() -> None:
    """What strangers cause is refused at a share of the owner's bound, and the owner goes on."""
    account = Held(most=100).account("a")
    account.hold("connections to ports", 50, share=0.5)
    with pytest.raises(TooManyRequests, match="at most 50 may"):
        account.hold("connections to ports", 1, share=0.5)
    assert account.hold("code of cells", 50).size == 50


def test_a_block_holds() -> None:
    """A holding ends with its block, also when the block raises."""
    held = Held()
    holding = held.account("a").hold("x", 5)

    def fail() -> None:
        with holding:
            assert (held.of("a"), holding.size) == (5, 5)
            raise ValueError("of a test")

    with pytest.raises(ValueError, match="of a test"):
        fail()
    assert held.of("a") == 0
    assert (repr(holding), repr(held)) == ("<Holding 0 bytes of x (released)>", "<Held 0 bytes of 0 owners>")
