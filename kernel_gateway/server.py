"""`cellvm serve`: settings → driver → pool → sandboxes → app. The one place that knows all parts."""

import asyncio
import fcntl
import logging
import os
import re
import resource
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sized
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from tornado.netutil import bind_sockets

from kernel_gateway import kvm
from kernel_gateway.api.app import application, watch_keys
from kernel_gateway.api.door import Door
from kernel_gateway.api.socket import GOING_DOWN
from kernel_gateway.drivers import DriverError, VmDriver
from kernel_gateway.drivers.jail import Jail
from kernel_gateway.drivers.qemu import Qemu
from kernel_gateway.drivers.unisolated import Unisolated
from kernel_gateway.guest.guest import Guests
from kernel_gateway.held import Held
from kernel_gateway.images.build import Builder, qemu_version
from kernel_gateway.images.cache import Cache, in_thread
from kernel_gateway.images.image import Progress, content_hash, library
from kernel_gateway.images.preparation import Preparation, Prepare
from kernel_gateway.images.templates import Template, Templates, rootfs_dir
from kernel_gateway.network.policy import Floor
from kernel_gateway.network.slots import Slots, choose, found_floor
from kernel_gateway.ports import names
from kernel_gateway.private import private
from kernel_gateway.sandbox.key import KEY_LENGTH, new_key
from kernel_gateway.sandbox.pool import Pool
from kernel_gateway.sandbox.sandboxes import Sandboxes, supervised
from kernel_gateway.sandbox.store import Store
from kernel_gateway.settings import IN_CLEAR, Settings, SettingsError
from kernel_gateway.webhooks import Deliveries, Sender, Targets

log = logging.getLogger(__name__)

IDLE_TIMEOUT = 660
"""Seconds an idle connection is kept; E2B's clients keep theirs for 600."""
MAX_HEADER = 64 * 1024
CHUNK = 256 * 1024
"""Bytes of an upload that are passed on at once: a frame of the wire holds as many."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens, and a key if one was made at this start."""

    url: str
    new_key: str | None
    sandboxes: Sandboxes
    driver: VmDriver


def load_templates(settings: Settings) -> Templates:
    """The templates that the settings name.

    Raises:
        SettingsError: there is no such template, or a file is malformed.
        PermissionError: others may write to the directory.
    """
    # Whoever writes a template runs code in every machine of it. CellVM's own are as safe as its code.
    directory = private(Path(settings.template_dir)) if settings.template_dir else rootfs_dir() / "templates"
    only = [name.strip() for name in settings.templates.split(",") if name.strip()] or None
    try:
        return Templates.load(directory, only)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def builder(settings: Settings) -> Builder:
    cache = Cache(settings.cache_path)
    # Machines are started with another PATH than ours: both must mean the same program.
    return Builder(cache, shutil.which(settings.qemu) or settings.qemu, ca_file(settings))


def ca_file(settings: Settings) -> Path | None:
    """The CA certificates that guests are to trust, in one file; None for Debian's own.

    Raises:
        SettingsError: there is nothing to add the operator's own to, or they are no certificates.
    """
    bundle = settings.ca_path
    if not settings.extra_ca:
        return bundle
    if bundle is None:
        raise SettingsError(f"--extra-ca is added to --ca-bundle, and there is no file {settings.ca_bundle!r}")
    try:
        extra = Path(settings.extra_ca).read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=extra.decode("ascii"))
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise SettingsError(f"--extra-ca {settings.extra_ca}: {error}") from error
    whole = bundle.read_bytes() + b"\n" + extra
    path = settings.cache_path / f"ca-{content_hash(whole)}.pem"
    path.write_bytes(whole)
    return path


@dataclass(frozen=True, slots=True)
class Opened:
    """A driver with its network. `prepare` builds what a template lacks, verifies it and offers it on the driver."""

    driver: VmDriver
    network: Slots | None
    prepare: Prepare


