"""Unknown keys are counted by address, forgotten after a minute, and logged once."""

import logging

import pytest

from kernel_gateway.api import guesses
from kernel_gateway.api.guesses import LIMIT, PERIOD, Guesses


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_limit_and_its_end() -> None:
    """Up to the limit nothing is refused. Beyond it, that address waits until its minute is over."""
    clock = Clock()
    tried = Guesses(clock)
    for _ in range(LIMIT):
        tried.add("192.0.2.1")
    assert tried.wait("192.0.2.1") == 0
    clock.now += 20
    tried.add("192.0.2.1")
    assert PERIOD - 20 <= tried.wait("192.0.2.1") <= PERIOD - 19
    assert tried.wait("192.0.2.2") == 0
    clock.now += PERIOD
    tried.add("192.0.2.1")
    assert tried.wait("192.0.2.1") == 0


def test_one_network_is_one_place() -> None:
    """A client that has a network of IPv6 addresses gains nothing from them."""
    tried = Guesses(Clock())
    for number in range(LIMIT + 1):
        tried.add(f"2001:db8:1:2::{number:x}")
    assert tried.wait("2001:db8:1:2:ffff::1") > 0
    assert tried.wait("2001:db8:1:3::1") == 0
    tried.add("fe80::1%eth0")
    tried.add("not an address")
    assert len(tried) == 3


def test_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten when there are very many."""
    monkeypatch.setattr(guesses, "MOST", 3)
    clock = Clock()
    tried = Guesses(clock)
    for number in range(100):
        clock.now += 0.1
        for _ in range(LIMIT + 1):
            tried.add(f"192.0.2.{number}")
    assert len(tried) == 3
    assert [tried.wait(f"192.0.2.{number}") > 0 for number in (96, 97, 98, 99)] == [False, True, True, True]


def test_the_log_has_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """The line tells the address, and how many there were in the minute before."""
    clock = Clock()
    tried = Guesses(clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for _ in range(500):
                tried.add("192.0.2.1")
            clock.now += PERIOD
    lines = [record.getMessage() for record in caplog.records]
    first = "an unknown key was offered from 192.0.2.1"
    assert lines == [first, f"{first}, and 500 before it"]
