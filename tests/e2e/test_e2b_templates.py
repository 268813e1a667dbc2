"""E2B's builder of templates, by the SDKs: over machines that are fakes, and one build on a real one."""

import asyncio
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.e2e.test_e2b import HERE, JAVASCRIPTS, PYTHONS, javascript_of, python_of, variables
from tests.fakes import SavingDriver, serving
from tests.guest.client import Server

BUILDER = {
    "build", "build_in_background", "get_build_status", "exists", "alias_exists", "assign_tags", "remove_tags",
    "get_tags", "from_template", "from_base_image", "from_debian_image", "from_python_image", "set_envs", "copy",
    "copy_items", "run_cmd", "set_workdir", "set_user", "set_ready_cmd", "skip_cache",
}  # fmt: skip
"""Methods that the Python program calls. Others of the builder are RUN steps to the server."""


async def by(directory: Path, *command: str) -> str:
    """What a program prints that uses a service whose machines are fakes. It is `command` and the service's URL."""
    driver = SavingDriver()
    try:
        async with serving(directory, driver, max_sandboxes=6) as service:
            program = await asyncio.create_subprocess_exec(
                *command,
                service.url,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=variables(E2B_API_KEY=service.key, TMPDIR=str(directory)),
            )
            out, errors = await asyncio.wait_for(program.communicate(), 100)
            assert program.returncode == 0, f"{out.decode()[-1500:]}\n{errors.decode()[-4000:]}"
    finally:
        await driver.close()
    return out.decode()


async def test_python(tmp_path: Path, progress: Callable[[str], None]) -> None:
    """Steps, files, logs, tags, rebuilds, failures, and builds in the background."""
    out = await by(tmp_path, str(python_of(PYTHONS[0], progress)), str(HERE / "templates.py"))
    assert set(out.split()) == BUILDER


async def test_javascript(tmp_path: Path, programs: None, progress: Callable[[str], None]) -> None:
    """The same with the JavaScript SDK."""
    await by(tmp_path, "node", str(javascript_of(JAVASCRIPTS[0], progress) / "templates.mjs"))


def test_on_a_machine(progress: Callable[[str], None]) -> None:
    """A template is built with packages, users and a server that runs on; then a snapshot, a fork and a pause of it."""
    with tempfile.TemporaryDirectory(prefix="cellvm-") as directory:
        server = Server(Path(directory) / "data", pool_size=0, max_sandboxes=4)
        try:
            command = [str(python_of(PYTHONS[0], progress)), str(HERE / "templates.py"), server.url, "real"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=variables())
        finally:
            server.close()
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