@asynccontextmanager
async def opened_driver(settings: Settings, first: Template, progress: Progress) -> AsyncIterator[Opened]:
    """The driver that the settings ask for. It offers no template before that was prepared.

    Args:
        first: the template that will be prepared first, because KVM is tried with its image.

    Raises:
        SettingsError: the isolation or a setting of the network can't be had here.
        BuildError: the image that KVM is tried with could not be built.
    """
    private(settings.data_path)
    disks = private(settings.data_path.absolute() / "disks")
    if not settings.boots_machines:
        log.warning("ISOLATION IS OFF: code in a sandbox can do whatever this server can. For development only.")
        if len(os.fsencode(disks)) > Unisolated.LONGEST_PATH:
            raise SettingsError(
                f"--isolation unisolated needs a shorter --data-dir than {settings.data_path.absolute()}, because the "
                "names of kernels' sockets start with it and have at most 107 bytes"
            )
        for left in disks.glob("agent-*"):  # of a server that was killed
            shutil.rmtree(left)

        async def nothing(template: Template, step: Progress) -> None:
            """An agent that is a plain process needs no image."""

        yield Opened(Unisolated(disks, warm={first.id: first.warm}), None, nothing)
        return
    building = builder(settings)
    with closing(building.cache):
        accelerator = await _accelerator(settings, first, building, disks, progress)
        # The jail is first: the server may have to leave its control group to it, which it can only while it is alone.
        with closing(Jail.open(building.binary, kvm=accelerator == "kvm")) as jail:
            if accelerator == "kvm" and (why := jail.kvm_refused()):
                raise SettingsError(f"--isolation {settings.isolation}: the users of machines can't open it: {why}")
            async with opened_network(settings) as slots:
                driver = Qemu(building.binary, accelerator, disks, jail, nics=slots)

                async def prepare(template: Template, progress: Progress) -> None:
                    await building.ready(template, driver, progress)

                yield Opened(driver, slots, prepare)


@asynccontextmanager
async def opened_network(settings: Settings) -> AsyncIterator[Slots | None]:
    """The sandboxes' internet, behind its filter; None, and a word on why, when there can be none.

    Raises:
        SettingsError: the mechanism that was asked for by name does not work here.
    """
    floor = settings.floor
    mechanism, why = await choose(settings.network, settings.bandwidth)
    slots = None
    if mechanism != "off":
        slots = Slots(
            mechanism, floor, resolvers=settings.resolvers, proxy=settings.proxy, bandwidth=settings.bandwidth
        )
        try:
            await slots.start()
        except (DriverError, OSError) as error:
            slots, why = None, str(error)
    if slots is None:
        if settings.network not in ("auto", "off"):
            raise SettingsError(f"--network {settings.network}: {why}")
        if settings.network == "auto":
            log.warning("SANDBOXES HAVE NO NETWORK, for its filter can't be installed: %s", why)
        yield None
        return
    if floor.exceptions:
        log.warning(
            "EXCEPTIONS TO THE EGRESS FILTER: every sandbox may reach %s", ", ".join(map(str, floor.exceptions))
        )
    try:
        yield slots
    finally:
        await slots.close()


async def _accelerator(
    settings: Settings, template: Template, building: Builder, disks: Path, progress: Progress
) -> str:
    """ "kvm" or "tcg": what the settings ask for, or what works here.

    Raises:
        SettingsError: KVM is asked for, and this host has none for us.
    """
    if settings.isolation == "qemu-tcg":
        return "tcg"
    if settings.isolation == "qemu-kvm":
        if why := kvm.refused():
            raise SettingsError(f"--isolation qemu-kvm: {why}")
        return "kvm"
    found = await kvm.verdict(building, template, disks, progress)
    if not found.works:
        log.warning(
            "NO KVM: %s\nSandboxes run emulated (TCG, QEMU %s). That is correct but slow, and QEMU does not call it a "
            "security boundary. `cellvm doctor` tries KVM again and says what to do",
            found.why,
            qemu_version(building.binary),
        )
    return "kvm" if found.works else "tcg"


