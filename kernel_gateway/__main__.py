"""The command line: `cellvm serve | build | doctor | run | keys`."""

import argparse
import asyncio
import base64
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from guest_agent import wire
from kernel_gateway import __version__
from kernel_gateway.drivers import DriverError
from kernel_gateway.errors import CellvmError
from kernel_gateway.host import examine, install_packages, kvm_verdict, missing_packages
from kernel_gateway.image import BuildError
from kernel_gateway.pool import Guests
from kernel_gateway.server import Server, builder, load_templates, make_driver, running
from kernel_gateway.settings import Settings, SettingsError
from kernel_gateway.store import Store, new_key

console = Console(stderr=True, highlight=False)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show what is being done and for how long: a moving line on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        started = time.monotonic()
        yield lambda text: console.print(f"{time.monotonic() - started:6.1f} s  {text}")
        return
    with Progress(
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    ) as progress:

        def step(text: str) -> None:
            for task in progress.tasks:
                progress.update(task.id, total=1, completed=1)
            progress.add_task(text, total=None)

        yield step
        for task in progress.tasks:
            progress.update(task.id, total=1, completed=1)


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
    async with AsyncExitStack() as stack:
        with steps() as step:
            if settings.isolation != "unisolated":
                await install_packages(settings.qemu, step)
            server = await stack.enter_async_context(running(settings, step))
        started = True
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
    print(
        f"""Try:
  curl -X POST {server.url}/sandboxes -H "Authorization: Bearer {key}" \\
    -H "Content-Type: application/json" -d '{{"templateID": "code_interpreter", "timeout": 300}}'""",
        flush=True,
    )


async def build(settings: Settings) -> None:
    """Build every template, so that `serve` only verifies."""
    if settings.isolation == "unisolated":
        console.print("the driver `unisolated` has nothing to build")
        return
    with steps() as step:
        await install_packages(settings.qemu, step)
        await make_driver(settings, load_templates(settings), step)
    console.print("all templates are built")


async def doctor(settings: Settings) -> int:
    """Tell what this host offers; the exit status is 1 when a server can't run."""
    kvm: bool | None = None
    if not missing_packages(settings.qemu) and os.access("/dev/kvm", os.R_OK | os.W_OK):
        with steps() as step:
            disks = settings.data_path / "disks"
            disks.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                kvm = await kvm_verdict(builder(settings), next(iter(load_templates(settings))), disks, step)
            except BuildError as error:
                console.print(f"KVM could not be tried: {error}")
    failed = False
    marks = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for finding in examine(settings, kvm):
        failed = failed or finding.level == "fail"
        print_line = f"{marks[finding.level]}  {finding.what}" + (f" — {finding.meaning}" if finding.meaning else "")
        Console(highlight=False, soft_wrap=True).print(print_line)
    return int(failed)


async def run_file(settings: Settings, file: Path, get: list[str], template_id: str) -> int:
    """Run a Python file in a sandbox of its own and end it; figures are saved beside, wanted files fetched."""
    code = file.read_text()
    templates = load_templates(settings)
    template = templates.find(template_id)
    if template is None:
        raise SettingsError(f"no template {template_id!r}")
    with steps() as step:
        if settings.isolation != "unisolated":
            await install_packages(settings.qemu, step)
        driver = await make_driver(settings, templates, step)
    guest = await Guests(driver).start(template.id)
    figures = failed = 0
    try:
        async for event in guest.kernel.execute(code):
            if event.type in ("stdout", "stderr"):
                print(event.text, end="", flush=True, file=sys.stdout if event.type == "stdout" else sys.stderr)
            elif event.error is not None:
                failed = 1
                print("\n".join(event.error.traceback) or f"{event.error.name}: {event.error.value}", file=sys.stderr)
            elif event.data is not None:
                if "image/png" in event.data:
                    figures += 1
                    picture = Path(f"{file.stem}-{figures}.png")
                    picture.write_bytes(base64.b64decode(event.data["image/png"]))
                    console.print(f"saved {picture}")
                else:
                    print(event.data.get("text/plain", ""))
        for path in get:
            target = Path(Path(path).name)
            with target.open("wb") as out:
                async with guest.link.ask(wire.Read(path=os.path.join(guest.home, path))) as conversation:
                    await conversation.receive()
                    while isinstance(item := await conversation.receive(), tuple):
                        out.write(item[1])
            console.print(f"saved {target}")
    finally:
        await guest.kill()
    return failed


def keys(settings: Settings, action: str, name: str) -> int:
    """Make, list and remove API keys."""
    settings.data_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with closing(Store(settings.data_path / "cellvm.db")) as store:
        if action == "add":
            key = new_key()
            store.add_key(key, name)
            print(key)
        elif action == "list":
            for owner, label, created in store.list_keys():
                print(f"{owner}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(created))}  {label}")
        elif not store.remove_key(name):
            console.print(f"no key with id {name!r}; `cellvm keys list` shows them")
            return 1
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cellvm", description="Sandboxes that are microVMs, with live IPython kernels.")
    top.add_argument("--version", action="version", version=f"cellvm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "serve": "run the server (builds what is missing first)",
        "build": "build guest images and snapshots, then stop",
        "doctor": "tell what this host offers and what is missing",
        "run": "run a Python file in a fresh sandbox",
        "keys": "make, list and remove API keys",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == "run":
            command.add_argument("file", type=Path, help="the Python file")
            command.add_argument(
                "--get", action="append", default=[], metavar="PATH", help="fetch this file afterwards"
            )
            command.add_argument("--template", default="code_interpreter", help="default: code_interpreter")
        if name == "keys":
            command.add_argument("action", choices=("add", "list", "remove"))
            command.add_argument("name", nargs="?", default="", help="a label for `add`, the id for `remove`")
        Settings.add_flags(command)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        settings = Settings.load(vars(options), os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
        )
        logging.getLogger("asyncio").setLevel("WARNING")
        match options.command:
            case "serve":
                asyncio.run(serve(settings))
            case "build":
                asyncio.run(build(settings))
            case "doctor":
                return asyncio.run(doctor(settings))
            case "run":
                return asyncio.run(run_file(settings, options.file, options.get, options.template))
            case "keys":
                return keys(settings, options.action, options.name)
    except (SettingsError, BuildError, DriverError, CellvmError, OSError) as error:
        console.print(f"cellvm: {error}", markup=False)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
