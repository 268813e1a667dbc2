"""E2B's own SDKs, unmodified, three generations: every public method, and programs as people write them.

One server without isolation serves them all. docs/e2b.md has a table of the methods, and these tests compare it with
what each generation has shown. `BLESS=1` writes what they have shown into it.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kernel_gateway import certificates
from tests.e2e.conftest import cached, install_packages, run
from tests.guest.client import KEY, Server

HERE = Path(__file__).parent / "e2b"
ROOT = HERE.parents[2]
PAGE = ROOT / "docs" / "e2b.md"
PYTHONS = ("2.63.0", "2.45.1", "2.20.3")
JAVASCRIPTS = ("2.51.0", "2.45.0")
BY_NAME = "2.20.3"
"""The generation whose code interpreter knows sandboxes only by their host names, so it needs TLS and names."""

Shown = dict[str, str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2b")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    """A server at one plain address."""
    port = free_port()
    flags = {"--isolation": "unisolated", "--port": port, "--domain": f"localhost:{port}"}
    running = Server(directory / "plain", pool_size=1, max_sandboxes=20, flags=flags)
    yield running
    running.close()


@pytest.fixture(scope="module")
def server_by_name(directory: Path) -> Iterator[Server]:
    running = named_server(directory)
    yield running
    running.close()


def named_server(directory: Path) -> Server:
    """A server whose sandboxes have names, with TLS and the certificates of `cellvm certs` in that directory."""
    port = free_port()
    files, _ = certificates.make(directory, "sbx.localhost")
    flags = {
        "--isolation": "unisolated",
        "--port": port,
        "--domain": f"sbx.localhost:{port}",
        "--tls-cert": files.server,
    }
    return Server(directory / "names", pool_size=1, max_sandboxes=20, flags=flags, ca=directory / "ca.pem")


def python_of(version: str, progress: Callable[[str], None]) -> Path:
    """The interpreter of an environment with that generation of the Python SDK."""
    lock = HERE / f"python-{version}.lock"

    def make(directory: Path) -> None:
        progress(f"setting up e2b {version} for Python in {directory}")
        run([sys.executable, "-m", "venv", str(directory)])
        run([str(directory / "bin" / "pip"), "install", "--quiet", "--require-hashes", "--requirement", str(lock)])

    return cached(f"e2b-python-{version}", lock, make) / "bin" / "python"


def javascript_of(version: str, progress: Callable[[str], None]) -> Path:
    """A directory with that generation of the JavaScript SDK, and the scripts beside it."""
    source = HERE / f"javascript-{version}"

    def make(directory: Path) -> None:
        progress(f"setting up e2b {version} for JavaScript in {directory}")
        install_packages(source, directory)

    directory = cached(f"e2b-javascript-{version}", source / "package-lock.json", make)
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, directory)
    return directory


def shown_by(command: list[str], **options: object) -> Shown:
    """What a script has shown of each method."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, **options)
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"
    steps = [json.loads(line) for line in result.stdout.splitlines()]
    return {each["method"]: each["answer"] + (f": {each['note']}" if each["note"] else "") for each in steps}


def variables(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("E2B_")}
    return {**kept, "E2B_API_KEY": KEY, **more}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("version", PYTHONS)
def test_python(
    version: str, mode: str, request: pytest.FixtureRequest, directory: Path, progress: Callable[[str], None]
) -> None:
    """Every method of the Python SDK works, or refuses and says what is not offered, as the page tells."""
    python = python_of(version, progress)
    is_by_name = version == BY_NAME
    server: Server = request.getfixturevalue("server_by_name" if is_by_name else "server")
    url = f"https://api.sbx.localhost:{server.url.rsplit(':', 1)[1]}" if is_by_name else server.url
    env = variables(SSL_CERT_FILE=str(directory / "ca.pem")) if is_by_name else variables()
    shown = shown_by([str(python), str(HERE / "methods.py"), mode, url], env=env)
    compare("Python", f"{version} {mode}", shown)


@pytest.mark.parametrize("version", JAVASCRIPTS)
def test_javascript(version: str, server: Server, programs: None, progress: Callable[[str], None]) -> None:
    """Every method of the JavaScript SDK works, or refuses and says what is not offered, as the page tells."""
    directory = javascript_of(version, progress)
    shown = shown_by(["node", str(directory / "methods.mjs"), server.url], env=variables(), cwd=directory)
    compare("JavaScript", version, shown)