def claim(data: Path) -> int:
    """Hold the data directory for this process.

    Raises:
        SettingsError: another server has it.
        PermissionError: others may write to it.
    """
    private(data)
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SettingsError(f"another server uses {data}; stop it, or choose another --data-dir") from None
    return lock


@asynccontextmanager
async def running(settings: Settings, progress: Progress) -> AsyncIterator[Server]:
    """A server for the time of the block.

    Raises:
        SettingsError: a setting can't be used here (port taken, data directory in use, unknown template).
        BuildError: a template could not be built.
    """
    check_key(settings.api_key)
    hosts = settings.hosts
    templates = load_templates(settings)
    # A sandbox has some twenty descriptors here, and as many as its clients and its gate have connections.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _, largest = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, largest))  # keys and everybody's output would be in a core dump
    lock = claim(settings.data_path)
    try:
        sockets = bind_sockets(settings.port, settings.host)
    except OSError as error:
        os.close(lock)
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror}") from error
    store = Store(settings.data_path / "cellvm.db")
    try:
        left = store.end_all("host_restart")
        if left:
            log.warning("%d sandboxes ended with the server before this one", left)
        async with opened_driver(settings, templates.default, progress) as opened, AsyncExitStack() as last:
            driver = opened.driver
            check_bind(settings, sockets, driver)
            if not (is_local(sockets) or settings.tls_cert):
                log.warning("KEYS CROSS THE NETWORK IN CLEAR: %s", IN_CLEAR)
            preparation = Preparation(opened.prepare)
            last.push_async_callback(preparation.close)
            await preparation.make(templates.default, progress)
            made = None  # only now: a key that was made before a failed start would never be shown
            if settings.api_key:
                store.lend_key(settings.api_key)
            elif not store.list_keys():
                made = new_key()
                store.add_key(made, "first start")
            guests = Guests(driver, settings.guest_env)
            first = templates.default
            pools = {first.id: Pool(guests, first.id, settings.pool_size)} if settings.pool_size else {}
            journals = private(settings.data_path / "journals")
            sandboxes = Sandboxes(
                templates,
                guests,
                pools,
                store,
                maximum=settings.max_sandboxes,
                max_timeout=settings.max_timeout,
                per_owner=settings.max_sandboxes_per_key or settings.max_sandboxes,
                journals=journals,
                held=Held(settings.max_held_mb << 20, settings.max_held_total_mb << 20),
                creates_per_minute=settings.max_creates_per_minute,
                network=opened.network,
                preparation=preparation,
                paused=private(settings.data_path / "paused"),
                max_paused=settings.max_paused_per_key,
                snapshots=private(settings.data_path / "snapshots"),
                max_snapshots=settings.max_snapshots_per_key,
                checkpoints=private(settings.data_path / "checkpoints"),
                checkpoint_bytes=settings.max_checkpoints_mb << 20,
                pause_at_close=settings.at_shutdown == "pause",
            )
            floor = await surroundings(settings, opened.network)
            targets = Targets(floor, settings.webhook_exceptions)
            app = application(
                sandboxes,
                store,
                origins=settings.origins,
                base_url=settings.base_path,
                max_message=settings.max_message_mb * 1024 * 1024,
                kernel_idle_timeout=settings.kernel_idle_timeout,
                kernel_max_life=settings.kernel_max_life or None,
                mcp_idle_timeout=settings.mcp_idle_timeout,
                max_connections=settings.max_connections,
                max_requests=settings.max_requests,
                domain=settings.domain,
                hosts=hosts,
                stripped=names(settings.strip_headers),
                targets=targets,
                library=partial(library, settings.cache_path),
            )
            http = Door(
                app,
                max_body_size=1 << 50,  # each route has its own limit; uploads have the sandbox's disk
                max_header_size=MAX_HEADER,
                idle_connection_timeout=IDLE_TIMEOUT,
                chunk_size=CHUNK,
                ssl_options=tls_context(settings),
            )
            http.most = min(Door.most, most * 3 // 4)  # the rest is for machines
            http.add_sockets(sockets)
            sandboxes.start()
            rest = asyncio.create_task(make_rest(settings, templates, preparation))
            last.push_async_callback(cancelled, rest)
            keys = asyncio.create_task(supervised("the watch over keys", lambda: watch_keys(app)))
            last.push_async_callback(cancelled, keys)
            deliveries = Deliveries(store, Sender(targets))
            delivering = asyncio.create_task(supervised("the delivery of events", deliveries.run))
            last.push_async_callback(cancelled, delivering)
            host, port = sockets[0].getsockname()[:2]
            try:
                scheme = "https" if settings.tls_cert else "http"
                url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.base_path}"
                yield Server(url, made, sandboxes, driver)
            finally:
                sandboxes.places.is_draining = True
                http.stop()
                await drain(app.settings["requests"], settings.shutdown_timeout)
                app.settings["sockets"].close(GOING_DOWN, "the server is going down")
                await asyncio.sleep(0)  # the close frames go before the sandboxes do
                await sandboxes.close()
                await http.close_all_connections()
    finally:
        for sock in sockets:
            sock.close()
        store.close()
        os.close(lock)


