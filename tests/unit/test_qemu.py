"""What the driver does when a machine can't even be begun. Everything else about it needs a real one: tests/guest."""

import os
from pathlib import Path

import pytest

from kernel_gateway.drivers.jail import Jail, Users
from kernel_gateway.drivers.qemu import Image, Qemu
from kernel_gateway.drivers.qemu_argv import Machine


class Card:
    """A network card, and where it comes from."""

    mechanism = "netns"
    tap = 0
    is_closed = False

    async def take(self) -> "Card":
        return self

    def close(self) -> None:
        self.is_closed = True


async def test_a_machine_that_can_not_be_begun_takes_no_card(tmp_path: Path) -> None:
    """A card that was made for it is closed, for nobody else would."""
    gone, other = os.pipe()
    os.close(gone)
    os.close(other)
    card = Card()
    driver = Qemu("qemu", "tcg", tmp_path, Jail(Users(0, gone), None, None), nics=card)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await driver.boot(Image(0, 0, 0), Machine("tcg", 1, 64), memory=0, disk=gone)
    assert card.is_closed
