"""Events of an owner are counted within a window that moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_gateway.errors import RateLimited
from kernel_gateway.rate import Rate


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30))), st.integers(1, 5))
def test_no_window_has_more_than_may_be(steps: list[tuple[str, int]], most: int) -> None:
    """Whatever the times, an event is let in exactly if its owner has fewer than the limit in the window before it."""
    rate, now, had = Rate(most), 0, list[tuple[str, int]]()
    for owner, pause in steps:
        now += pause
        within = sum(name == owner and then > now - 60 for name, then in had)
        assert rate.of(owner, now) == within
        if within < most:
            rate.count(owner, "things", now)
            had.append((owner, now))
            continue
        with pytest.raises(RateLimited) as refused:
            rate.count(owner, "things", now)
        after = refused.value.retry_after or 0
        assert 0 < after <= 60
        assert rate.reset(owner, now) == after
        left = [sum(name == owner and then > at - 60 for name, then in had) for at in (now + after - 1, now + after)]
        assert left[1] < left[0] == most
    assert rate.of("a", now + 60) + rate.of("b", now + 60) == 0
    assert rate._times == {}
