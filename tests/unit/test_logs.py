"""The form of the log: nobody but us begins a line of it, and no terminal obeys it."""

import io
import logging

import pytest

from kernel_gateway.logs import Escaped

FORGED = "no\n2026-11-28 00:00:00,000 WARNING kernel_gateway.server key added \x1b[2J\x9b31m\u202e\ud800"


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO]:
    logger, out = logging.Logger("of the test"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(Escaped())
    logger.addHandler(handler)
    return logger, out


def test_a_record_is_a_line(log: tuple[logging.Logger, io.StringIO]) -> None:
    """Words of others stay within their line, and what is not printable is escaped."""
    log[0].warning("it said: %s, häßlich ☃", FORGED)
    (line,) = log[1].getvalue().splitlines()
    assert line.isprintable()
    assert "\\n2026-11-28" in line
    assert "\\x1b[2J\\x9b31m\\u202e\\ud800, häßlich ☃" in line


def test_a_traceback_is_marked(log: tuple[logging.Logger, io.StringIO]) -> None:
    """Every line of a traceback begins with a bar, the exception's own words included."""
    try:
        raise ValueError(FORGED)
    except ValueError:
        log[0].exception("failed")
    first, *others = log[1].getvalue().splitlines()
    assert first.endswith("ERROR of the test failed")
    assert others
    assert all(line.startswith("| ") and line.isprintable() for line in others)