async def make_rest(settings: Settings, templates: Templates, preparation: Preparation) -> None:
    """What a server does after it is ready: make its other templates, then delete what is old in the cache."""
    await preparation.make_all(template for template in templates.built_unasked if template is not templates.default)
    log.info("the other templates have had their turn")
    if settings.cache_days and settings.boots_machines:
        try:
            cache = Cache(settings.cache_path)
            async with cache.building(log.info):
                for entry in await in_thread(lambda: list(cache.prune(settings.cache_days))):
                    log.info("deleted from the cache, unused for %d days: %s", settings.cache_days, entry.name)
        except OSError as error:
            log.warning("old entries of the cache can't be deleted: %s", error)


async def surroundings(settings: Settings, network: Slots | None) -> Callable[[], Floor]:
    """What no webhook may be sent to: the floor of the sandboxes' network, or without one what this host is in now."""
    if network is not None:
        return lambda: network.floor
    try:
        found = await found_floor(settings.floor)
    except (DriverError, OSError) as error:
        log.warning("this host's own addresses can't be found, so webhooks may be sent to them: %s", error)
        found = settings.floor
    return lambda: found


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def is_local(sockets: list[socket.socket]) -> bool:
    """Whether nobody on another machine can connect."""
    return all(ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback for sock in sockets)


def check_key(key: str) -> None:
    """Refuse a key that could be guessed, or that no client could send. No key at all is right.

    Raises:
        SettingsError: it is one.
    """
    shortest, longest = KEY_LENGTH
    if key and not re.fullmatch(f"[!-~]{{{shortest},{longest}}}", key):
        raise SettingsError(
            f"CELLVM_API_KEY must have {shortest} to {longest} characters (ASCII, no blanks), because a short key can "
            "be guessed. Make one with `openssl rand -hex 20`, or unset it and use a key of `cellvm keys add`"
        )


def check_bind(settings: Settings, sockets: list[socket.socket], driver: VmDriver) -> None:
    """Refuse to offer to other machines what is no boundary, unless told to.

    Raises:
        SettingsError: the server would listen beyond this machine, and sandboxes are emulated or have no boundary.
    """
    if driver.capabilities.accelerator == "kvm" or is_local(sockets):
        return
    what = "sandboxes are emulated (TCG), which QEMU calls no security boundary"
    if driver.capabilities.isolation == "none":
        what = "code in sandboxes can do whatever this server can"
    if not settings.allow_insecure_emulation:
        raise SettingsError(
            f"--host {settings.host} is beyond this machine, and {what}. Use KVM, or listen on 127.0.0.1; "
            "--allow-insecure-emulation accepts it"
        )
    log.warning("LISTENING BEYOND THIS MACHINE, AND %s", what)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What the certificate settings make, None without them.

    Raises:
        SettingsError: a file is missing or is not what it must be.
    """
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"--tls-cert {settings.tls_cert}: {error}") from error
    return context


async def drain(requests: Sized, timeout: float) -> None:
    """Let requests that are being answered finish, within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while requests and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
