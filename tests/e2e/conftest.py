"""Fixtures for tests with other people's clients, which are installed once per lock file. Nothing is skipped."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, BrowserContext, async_playwright

from tests.e2e.browser import FLAGS
from tests.guest.client import CACHE, Server

HERE = Path(__file__).parent
LAB = HERE.parents[1] / "lab"
PREPARED = CACHE / "test"
PROGRAMS = {"chromium": "chromium", "nginx": "nginx", "node": "nodejs", "npm": "npm", "vi": "vim-tiny"}
"""Programs that these tests need, and the Debian package of each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit excludes fixtures, because they may have to install and build much before the first test."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(180, func_only=True))


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line on the terminal, although pytest captures output."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line} …", flush=True)

    return tell


@pytest.fixture(scope="session")
def programs(progress: Callable[[str], None]) -> None:
    """Installs those of PROGRAMS that are missing, or fails."""
    missing = sorted(package for program, package in PROGRAMS.items() if not shutil.which(program))
    if not list(Path("/usr/lib").glob("*/libatomic.so.1")):  # playwright's node fails silently without it
        missing.append("libatomic1")
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.fail(f"these tests need {', '.join(missing)}; as root, run: {' '.join(install)}")
    with locked("programs"):
        progress(f"installing {', '.join(missing)}")
        for command in (["apt-get", "update"], install):
            run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


@pytest.fixture(scope="session")
def lab_python(programs: None, progress: Callable[[str], None]) -> Path:
    """The interpreter of an environment with JupyterLab and playwright. The tests have another environment."""

    def make(directory: Path) -> None:
        progress(f"setting up JupyterLab in {directory}")
        run([sys.executable, "-m", "venv", str(directory)])
        pip = [str(directory / "bin" / "pip"), "install", "--quiet", "--require-hashes"]
        run([*pip, "--requirement", str(HERE / "lab.lock")])

    return cached("lab", HERE / "lab.lock", make) / "bin" / "python"


@pytest.fixture(scope="session")
def cellvm_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the distribution of that name was installed, by pip and from its wheel."""
    directory = tmp_path_factory.mktemp("cellvm_lab")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--target", str(directory), str(LAB)])
    return directory


@pytest.fixture(scope="session")
def services(programs: None, progress: Callable[[str], None]) -> Path:
    """The script that drives a server with JupyterLab's client library. It is copied beside that library."""
    source = HERE / "services"

    def make(directory: Path) -> None:
        progress(f"setting up @jupyterlab/services in {directory}")
        install_packages(source, directory)

    directory = cached("services", source / "package-lock.json", make)
    return Path(shutil.copy(source / "services.mjs", directory))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "data", pool_size=1, max_sandboxes=6)
    yield server
    server.close()


@pytest.fixture(scope="module")
async def browser(programs: None) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        yield chromium
        await chromium.close()


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    async with await browser.new_context(viewport={"width": 1280, "height": 860}) as made:
        made.set_default_timeout(20_000)
        yield made


def install_packages(source: Path, directory: Path) -> None:
    """Install the JavaScript packages that a folder's lock file names into a new directory."""
    directory.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, directory)
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=directory)


def cached(name: str, lock: Path, make: Callable[[Path], None]) -> Path:
    """A directory that is made once for each content of a lock file."""
    directory = PREPARED / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    ready = directory / ".ready"
    with locked(name):
        if not ready.exists():
            shutil.rmtree(directory, ignore_errors=True)
            make(directory)
            ready.touch()
    return directory


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process in at a time, because several workers may need the same thing first."""
    PREPARED.mkdir(parents=True, exist_ok=True)
    with (PREPARED / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], **options: object) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
