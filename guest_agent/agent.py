"""The agent's work for each request of the gateway."""

import asyncio
import os
import time
from pathlib import Path

from guest_agent import ports, process, resume, wire
from guest_agent.channel import AgentError, Channel, Stream
from guest_agent.files import Files
from guest_agent.instant import ZygoteProcess
from guest_agent.kernel import Kernel
from guest_agent.watch import Watches

# Cells that warm the paths of first cells (parse, run, display, publish; format a traceback). The last clears results.
EXERCISES = ("1 + 1", "1 / 0", "1 / 0", "get_ipython().displayhook.flush(); del _0")

CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


class Agent:
    """The agent of one sandbox.

    Args:
        fd: the channel to the gateway.
        home: the directory in which processes start.
        runtime: a directory for sockets and the like.
        uid: the sandbox user; None when the agent is not root in a machine of its own (driver `unisolated`),
            where it must not touch clock, names or other users.
        path: the value of PATH.
        modules: what Python programs are warmed with when there is no template.
    """

    def __init__(
        self, fd: int, home: str, runtime: Path, uid: int | None, path: str, modules: list[str] | None = None
    ) -> None:
        self._home = home
        self._runtime = runtime
        self._uid = uid
        self._base_env = {
            "PATH": path,
            "HOME": home,
            "USER": "user",
            "LOGNAME": "user",
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "E2B_SANDBOX": "true",
        }
        if uid is not None:
            # Python's clients have their own lists of trust, so they are pointed to the machine's with the operator's.
            self._base_env |= {"VIRTUAL_ENV": "/opt/venv", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict.fromkeys(
                ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS"), CA_BUNDLE
            )
            if " avx2 " in Path("/proc/cpuinfo").read_text():
                self._base_env["POLARS_PREFER_PKG"] = "32"  # its fast build; the image has one for old processors, too
        self._env = self._base_env
        self._cpu_before = (0.0, 0.0)
        self._zygote = ZygoteProcess(uid, home, modules or [])
        self._programs = process.Programs(home, uid, self._zygote)
        self.channel = Channel(
            fd, self.dispatch, lambda frame: self._kernel.data_received(frame), lambda: self._kernel.epoch_begun()
        )
        self._kernel = Kernel(self.channel, runtime / "kernel", uid)
        self._kernel.env = self._env
        self._files = Files(uid)
        self._watches = Watches()

    async def dispatch(self, stream: Stream, body: wire.Body) -> None:
        """Answer one request on its stream."""
        match body:
            case wire.Spawn():
                await self._programs.spawn(stream, body, self._env)
            case wire.Signal() | wire.Resize() | wire.GetUser():
                stream.reply(self._programs.answer(body))
            case wire.Connect():
                await ports.connect(stream, body, self._uid)
            case (
                wire.Stat() | wire.ListDir() | wire.Read() | wire.Write() | wire.MakeDir() | wire.Move() | wire.Delete()
            ):
                await self._files.answer(stream, body)
            case wire.Watch() | wire.GetChanges():
                await self._watches.answer(stream, body)
            case wire.GetMetrics():
                stream.reply(self._metrics())
            case wire.Interrupt() | wire.GetStopped() | wire.Restart():
                stream.reply(await self._kernel.answer(body))
            case wire.Resume():
                stream.reply(await self._resume(body))
            case wire.Continue():
                stream.reply(self._continue(body))
            case wire.Warm():
                await self._warm(body)
                stream.reply(wire.Done())
            case wire.Flush():
                await asyncio.to_thread(os.sync)
                stream.reply(wire.Done())
            case wire.Ping():
                stream.reply(wire.Done())

    async def _resume(self, request: wire.Resume) -> wire.Resumed:
        before = self._env if request.is_copy else self._base_env
        self._env = self._kernel.env = {**before, **request.env}
        if not (self._kernel.is_running or request.is_copy):  # with driver `unisolated` no template has started it
            await self._kernel.start()
        self._add_entropy(request.entropy)
        # The kernel reseeds from that entropy. The rest is done meanwhile, on the other processor.
        resuming = asyncio.create_task(self._kernel.resume(request.env if request.is_copy else None))
        await asyncio.sleep(0)
        drift = self._step_clock(request.wall_ns)
        if self._uid is not None:
            with resume.as_root(self._uid):
                resume.identify(request.hostname, self._runtime)
        await resuming
        return self._resumed(request.nonce, drift)

    def _continue(self, request: wire.Continue) -> wire.Resumed:
        self._add_entropy(request.entropy)
        return self._resumed(request.nonce, self._step_clock(request.wall_ns))

    def _add_entropy(self, entropy: bytes) -> None:
        if self._uid is not None:
            with resume.as_root(self._uid):
                resume.add_entropy(entropy)

    def _step_clock(self, wall_ns: int) -> int:
        if self._uid is None:
            return 0
        with resume.as_root(self._uid):
            return resume.step_clock(wall_ns)

    def _resumed(self, nonce: bytes, drift: int) -> wire.Resumed:
        return wire.Resumed(
            nonce=nonce,
            generation=wire.GENERATION,
            drift_ns=drift,
            sample=os.getrandom(16),
            home=self._home,
        )

    async def _warm(self, request: wire.Warm) -> None:
        # Both import the modules, which takes long, and a template's machine has two processors.
        await asyncio.gather(self._zygote.warm(request.modules, self._env), self._warm_kernel(request))

    async def _warm_kernel(self, request: wire.Warm) -> None:
        await self._kernel.start_nursery(request.modules)
        await self._kernel.start()
        # It runs in a namespace of its own, so that the user's stays empty, and twice, so that all caches are full.
        for _ in range(2):
            reply = await self._kernel.execute(f"exec({request.exercise!r}, {{}})")
            if reply["status"] != "ok":
                raise AgentError("failed", "\n".join(["the template's exercise failed:", *reply["traceback"]]))
        for code in EXERCISES:
            await self._kernel.execute(code)

    def _metrics(self) -> wire.Metrics:
        fields = [float(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy, total = sum(fields) - fields[3] - fields[4], sum(fields)
        busy_before, total_before = self._cpu_before
        self._cpu_before = (busy, total)
        used = 100 * (busy - busy_before) / (total - total_before) if total > total_before else 0.0
        memory = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
        }
        disk = os.statvfs(self._home)
        return wire.Metrics(
            ts=int(time.time()),
            cpu_count=os.cpu_count() or 1,
            cpu_used_pct=round(used, 2),
            mem_total=memory["MemTotal"],
            mem_used=memory["MemTotal"] - memory["MemAvailable"],
            mem_cache=memory["Cached"],
            disk_total=disk.f_blocks * disk.f_frsize,
            disk_used=(disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        )