@pytest.mark.parametrize(
    "program", ["long_command", "upload_directory", "watch_folder", "web_server", "by_metadata", "timeouts", "killed"]
)
def test_programs(program: str, server: Server, progress: Callable[[str], None]) -> None:
    """What people write with the SDK."""
    python = python_of(PYTHONS[0], progress)
    command = [str(python), str(HERE / "programs.py"), program, server.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=variables())
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


async def test_by_names(server_by_name: Server, directory: Path, progress: Callable[[str], None]) -> None:
    """The newest SDK reaches sandboxes by their names, over TLS, with what `cellvm e2b env` prints."""
    python = python_of(PYTHONS[0], progress)
    asked = await names_asked_by(python, HERE / "names.py", server_by_name, directory)
    assert asked == {"api.sbx.localhost", "49983", "49999"}


async def names_asked_by(python: Path, program: Path, server: Server, directory: Path) -> set[str]:
    """Run a program with a named server, and return the names that it has asked for, without what follows a port.

    This machine need not resolve such names, because the program is told of a proxy that leads all of them to the
    server.
    """
    port = server.url.rsplit(":", 1)[1]
    env = variables(E2B_DOMAIN=f"sbx.localhost:{port}", SSL_CERT_FILE=str(directory / "ca.pem"))
    asked: set[str] = set()
    proxy = await asyncio.start_server(partial(lead, asked), "127.0.0.1", 0)
    async with proxy:
        command = [str(python), str(program), f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"]
        process = await asyncio.create_subprocess_exec(*command, env=env, stderr=asyncio.subprocess.PIPE)
        _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()[-4000:]
    return {name.partition("-")[0] for name in asked}


async def lead(asked: set[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A proxy's connection: it takes any name, and leads to that port of this machine."""
    head = await reader.readuntil(b"\r\n\r\n")
    name, _, port = head.split()[1].decode().rpartition(":")
    asked.add(name)
    beyond, to = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    await asyncio.gather(pass_on(reader, to), pass_on(beyond, writer))


@pytest.mark.parametrize("program", ["long_command", "web_server", "terminal", "killed"])
def test_programs_in_javascript(program: str, server: Server, programs: None, progress: Callable[[str], None]) -> None:
    """What people write with the JavaScript SDK."""
    directory = javascript_of(JAVASCRIPTS[0], progress)
    command = ["node", str(directory / "programs.mjs"), program, server.url]
    env = variables()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env, cwd=directory)
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="module")
def machines(directory: Path) -> Iterator[Server]:
    """A server with virtual machines."""
    running = Server(directory / "machines", pool_size=1, max_sandboxes=4)
    yield running
    running.close()


@pytest.mark.parametrize("program", ["csv_chart", "overnight"])
def test_on_a_machine(program: str, machines: Server, progress: Callable[[str], None]) -> None:
    """What needs a virtual machine: packages, users, the interpreter's port inside it, pauses, snapshots, copies."""
    python = python_of(PYTHONS[0], progress)
    command = [str(python), str(HERE / "programs.py"), program, machines.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=variables())
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


def test_charts(progress: Callable[[str], None]) -> None:
    """Figures of matplotlib are told as charts with all keys that the SDK wants."""
    python = python_of(PYTHONS[0], progress)
    env = variables(PYTHONPATH=str(ROOT), MPLBACKEND="agg")
    result = subprocess.run(
        [str(python), str(HERE / "charts.py")], capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-4000:]}"


def compare(language: str, column: str, shown: Shown) -> None:
    """Check that the page's table says what a generation has shown."""
    head, table, rest = split(language)
    if os.environ.get("BLESS"):
        for method in shown.keys() | table.keys():
            table.setdefault(method, {})[column] = shown.get(method, "")
        columns = [f"{version} {mode}" for version in PYTHONS for mode in ("sync", "async")]
        columns = columns if language == "Python" else list(JAVASCRIPTS)
        lines = [f"| {language} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for method in sorted(table):
            lines.append(f"| `{method}` | {' | '.join(table[method].get(each, '') for each in columns)} |")
        PAGE.write_text(head + "\n".join(lines) + "\n" + rest)
    _, table, _ = split(language)
    told = {method: cells[column] for method, cells in table.items() if cells.get(column)}
    assert told == shown, "docs/e2b.md has another table; BLESS=1 writes it"


def split(language: str) -> tuple[str, dict[str, dict[str, str]], str]:
    """The page before its table of a language, the table, and the page after it."""
    text = PAGE.read_text()
    found = re.search(rf"^\| {language} \|.*\n(\|.*\n)+", text, re.MULTILINE)
    assert found is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    columns = lines[0][1:]
    table = {line[0].strip("`"): dict(zip(columns, line[1:], strict=True)) for line in lines[2:]}
    return text[: found.start()], table, text[found.end() :]
