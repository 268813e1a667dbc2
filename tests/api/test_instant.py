"""Python programs that are forked from a warm process behave as those of a fresh interpreter do."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kernel_gateway.drivers.unisolated import Unisolated
from tests.fakes import Service, serving

WARM = (
    "json asyncio logging.handlers unittest.mock decimal sqlite3 multiprocessing.pool concurrent.futures email.message "
    "http.client requests jinja2 xml.dom.minidom ctypes.util dataclasses typing argparse tempfile importlib.metadata "
    "hypothesis six"
).split()
IS_FORK = "import gc; print(gc.get_freeze_count() > 0)"


@pytest.fixture(scope="module")
async def forking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Service, str]]:
    """A sandbox whose zygote is ready."""
    directory = tmp_path_factory.mktemp("instant")
    async with serving(directory, Unisolated(directory, warm={"code_interpreter": WARM})) as running:
        box = await running.create()
        await until_forking(running, box)
        yield running, box


async def until_forking(service: Service, box: str) -> None:
    for _ in range(200):
        result = await service.run(box, "python3", "-c", IS_FORK)
        if result["stdout"] == "True\n":
            return
        await asyncio.sleep(0.1)
    pytest.fail(f"no zygote: {result}")


async def test_it_forks(forking: tuple[Service, str]) -> None:
    service, box = forking
    print(await service.run(box, "python3", "-c", "import json, sys; print(json.dumps(sys.argv))", "a"))
