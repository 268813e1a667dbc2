"""The command line: `cellvm serve | build | doctor | run | nb | mcp | keys | certs | e2b | cache`."""

import argparse
import asyncio
import ctypes
import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from guest_agent import wire
from kernel_gateway import __version__, certificates, kvm
from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import CellvmError
from kernel_gateway.guest.files import Files
from kernel_gateway.guest.guest import Guest, Guests
from kernel_gateway.guest.link import Conversation
from kernel_gateway.held import Held
from kernel_gateway.host import examine, install_packages, missing_packages
from kernel_gateway.images.build import Builder
from kernel_gateway.images.cache import Busy, Cache, in_thread
from kernel_gateway.images.image import BuildError, image_key
from kernel_gateway.images.templates import Template
from kernel_gateway.kernel.events import CellError
from kernel_gateway.kernel.notebook import Notebook, NotebookError, tags
from kernel_gateway.kvm import Verdict
from kernel_gateway.logs import Escaped
from kernel_gateway.mcp.relay import relay
from kernel_gateway.network.slots import choose, found_floor
from kernel_gateway.private import private
from kernel_gateway.sandbox.key import ALL, Scope, new_key, parse_scope
from kernel_gateway.sandbox.store import VARIABLE, Store
from kernel_gateway.server import Server, builder, load_templates, opened_driver, running
from kernel_gateway.settings import Settings, SettingsError

console = Console(stderr=True, highlight=False)


USUAL = {
    "install": 15,
    "download Debian and Python packages": 30,
    "download Python packages": 15,
    "install Python packages": 15,
    "file system image": 8,
    "try KVM with the real guest": 6,
    "boot the template": 6,
    "warm the kernel": 30,
    "save the snapshot": 3,
}
"""Seconds that a step takes on two emulating cores which do nothing else; steps that take no time are not in here."""
STILL_EVERY = 30.0
"""Seconds after which a step that goes on is told again where there is no terminal."""


def usual(text: str) -> str:
    """A step, and how long it usually takes."""
    step = text.rpartition(": ")[2]
    found = next((seconds for name, seconds in USUAL.items() if step.startswith(name)), None)
    return text if found is None else f"{text} (usually {found} s)"


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show what is being done and for how long: a moving line on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        with plain_steps() as step:
            yield step
        return
    with Progress(
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    ) as progress:

        def step(text: str) -> None:
            for task in progress.tasks:
                progress.update(task.id, total=1, completed=1)
            progress.add_task(usual(text), total=None)

        yield step
        for task in progress.tasks:
            progress.update(task.id, total=1, completed=1)


@contextmanager
def plain_steps() -> Iterator[Callable[[str], None]]:
    """A line when a step begins, and one now and then while it goes on."""
    loop, started = asyncio.get_running_loop(), time.monotonic()
    waiting: asyncio.TimerHandle | None = None

    def say(text: str, since: float) -> None:
        nonlocal waiting
        if waiting is not None:
            waiting.cancel()
        now = time.monotonic()
        still = f": still at it, since {now - since:.0f} s" if now - since >= STILL_EVERY else ""
        console.print(f"{now - started:6.1f} s  {usual(text)}{still}", markup=False, soft_wrap=True)
        waiting = loop.call_later(STILL_EVERY, say, text, since)

    try:
        yield lambda text: say(text, time.monotonic())
    finally:
        if waiting is not None:
            waiting.cancel()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BUFFER = 1024 * 1024
"""Bytes from which on a buffer has memory of its own, which the system gets back when the buffer is freed."""
KEPT_MEMORY = 8 * 1024 * 1024
"""Bytes that were freed and are kept for the next buffers, because the system clears each page that it gives anew."""


