"""CPython's own tests have the same results in a fork as in a fresh interpreter.

`make test` runs those that take seconds. The variable CPYTHON_TESTS names others, which take minutes: `test_subprocess
test_signal test_threading test_multiprocessing_fork test_multiprocessing_spawn test_multiprocessing_forkserver`.
"""

import importlib.util
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kernel_gateway.drivers.unisolated import Unisolated
from tests.api.test_instant import SWITCH, WARM, Forking
from tests.fakes import serving

MODULES = os.environ.get("CPYTHON_TESTS", "test_sys test_warnings test_runpy test_atexit").split()
RESULT = re.compile(
    r"^(test\w+ \([\w.]+\))(?:\n.*)? \.\.\. (?:.*\n)*?.*?(ok|FAIL|ERROR|skipped.*|expected failure)$", re.MULTILINE
)


@pytest.fixture(scope="module")
async def forking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Forking]:
    """A sandbox whose zygote is ready."""
    if importlib.util.find_spec("test.test_sys") is None:
        pytest.skip("this Python has no tests of its own; Debian has them in libpython3.11-testsuite")
    directory = tmp_path_factory.mktemp("cpython")
    async with serving(directory, Unisolated(directory, warm={"code_interpreter": WARM})) as running:
        box = await running.create()
        found = Forking(running, box, Path(running.sandboxes.get(running.owner, box).guest.home))
        await found.ready()
        yield found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
async def test_results(forking: Forking, module: str) -> None:
    """Each test of the module says the same in both."""
    results = []
    for switch in ("0", "1"):
        answer = await forking.service.run(
            forking.box, "python3", "-m", "unittest", "-v", f"test.{module}", envVars={SWITCH: switch}, timeout=800
        )
        results.append(dict(RESULT.findall(answer["stderr"])))
    assert len(results[0]) > 10
    assert results[1] == results[0]
