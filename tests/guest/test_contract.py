"""The drivers' contract on real machines: the suite of tests/contract with the driver `qemu`."""

import inspect
import logging
from collections.abc import AsyncIterator

import pytest

from kernel_gateway.drivers import VmDriver
from kernel_gateway.guest.guest import Guest, Guests
from kernel_gateway.server import load_templates, opened_driver
from kernel_gateway.settings import Settings
from tests.contract import test_driver as contract

guest = contract.guest
globals().update(
    (name, each)
    for name, each in vars(contract).items()
    if name.startswith("test_") and {"driver", "guest"} & set(inspect.signature(each).parameters)
)


@pytest.fixture(scope="module")
async def driver(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VmDriver]:
    """The driver that this host offers, with the template `base`."""
    settings = Settings(data_dir=str(tmp_path_factory.mktemp("driver")), network="off")
    templates = load_templates(settings)
    base = templates.find("base")
    assert base is not None
    async with opened_driver(settings, base, logging.info) as opened:
        await opened.prepare(base, logging.info)
        yield opened.driver


@pytest.fixture(scope="module")
async def shared(driver: VmDriver) -> AsyncIterator[Guest]:
    """One machine for all tests that leave it alive."""
    guest = await Guests(driver).start("base")
    yield guest
    await guest.kill()