async def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or Ctrl-C; the second one does not wait."""
    loop = asyncio.get_running_loop()
    main_task = asyncio.current_task()
    assert main_task is not None
    stopping = asyncio.Event()
    started = False

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)  # machines and disks go with the process
        stopping.set()
        if not started:
            main_task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    # Otherwise glibc raises the threshold with each large buffer, and keeps what was freed between small ones.
    allocator = ctypes.CDLL(None)
    allocator.mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
    allocator.mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)
    async with AsyncExitStack() as stack:
        with steps() as step:
            if settings.boots_machines:
                await install_packages(settings.qemu, step)
            server = await stack.enter_async_context(running(settings, step))
        started = True
        # What there is now lives as long as the server. To look through it for garbage would stop everybody for 0.1 s.
        gc.collect()
        gc.freeze()
        gc.set_threshold(5_000, 10, 10)
        greet(server)
        await stopping.wait()
        console.print("stopping …")


def greet(server: Server) -> None:
    """Tell where the server is and how to use it; the key is shown this once."""
    capabilities = server.driver.capabilities
    key = server.new_key or "$CELLVM_API_KEY"
    print(f"CellVM {__version__} is ready at {server.url}  ({capabilities.isolation}, {capabilities.accelerator})")
    if server.new_key:
        print(f"API key: {key}   (shown once, stored hashed; `cellvm keys add` makes another)")
    print(f"Page: {server.url}/{f'#key={server.new_key}' if server.new_key else ''}")
    print(
        f"""Try:
  curl -X POST {server.url}/sandboxes -H "Authorization: Bearer {key}" \\
    -H "Content-Type: application/json" -d '{{"templateID": "code_interpreter", "timeout": 300}}'""",
        flush=True,
    )


async def build(settings: Settings, *, refresh: bool) -> None:
    """Build every template that `serve` builds unasked, so that it only verifies.

    Args:
        refresh: build new images of the Debian packages of today, though the cache has images.
    """
    if not settings.boots_machines:
        console.print(f"--isolation {settings.isolation} has nothing to build")
        return
    with steps() as step:
        await install_packages(settings.qemu, step)
        templates = load_templates(settings)
        if refresh:
            await refresh_images(builder(settings), templates.built_unasked, step)
        async with opened_driver(settings, templates.default, step) as opened:
            for template in sorted(templates.built_unasked, key=lambda template: template is not templates.default):
                await opened.prepare(template, step)
    console.print("all templates are built")


async def refresh_images(building: Builder, templates: Iterable[Template], step: Callable[[str], None]) -> None:
    """Build the images of these templates anew, each once. Servers go on with theirs until they are started again."""
    with closing(building.cache):
        async with building.cache.building(step) as tell:
            of_key = {image_key(template, building.ca_bundle): template for template in templates}
            for template in of_key.values():
                await building.image(template, tell, anew=True)


async def doctor(settings: Settings) -> int:
    """Tell what this host offers; the exit status is 1 when a server can't run."""
    found: Verdict | str = "packages are missing"
    template = load_templates(settings).default
    if why := kvm.refused():
        found = Verdict(False, why)
    elif not missing_packages(settings.qemu):
        private(settings.data_path)
        disks = private(settings.data_path / "disks")
        building = builder(settings)
        with steps() as step, closing(building.cache):
            try:
                found = await kvm.verdict(building, template, disks, step, anew=True)
            except (BuildError, Busy) as error:
                found = str(error)
    failed = False
    marks = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    try:
        floor = await found_floor(settings.floor)
    except DriverError:  # no `ip`: then there is no network either, as is said below
        floor = settings.floor
    for finding in examine(
        settings, template.disk_mb, found, await choose(settings.network, settings.bandwidth), floor
    ):
        failed = failed or finding.level == "fail"
        told = escape(finding.what + (f" — {finding.meaning}" if finding.meaning else ""))  # a guest's console is in it
        print_line = f"{marks[finding.level]}  {told}"
        Console(highlight=False, soft_wrap=True).print(print_line)
    return int(failed)


@asynccontextmanager
async def fresh_guest(settings: Settings, template_id: str) -> AsyncIterator[Guest]:
    """A sandbox without a server, for the time of the block."""
    templates = load_templates(settings)
    template = templates.find(template_id)
    if template is None:
        raise SettingsError(f"no template {template_id!r}")
    async with AsyncExitStack() as stack:
        with steps() as step:
            if settings.boots_machines:
                await install_packages(settings.qemu, step)
            opened = await stack.enter_async_context(opened_driver(settings, template, step))
            await opened.prepare(template, step)
        guest = await Guests(opened.driver, settings.guest_env).start(template.id)
        try:
            yield guest
        finally:
            await guest.kill()


async def fetch(guest: Guest, path: str, target: Path) -> None:
    """Save a file of the guest here."""
    with target.open("wb") as out:
        async with Files(guest).read(path) as content:
            async for data in content.pieces():
                out.write(data)
    console.print(f"saved {target}", markup=False)


def show_error(error: CellError) -> None:
    print("\n".join(error.traceback) or f"{error.name}: {error.value}", file=sys.stderr)


FIGURES = ".cellvm-figures"
"""The folder in the home of a sandbox that `cellvm run` takes figures from."""


