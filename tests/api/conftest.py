"""Fixtures over real agents and kernels (driver `unisolated`), and over machines that can be saved.

One service over real agents serves all tests of a file.
"""

from collections.abc import AsyncIterator

import pytest

from kernel_gateway.drivers.unisolated import Unisolated
from tests.fakes import SavingDriver, Service, serving


@pytest.fixture(scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service over real agents and kernels."""
    directory = tmp_path_factory.mktemp("agents")
    async with serving(directory, Unisolated(directory)) as running:
        yield running


@pytest.fixture(scope="module")
async def real_box(real: Service) -> str:
    """One sandbox for all tests that leave it alive, because a start costs a second."""
    return await real.create()


@pytest.fixture
async def driver() -> AsyncIterator[SavingDriver]:
    """A driver of fakes that can be saved. It outlives services."""
    driver = SavingDriver(network="netns")
    yield driver
    await driver.close()