async def run_file(settings: Settings, file: Path, arguments: list[str], get: list[str], template_id: str) -> int:
    """Run a Python file in a sandbox of its own, as `python3 FILE` does, and return its exit status.

    Figures are saved beside, wanted files fetched.
    """
    content = file.read_bytes()
    async with fresh_guest(settings, template_id) as guest:
        files, folder = Files(guest), os.path.join(guest.home, FIGURES)
        await store(files, file.name, content)
        await store(files, f"{FIGURES}/cellvm_figures.py", Path(__file__).with_name("figures.py").read_bytes())
        env = {"CELLVM_FIGURES": folder, "MPLBACKEND": "module://cellvm_figures", "PYTHONPATH": folder}
        if sys.stdout.isatty():
            env["PYTHONUNBUFFERED"] = "1"  # as Python behaves on a terminal, more or less
        request = wire.Spawn(argv=["python3", file.name, *arguments], env=env, cwd=guest.home)
        async with guest.link.ask(request) as conversation:
            Thread(target=feed, args=(conversation, asyncio.get_running_loop()), daemon=True).start()
            while not isinstance(item := await conversation.receive(), wire.Exited):
                if isinstance(item, tuple):
                    out = sys.stdout if item[0] == wire.STDOUT else sys.stderr
                    out.buffer.write(item[1])
                    out.buffer.flush()
        listing = await files.list(FIGURES, holding=Held().account("").hold("figures"))
        pictures = [entry.name for entry in listing.entries if entry.name.endswith(".png")]
        for number in range(1, len(pictures) + 1):
            await fetch(guest, f"{FIGURES}/{number}.png", Path(f"{file.stem}-{number}.png"))
        for path in get:
            await fetch(guest, path, Path(Path(path).name))
    return item.code


async def store(files: Files, path: str, content: bytes) -> None:
    """Write a file of the guest."""
    async with files.write(path) as writing:
        await writing.send(content)
        await writing.finish()


def feed(conversation: Conversation, loop: asyncio.AbstractEventLoop) -> None:
    """Pass our standard input on, as fast as the program reads it. This runs in a thread, because reading may block."""

    async def close() -> None:
        conversation.end()

    with suppress(RuntimeError):  # the loop is over, because the program has ended
        while data := read_stdin():
            asyncio.run_coroutine_threadsafe(conversation.send(data), loop).result()
        asyncio.run_coroutine_threadsafe(close(), loop).result()


def read_stdin() -> bytes:
    """Some of our standard input; empty at its end, or when there is none."""
    try:
        return os.read(0, wire.CHUNK)
    except OSError:
        return b""


async def run_notebook(settings: Settings, options: argparse.Namespace) -> int:
    """Run a notebook's cells in a sandbox of its own and write it with their outputs, also when one of them fails."""
    file: Path = options.file
    book = Notebook.read(file)
    out: Path = file if options.in_place else options.out or file.with_name(f"{file.stem}.out.ipynb")
    if not out.parent.is_dir():
        raise SettingsError(f"no folder {out.parent} to write {out.name} to")
    error: CellError | None = None
    async with fresh_guest(settings, options.template) as guest:
        try:
            with cells_done(len(book.cells)) as begin:
                numbers: dict[str, int] = {}
                for number, cell in enumerate(book.cells):
                    begin(number, cell["source"])
                    if not cell["source"].strip():
                        continue
                    async for event in guest.kernel.execute(cell["source"], timeout=options.timeout):
                        book.add(numbers.setdefault(event.id, number), event)  # late output goes to its own cell
                    error = book.outputs[number].error
                    is_allowed = options.allow_errors or "raises-exception" in tags(cell)
                    # What the gateway says of a cell (`code`), as that it ran out of time, is no exception of its own.
                    if error is not None and (error.code is not None or not is_allowed):
                        break
                    error = None
                else:
                    begin(len(book.cells), "")
        finally:
            book.write(out)
            console.print(f"saved {out}", markup=False)
        if error is not None:
            show_error(error)
            console.print(f"cell {number + 1} of {len(book.cells)} failed: {error.name}", markup=False)
        for path in options.get:
            await fetch(guest, path, Path(Path(path).name))
    return int(error is not None)


@contextmanager
def cells_done(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show which cell runs, as its first line, and how many are done: a bar on a terminal, plain lines elsewhere."""

    def first_line(source: str) -> str:
        return "".join(char for char in source.strip().partition("\n")[0] if char.isprintable())

    def say(done: int, source: str) -> None:
        if source:
            console.print(f"cell {done + 1} of {total}: {first_line(source)}", markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield say
        return
    text = TextColumn("{task.description}", markup=False)
    with Progress(
        SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=console
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, source: bar.update(task, completed=done, description=first_line(source)[:60])


MCP_SETUP = """Set-up of clients (over HTTP, with a server at URL and a key of `cellvm keys add`):
  Claude Code   claude mcp add --transport http cellvm URL/mcp --header "Authorization: Bearer KEY"
  Codex         ~/.codex/config.toml:   [mcp_servers.cellvm]
                                        url = "URL/mcp"
                                        bearer_token_env_var = "CELLVM_API_KEY"
  Cursor        ~/.cursor/mcp.json:     {"mcpServers": {"cellvm": {"url": "URL/mcp",
                                          "headers": {"Authorization": "Bearer KEY"}}}}
  VS Code       .vscode/mcp.json:       {"servers": {"cellvm": {"type": "http", "url": "URL/mcp",
                                          "headers": {"Authorization": "Bearer KEY"}}}}
  Gemini CLI    ~/.gemini/settings.json: {"mcpServers": {"cellvm": {"httpUrl": "URL/mcp",
                                          "headers": {"Authorization": "Bearer KEY"}}}}
Over stdio, for clients that start a program: command `cellvm`, arguments `mcp`.
  Claude Code   claude mcp add cellvm -- cellvm mcp"""


async def mcp(settings: Settings, url: str, scope: str, *, keep: bool) -> None:
    """Serve MCP on standard input and output: for the server at `url`, or for one of this process alone."""
    if url:
        await relay(url, settings.api_key, scope, keep=keep)
        return
    with TemporaryDirectory(prefix="cellvm-mcp-") as directory:
        own = replace(settings, host="127.0.0.1", port=0, data_dir=directory, api_key=new_key(), base_url="/")
        with steps() as step:
            if own.boots_machines:
                await install_packages(own.qemu, step)
            stack = AsyncExitStack()
            server = await stack.enter_async_context(running(own, step))
        async with stack:
            await relay(server.url, own.api_key, scope, keep=False)


def keys(settings: Settings, options: argparse.Namespace) -> int:
    """Make, list and remove API keys."""
    if options.action != "add" and (options.scope or options.of):
        raise SettingsError("--scope and --of are for `cellvm keys add`")
    if options.action != "remove" and options.with_sandboxes:
        raise SettingsError("--with-sandboxes is for `cellvm keys remove`")
    private(settings.data_path)
    with closing(Store(settings.data_path / "cellvm.db")) as store:
        if options.action == "add":
            owner, scope = limits(settings, store, options.scope, options.of)
            key = new_key()
            store.add_key(key, options.name, owner=owner, scope=scope)
            print(key)
        elif options.action == "list":
            for known in store.list_keys():
                made = time.strftime("%Y-%m-%d %H:%M", time.localtime(known.created))
                of = "" if known.owner == known.id else f" of {known.owner}"
                print(f"{known.id}  {made}  {known.name}" + (f"  ({known.scope}{of})" if known.scope != ALL else ""))
        elif not store.remove_key(options.name, with_sandboxes=options.with_sandboxes):
            console.print(f"no key with id {options.name!r}; `cellvm keys list` shows them")
            return 1
    return 0


def limits(settings: Settings, store: Store, scope: str, of: str) -> tuple[str | None, Scope]:
    """The owner, None for a new one, and the scope of a key that is to be made.

    Raises:
        SettingsError: there is no such key, sandbox or template, or the two flags do not go together.
        InvalidRequest: the scope is none.
    """
    limited = parse_scope(scope)
    if of and not scope:
        raise SettingsError("--of makes a key with limits; say with --scope which")
    if limited.is_read_only and not of:
        raise SettingsError("a key that may only read needs --of KEY, the id of the key whose sandboxes it reads")
    if limited.template:
        template = load_templates(settings).find(limited.template)
        if template is None:
            raise SettingsError(f"--scope {scope}: there is no such template")
        limited = Scope(template=template.id)
    owner = of or None
    if limited.sandbox:
        entry = store.entry(limited.sandbox)
        if entry is None or of not in ("", entry.owner):
            raise SettingsError(f"--scope {scope}: there is no such sandbox" + (f" of key {of}" if of else ""))
        owner = entry.owner
    if of not in ("", VARIABLE, *(key.owner for key in store.list_keys())):
        raise SettingsError(f"--of {of}: there is no such key; `cellvm keys list` shows them")
    return owner, limited


async def cache(settings: Settings, action: str, unused: float) -> int:
    """Tell what is in the cache, or delete what nobody uses."""
    there = Cache(settings.cache_path)
    if action == "list":
        entries = there.entries()
        for entry in entries:
            ago = (time.time() - entry.used_at) / 86_400
            state = "in use" if entry.is_held else f"unused for {ago:.1f} days"
            print(f"{entry.size / 2**20:8.0f} MiB  {state:<22}  {entry.name}")
        print(f"{sum(entry.size for entry in entries) / 2**20:8.0f} MiB  in {settings.cache_path}")
        return 0
    freed = 0
    with steps() as step:
        async with there.building(step) as tell:
            tell("delete what nobody uses")
            for entry in await in_thread(lambda: list(there.prune(unused))):
                freed += entry.size
                print(f"{entry.size / 2**20:8.0f} MiB  {entry.name}")
    print(f"{freed / 2**20:8.0f} MiB  deleted")
    return 0


def days(text: str) -> float:
    """A number of days on the command line."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def seconds(text: str) -> float:
    """A time limit on the command line."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def certs(settings: Settings, *, renew: bool) -> str:
    """Make certificates for `--domain` unless they are good, and tell what to do with them."""
    domain = settings.domain_name
    if domain == "localhost":
        domain = "sbx.localhost"  # no client takes a certificate for *.localhost
    try:
        files, is_new = certificates.make(private(settings.data_path / "certificates"), domain, renew=renew)
        left = certificates.days_left(certificates.read(files.server))
    except ValueError as error:
        raise SettingsError(f"{settings.data_path / 'certificates'}: {error}; delete what is there") from error
    port = settings.domain.partition(":")[2] or "8443"
    made = "new" if is_new else "as before; --renew makes a new one"
    return f"""{files.server}   certificate and key for *.{domain}, {left:.0f} days ({made})
{files.authority}   the authority that clients must trust (its key, {files.authority_key.name}, stays where it is)

# The server
cellvm serve --domain {domain}:{port} --port {port} --tls-cert {files.server}

# Programs for E2B on this machine
{e2b_names(f"{domain}:{port}", files.authority)}

# curl: --cacert {files.authority}; browsers: import it as an authority. It can sign names of {domain} only.
# Run this command again before the {left:.0f} days are over, and start the server again; clients go on as they are."""


def e2b_names(domain: str, authority: Path | None) -> str:
    """The lines for programs that reach sandboxes by names, with the authority to trust, if it is a private one."""
    trust = (
        ""
        if authority is None
        else f"\nexport SSL_CERT_FILE={authority}        # Python\nexport NODE_EXTRA_CA_CERTS={authority}  # JavaScript"
    )
    return f"""export E2B_DOMAIN={domain}{trust}
export E2B_API_KEY=e2b_...   # a key of `cellvm keys add`"""


def e2b_env(settings: Settings) -> str:
    """The lines to paste for programs that are written for E2B, by the settings of the server that they shall use."""
    key = "export E2B_API_KEY=e2b_...   # a key of `cellvm keys add`"
    if settings.tls_cert:
        own = certificates.Files.of(settings.data_path / "certificates")
        authority = own.authority if Path(settings.tls_cert).absolute() == own.server.absolute() else None
        return f"""# Python and JavaScript, by the names of sandboxes: *.{settings.domain} must lead to this server
{e2b_names(settings.domain, authority)}"""
    url = f"http://{settings.host}:{settings.port}"
    return f"""# Python and JavaScript, by one address
export E2B_API_URL={url}
export E2B_SANDBOX_URL={url}
{key}

# Python
from e2b_code_interpreter import Sandbox
with Sandbox.create() as sandbox:
    print(sandbox.run_code("1 + 1").text)

# A framework, for example smolagents
from smolagents import CodeAgent
agent = CodeAgent(tools=[], model=model, executor_type="e2b")

// JavaScript
import {{ Sandbox }} from '@e2b/code-interpreter'
const sandbox = await Sandbox.create()
console.log((await sandbox.runCode('1 + 1')).text)
await sandbox.kill()"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cellvm", description="Sandboxes that are microVMs, with live IPython kernels.")
    top.add_argument("--version", action="version", version=f"cellvm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "serve": "run the server (builds what is missing first)",
        "build": "build guest images and snapshots, then stop",
        "doctor": "tell what this host offers and what is missing",
        "run": "run a Python file in a fresh sandbox",
        "nb": "run a notebook in a fresh sandbox: `cellvm nb run`",
        "mcp": "serve MCP, the Model Context Protocol, on standard input and output",
        "keys": "make, list and remove API keys",
        "certs": "make an authority of your own and a certificate for the names of sandboxes",
        "cache": "tell what is in the cache, or delete what nobody uses",
        "e2b": "print what a program for E2B needs to find this server: `cellvm e2b env`",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == "nb":
            text = "run a notebook's cells in a fresh sandbox and save it with their outputs"
            actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
            command = actions.add_parser("run", help=text, description=text[0].upper() + text[1:] + ".")
            command.add_argument("file", type=Path, help="the notebook")
            where = command.add_mutually_exclusive_group()
            where.add_argument("-o", dest="out", type=Path, metavar="OUT", help="default: NAME.out.ipynb beside it")
            where.add_argument("--in-place", action="store_true", help="save to the notebook itself")
            command.add_argument("--allow-errors", action="store_true", help="go on after a cell that fails")
            command.add_argument("--timeout", type=seconds, metavar="SECONDS", help="for each cell; default: none")
        if name == "build":
            command.add_argument(
                "--refresh", action="store_true", help="build new images, with Debian's security updates of today"
            )
        if name == "run":
            command.add_argument("file", type=Path, help="the Python file; what follows `--` are its arguments")
        if name in ("run", "nb"):
            command.add_argument(
                "--get", action="append", default=[], metavar="PATH", help="fetch this file afterwards"
            )
            command.add_argument("--template", default="code_interpreter", help="default: code_interpreter")
        if name == "mcp":
            command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, MCP_SETUP
            command.add_argument(
                "--url", default="", help="the server whose sandboxes are used, with the key in CELLVM_API_KEY; "
                "default: sandboxes of this process"
            )  # fmt: skip
            command.add_argument("--scope", default="", help="names the sandbox; default: one of this process")
            command.add_argument("--keep", action="store_true", help="leave the sandbox running at the end")
        if name == "keys":
            command.add_argument("action", choices=("add", "list", "remove"))
            command.add_argument("name", nargs="?", default="", help="a label for `add`, the id for `remove`")
            command.add_argument(
                "--scope", default="", help="limits of the new key: read-only, metrics, template=ID or sandbox=ID"
            )
            command.add_argument(
                "--of", default="", metavar="KEY", help="id of the key whose sandboxes the new one sees"
            )
            command.add_argument("--with-sandboxes", action="store_true", help="end the removed key's sandboxes, too")
        if name == "e2b":
            command.add_argument("action", choices=("env",))
        if name == "certs":
            command.add_argument("--renew", action="store_true", help="make the certificate anew in any case")
        if name == "cache":
            command.add_argument("action", choices=("list", "prune"))
            command.add_argument(
                "--unused",
                type=days,
                metavar="DAYS",
                help="delete what was unused for so many days, 0 for all but what is in use; default: --cache-days",
            )
        Settings.add_flags(command)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    options, arguments = parser().parse_args(words[:end]), words[end + 1 :]
    # Debian's users have no directory of sbin in their PATH, where nft and mkfs.ext4 are.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        if arguments and options.command != "run":
            raise SettingsError("`--` and what follows are for `cellvm run`")
        settings = Settings.load(vars(options), os.environ)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Escaped())
        logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
        logging.getLogger("asyncio").setLevel("WARNING")
        match options.command:
            case "serve":
                asyncio.run(serve(settings))
            case "build":
                asyncio.run(build(settings, refresh=options.refresh))
            case "doctor":
                return asyncio.run(doctor(settings))
            case "run":
                return asyncio.run(run_file(settings, options.file, arguments, options.get, options.template))
            case "nb":
                return asyncio.run(run_notebook(settings, options))
            case "cache":
                unused = (settings.cache_days or math.inf) if options.unused is None else options.unused
                return asyncio.run(cache(settings, options.action, unused))
            case "mcp":
                asyncio.run(mcp(settings, options.url, options.scope, keep=options.keep))
            case "keys":
                return keys(settings, options)
            case "certs":
                print(certs(settings, renew=options.renew))
            case "e2b":
                print(e2b_env(settings))
    except (SettingsError, NotebookError, BuildError, DriverError, CellvmError, OSError) as error:
        console.print(f"cellvm: {error}", markup=False)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
