"""Random programs of overlapping operations, checked against a small model.

The kernels of the first test are real. Those of the second are fakes, because only such machines, and virtual ones, can
be saved: it plays pauses, snapshots, forks, checkpoints, and the end of the server.

A program is a list of steps. Each step waits for a moment, then does one thing with a sandbox while the steps before it
are still under way, and some of the clients hang up. Cells and commands note their start and their end in the ledger, a
file outside of the sandboxes, so that the test knows what has happened independently of what the server tells of it.
"""

import asyncio
import gc
import json
import math
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tornado.simple_httpclient import HTTPTimeoutError
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kernel_gateway.drivers import NoSpace
from kernel_gateway.drivers.unisolated import Unisolated, UnisolatedVm
from kernel_gateway.kernel.executions import Execution
from kernel_gateway.kernel.kernel import Kernel
from kernel_gateway.sandbox.lifecycle import State
from kernel_gateway.sandbox.outbox import Event
from kernel_gateway.sandbox.sandbox import Sandbox, kernel_id
from kernel_gateway.sandbox.store import Entry, Store
from tests.api.clients import agent, raw
from tests.fakes import FakeGuest, FakeVm, SavingDriver, Script, Service, eventually, serving

SHORT = 40
PROGRAMS = int(os.environ.get("MODEL_PROGRAMS", SHORT))
"""The number of programs. The short run plays the same ones every time, a run of another length new ones."""
PLACES = 2
PATIENCE = 20.0
"""Seconds within which everything comes to rest."""
SLEEPS = (0.0, 0.1, 0.3)
"""Seconds that a cell or command sleeps."""


@dataclass(frozen=True)
class Step:
    """After `pause` seconds somebody does `what`, and hangs up `patience` seconds later if it is not over.

    `box` chooses one of the sandboxes that are known then. `which` chooses how long a cell sleeps, an execution's id, a
    file or a session.
    """

    pause: float
    what: str
    box: int = 0
    which: int = 0
    patience: float | None = None


CELLS = "cell lines keyed watched exit overdue stubborn"
BESIDE = "restart interrupt attach command upload download list"


def steps(what: str) -> st.SearchStrategy[Step]:
    return st.builds(
        Step,
        st.sampled_from([0.0, 0.0, 0.01, 0.03, 0.1, 0.2]),
        st.sampled_from(what.split()),
        st.integers(0, 1),
        st.integers(0, 2),
        st.sampled_from([None, None, None, 0.0, 0.01, 0.05, 0.2]),
    )


WORK = "cell lines keyed watched attach command"
PROGRAM = st.one_of(
    st.lists(steps(f"{CELLS} {BESIDE} restart restart cell keyed watched"), min_size=2, max_size=9),
    st.lists(steps(f"{CELLS} {BESIDE} restart restart cell keyed watched"), min_size=2, max_size=9),
    st.lists(steps(f"{WORK} {WORK} delete expire die trouble"), min_size=2, max_size=9),
    st.lists(
        steps(f"{WORK} create create delete delete session session expire die trouble trouble"), min_size=2, max_size=7
    ),
)


@dataclass
class Work:
    """A cell or a command. `told` is what its clients heard: an ending, and an error's code or name."""

    name: str
    box: str
    what: str
    began: float = field(default_factory=time.monotonic)
    ended: float = math.inf
    asked: int = 0
    told: list[tuple[str, str | None]] = field(default_factory=list)


@dataclass
class Cause:
    """Something that may end work of its sandbox, or stop it. `until` is when it was over, if somebody has heard."""

    what: str
    box: str
    began: float = field(default_factory=time.monotonic)
    until: float = math.inf


class Counted(Unisolated):
    """The driver, which knows its machines."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._machines: list[UnisolatedVm] = []

    @property
    def alive(self) -> list[UnisolatedVm]:
        self._machines = [vm for vm in self._machines if not vm._ended.done()]
        return self._machines

    async def start(self, template_id: str) -> UnisolatedVm:
        vm = await super().start(template_id)
        self._machines.append(vm)
        return vm


def processes_in(directory: Path) -> list[str]:
    """Processes that work in a directory below this one, or did so until it was deleted."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd").startswith(f"{directory}/"):
                found.append(pid)
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            pass  # it has ended, or it is somebody else's
    return found


def objects() -> Counter[str]:
    """What is kept in memory of sandboxes and their work."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, Sandbox | Kernel | Execution))


class Troubled(Store):
    """A store that can't write until a moment: its writes fail, or stand still."""

    until = 0.0
    hangs = False

    def _insert(self, entries: list[Entry], events: list[Event], uses: Mapping[str, int]) -> None:
        while (left := self.until - time.monotonic()) > 0:
            if not self.hangs:
                raise sqlite3.OperationalError("disk I/O error")
            time.sleep(min(left, 0.05))
        super()._insert(entries, events, uses)


class World:
    """The service that all programs run against, and one sandbox that they share as long as it lives."""

    def __init__(self, service: Service, driver: Counted, directory: Path) -> None:
        self.service = service
        self.driver = driver
        self.directory = directory
        self.ledger = directory / "ledger"
        self.shared: str | None = None
        self.played = 0
        self.endings: Counter[str] = Counter()
        self._tasks = len(asyncio.all_tasks())
        self._objects = objects()

    async def play(self, program: list[Step]) -> None:
        """Run a program and check it. After a failure the next one begins with new sandboxes."""
        self.played += 1
        if self.shared is None:
            self.shared = await self.service.create()
        run = Run(self, self.shared)
        try:
            await run.play(program)
            await self.leave({self.shared})
            run.check()
            if self.service.sandboxes.find(self.shared) is None:
                await self.empty()
        except BaseException as error:
            error.add_note(f"@example({program})\n{run.story()}")
            self.shared = None
            await self.leave(set())
            self._objects = objects()  # what the failure refers to stays in memory
            raise
        self.endings.update(ending for work in run.works.values() for ending, _ in work.told)

    async def leave(self, kept: set[str]) -> None:
        """Delete all sandboxes but these, and see that their places and machines have gone."""
        sandboxes = self.service.sandboxes
        for each in sandboxes.list(self.service.owner):
            if each.id not in kept:
                await sandboxes.kill(each)
        left = kept & {each.id for each in sandboxes.list(self.service.owner)}
        await eventually(lambda: {each.id for each in sandboxes.places} == left, PATIENCE)
        assert len(self.driver.alive) == len(left)
        await self.service.store.flush(PATIENCE)
        with closing(sqlite3.connect(self.service.store.path)) as db:
            recorded = {name for (name,) in db.execute("SELECT id FROM sandboxes WHERE ended IS NULL")}
        assert recorded == left, "a machine without a record, or a record without a machine"

    async def empty(self) -> None:
        """Delete all sandboxes, and see that nothing is left of them."""
        self.shared = None
        await self.leave(set())
        await eventually(lambda: not processes_in(self.directory), PATIENCE)
        await eventually(lambda: self.service.sandboxes.held.size == 0, PATIENCE)
        await eventually(lambda: len(asyncio.all_tasks()) <= self._tasks + 1, PATIENCE)  # this one, too
        await eventually(lambda: objects() == self._objects, PATIENCE)


class Run:
    """One program under way: what was asked, what was told, and what may have come in between."""

    def __init__(self, world: World, shared: str) -> None:
        self.world = world
        self.service = world.service
        self.boxes = [shared]
        self.works: dict[str, Work] = {}
        self.causes: list[Cause] = []
        self.uploads: dict[str, set[bytes]] = defaultdict(set)
        self.sessions: dict[str, set[str]] = defaultdict(set)
        self.count = 0

    async def play(self, program: list[Step]) -> None:
        """Take all steps, wait until everybody has an answer and every kernel rests, and look at what is kept."""
        tasks = []
        for step in program:
            await asyncio.sleep(step.pause)
            tasks.append(asyncio.create_task(self.take(step)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for box in self.boxes:
            await eventually(lambda box=box: self.rests(box), PATIENCE)
        for work in list(self.works.values()):
            if work.what in ("keyed", "watched"):
                await self.look_at(work)
        paths = [each["path"] for each in json.loads((await self.ask("GET", "/api/sessions"))[1])]
        assert len(paths) == len(set(paths)), "a path has two sessions"

    def rests(self, box: str) -> bool:
        """Whether the sandbox has ended, or has a healthy kernel that does nothing, and nobody is connected to it."""
        sandbox = self.service.sandboxes.find(box)
        if sandbox is None:
            return True
        if sandbox.deadline <= time.monotonic() or sandbox.guest.vm not in self.world.driver.alive:
            return False  # its end comes in a moment
        kernel = sandbox.kernel
        assert kernel is not None
        return (
            kernel.state == "idle"
            and not kernel.pending
            and not kernel._tasks
            and not kernel.connections
            and not any(kernel.executions.unfinished())
        )

    async def take(self, step: Step) -> None:
        """Take one step, with a client that may hang up."""
        box = self.boxes[step.box % len(self.boxes)]
        doing = asyncio.create_task(ACTIONS[step.what](self, box, step))
        try:
            await asyncio.wait({doing}, timeout=step.patience)
            if doing.done():
                doing.result()
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        assert len(self.world.driver.alive) <= len(self.service.sandboxes.places) <= PLACES

    async def ask(
        self, method: str, path: str, body: Any = None, *headers: str, data: bytes = b""
    ) -> tuple[int, bytes]:
        """One request on a connection of its own, which is closed if the task is cancelled. The answer ends with it."""
        data = data if body is None else json.dumps(body).encode()
        lines = (f"{method} {path} HTTP/1.0", f"Authorization: Bearer {self.service.key}", *headers)
        return await raw(self.service, "\n".join([*lines, f"Content-Length: {len(data)}"]), data)

    # -- work

    def work(self, box: str, what: str, key: int | None = None) -> Work:
        """The work that is asked for: new work, or the execution of that key."""
        self.count += 1
        name = f"{self.world.played}.{self.count}" if key is None else f"{self.world.played}.{box}.{key}"
        work = self.works.setdefault(name, Work(name, box, what))
        work.asked += 1
        work.ended = math.inf
        return work

    def hear(self, work: Work, ending: str, error: str | None = None) -> None:
        work.told.append((ending, error))
        if len(work.told) == work.asked:
            work.ended = time.monotonic()

    def cell(self, work: Work, which: int) -> dict[str, Any]:
        """A cell's fields."""
        note = f"with open({str(self.world.ledger)!r}, 'a') as ledger: ledger.write('{{}} {work.name}\\n')\n"
        body, timeout = {
            "exit": ("import os; os._exit(3)", 60),
            "overdue": ("import time; time.sleep(2)", 0.15),
            "stubborn": ("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)", 0.15),
        }.get(work.what, (f"import time; time.sleep({SLEEPS[which]})", 60))
        return {"code": note.format("start") + body + "\n" + note.format("end"), "timeout": timeout}

    async def execute(self, box: str, step: Step) -> None:
        """A cell over REST: collected, as lines, or under a key, which attaches to the cell of that key."""
        key = step.which if step.what == "keyed" else None
        work = self.work(box, step.what, key)
        headers = [f"Idempotency-Key: {work.name}"] if key is not None else []
        headers += ["Accept: application/x-ndjson"] if step.what == "lines" else []
        causes = [] if step.what not in ("exit", "stubborn") else [Cause("restart", box)]
        self.causes += causes
        self.heard(work, *await self.ask("POST", f"/sandboxes/{box}/execute", self.cell(work, step.which), *headers))
        for cause in causes:
            cause.until = time.monotonic()

    def heard(self, work: Work, status: int, body: bytes) -> None:
        """Take note of an answer, which is a cell, its events, or an error."""
        events = [json.loads(line) for line in body.splitlines()]
        if status == 404:
            self.hear(work, "refused")
        elif status != 200:
            assert (status, events[0]["error"]) == (502, "sandbox_died"), events
            self.hear(work, events[0]["outcome"], "sandbox_died")
        elif "type" not in events[0]:
            assert len(events) == 1
            self.hear(work, events[0]["outcome"], code_of(events[0]["error"]))
        else:
            self.hear_events(work, events)

    def hear_events(self, work: Work, events: list[dict[str, Any]]) -> None:
        kinds = Counter(event["type"] for event in events)
        assert kinds["end"] == 1, events
        assert kinds["error"] <= 1, events
        assert events[-1]["type"] == "end", events
        error = next((event["error"] for event in events if event["type"] == "error"), None)
        self.hear(work, events[-1]["outcome"], code_of(error))

    async def attach(self, box: str, step: Step) -> None:
        """The events of the execution of a key, if it is known yet."""
        work = self.works.get(f"{self.world.played}.{box}.{step.which}")
        if work is not None:
            path = f"/sandboxes/{box}/executions/{work.name}"
            status, body = await self.ask("GET", path, None, "Accept: application/x-ndjson")
            if status != 404:  # it has not come yet, or the sandbox has ended
                work.asked += 1
                self.heard(work, status, body)

    async def look_at(self, work: Work) -> None:
        """See that an execution is known as what it was told to be, as long as its sandbox lives."""
        status, body = await self.ask("GET", f"/sandboxes/{work.box}/executions/{work.name}")
        if status == 404:
            if self.service.sandboxes.find(work.box) is not None:
                assert {ending for ending, _ in work.told} <= {"refused"}, "an execution was forgotten"
                assert work.name not in self.world.ledger.read_text(), "an execution that nobody knows has run"
            return
        told = json.loads(body)
        assert (status, told["retrySafe"]) == (200, told["status"] != "unknown"), told
        assert told["status"] == told["result"]["outcome"], told
        work.told.append((told["status"], code_of(told["result"]["error"])))

    async def watch(self, box: str, step: Step) -> None:
        """A cell over the agents' stream, which tells the end of every cell that it has taken before it closes."""
        work = self.work(box, step.what)
        try:
            async with agent(self.service, box) as client:
                await client.send("execute", id=work.name, **self.cell(work, step.which))
                events: list[dict[str, Any]] = []
                while not events or events[-1]["type"] not in ("end", "refused"):
                    events += [event for event in [await client.receive()] if event.get("id") == work.name]
        except (ConnectionClosed, InvalidStatus):
            self.hear(work, "refused")
            return
        if events[-1]["type"] == "refused":
            assert events[-1]["error"]["code"] == "sandbox_died", events
            self.hear(work, "not_started", "sandbox_died")
        else:
            self.hear_events(work, events)

    async def command(self, box: str, step: Step) -> None:
        work = self.work(box, step.what)
        note = f"echo {{}} {work.name} >> {self.world.ledger}"
        script = f"{note.format('start')}; sleep {SLEEPS[step.which]}; {note.format('end')}"
        body = {"cmd": "sh", "args": ["-c", script]}
        status, answer = await self.ask("POST", f"/sandboxes/{box}/processes", body)
        if status == 200:
            assert json.loads(answer)["exitCode"] == 0, answer
            self.hear(work, "finished")
        else:
            self.heard(work, status, answer)

    # -- what may come in between

    async def control(self, box: str, step: Step) -> None:
        """A restart or an interrupt."""
        cause = Cause(step.what, box)
        self.causes.append(cause)
        status, body = await self.ask("POST", f"/api/kernels/{kernel_id(box)}/{step.what}")
        cause.until = time.monotonic()
        assert status in (200, 204) or self.has_ended(box, status, body), (status, body)

    def has_ended(self, box: str, status: int, body: bytes) -> bool:
        """Whether an answer tells of the end of a sandbox that somebody has ended."""
        told = (status, json.loads(body)["error"]) in ((404, "not_found"), (502, "sandbox_died"))
        return told and any(each.box == box and each.what == "end" for each in self.causes)

    async def create(self, box: str, step: Step) -> None:
        status, body = await self.ask("POST", "/sandboxes", {"templateID": "code_interpreter"})
        if status == 201:
            self.boxes.append(json.loads(body)["sandboxID"])
        else:
            self.refused(status, body)

    def refused(self, status: int, body: bytes) -> None:
        """No sandbox was made, because there was no place, or because somebody ended it."""
        assert (status, json.loads(body)["error"]) in ((503, "host_full"), (409, "conflict")), body
        assert status == 503 or any(each.what == "end" for each in self.causes), body

    async def session(self, box: str, step: Step) -> None:
        path = f"{self.world.played}.{step.which}"
        status, body = await self.ask("POST", "/api/sessions", {"path": path})
        if status != 201:
            self.refused(status, body)
            return
        self.sessions[path].add(json.loads(body)["id"])

    async def delete(self, box: str, step: Step) -> None:
        """Delete one of the sandboxes that are listed, or end the one that has its turn."""
        listed = [each["sandboxID"] for each in json.loads((await self.ask("GET", "/sandboxes"))[1])]
        chosen = listed[step.which % len(listed)] if listed else box
        self.causes.append(Cause("end", chosen))
        status, _ = await self.ask("DELETE", f"/sandboxes/{chosen}")
        assert status in (204, 404)
        assert status == 404 or chosen not in {each.id for each in self.service.sandboxes.places}

    async def expire(self, box: str, step: Step) -> None:
        self.causes.append(Cause("end", box))
        if (sandbox := self.service.sandboxes.find(box)) is not None:
            sandbox.set_timeout(0)
            await sandbox.gone()

    async def trouble(self, box: str, step: Step) -> None:
        """For a moment the database can't be written."""
        store = self.service.store
        assert isinstance(store, Troubled)
        store.hangs = step.which == 0
        store.until = time.monotonic() + 0.3

    async def die(self, box: str, step: Step) -> None:
        self.causes.append(Cause("end", box))
        if (sandbox := self.service.sandboxes.find(box)) is not None:
            vm = sandbox.guest.vm
            if vm in self.world.driver.alive:
                os.kill(vm.pid, signal.SIGKILL)
            await sandbox.gone()

    # -- the rest

    async def list_boxes(self, box: str, step: Step) -> None:
        status, body = await self.ask("GET", "/sandboxes")
        listed = [each["sandboxID"] for each in json.loads(body)]
        assert status == 200
        assert len(listed) == len(set(listed)) <= PLACES

    async def upload(self, box: str, step: Step) -> None:
        """A file, which is stored as a whole or not at all."""
        self.count += 1
        path, content = f"file.{self.world.played}.{step.which}", f"{self.count}.".encode() * 10_000
        self.uploads[f"{box}/{path}"].add(content)
        part = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\n\r\n'.encode()
        data = part + content + b"\r\n--x--\r\n"
        kind = "Content-Type: multipart/form-data; boundary=x"
        status, body = await self.ask("POST", f"/sandboxes/{box}/files", None, kind, data=data)
        assert status == 200 or self.has_ended(box, status, body), (status, body)

    async def download(self, box: str, step: Step) -> None:
        path = f"file.{self.world.played}.{step.which}"
        status, body = await self.ask("GET", f"/sandboxes/{box}/files?path={path}")
        if status == 200:
            assert body in self.uploads[f"{box}/{path}"], "a file is none of those that were uploaded"
        else:
            assert status == 404 or self.has_ended(box, status, body), (status, body)

    # -- the model

    def check(self) -> None:
        """Compare what everybody was told with the ledger, and with what came in between."""
        ledger: dict[str, list[str]] = defaultdict(list)
        running: dict[str, str] = {}
        for line in self.world.ledger.read_text().splitlines():
            word, name = line.split()
            ledger[name].append(word)
            work = self.works.get(name)
            if work is not None and work.what != "command":
                if word == "end":
                    assert running.get(work.box) == name, "two cells of one kernel ran at the same time"
                running[work.box] = name
        for work in self.works.values():
            self.check_work(work, ledger[work.name])
        if not any(each.what == "end" for each in self.causes):
            assert all(len(names) == 1 for names in self.sessions.values()), "a path got two sessions"

    def check_work(self, work: Work, noted: list[str]) -> None:
        assert noted in ([], ["start"], ["start", "end"]), f"{work.name} ran twice"
        told = {each for each in work.told if each[0] != "refused"}
        assert len(told) <= 1, f"{work.name} has several outcomes"
        if not told and len(work.told) == work.asked:
            assert self.had(work, "end"), f"{work.name} was refused for no reason"
            assert noted == [], f"{work.name} was refused, and ran"
        for ending, error in told:
            match ending, error:
                case "finished", None:
                    assert noted == ["start", "end"], f"{work.name} has not finished"
                case "finished", "KeyboardInterrupt":
                    assert self.had(work, "interrupt"), f"{work.name} was interrupted by nobody"
                case "finished" | "unknown", "exec_timeout":
                    assert work.what in ("overdue", "stubborn"), f"{work.name} had time left"
                case "unknown", "kernel_restarted":
                    assert self.had(work, "restart"), f"{work.name} lost its kernel for no reason"
                case "unknown", "sandbox_died":
                    assert self.had(work, "end"), f"{work.name} lost its sandbox for no reason"
                case "not_started", "sandbox_died":
                    assert self.had(work, "end"), f"{work.name} lost its sandbox for no reason"
                    assert noted == [], f"{work.name} has started"
                case _:
                    pytest.fail(f"{work.name} got an unforeseen end: {ending}, {error}")

    def had(self, work: Work, what: str) -> bool:
        """Whether such a thing happened to its sandbox while the work was under way."""
        return any(
            each.box == work.box and each.what == what and each.began <= work.ended and each.until >= work.began
            for each in self.causes
        )

    def story(self) -> str:
        """What happened, for the reader of a failure."""
        begin = min([each.began for each in (*self.works.values(), *self.causes)], default=0)
        lines = [(each.began, f"{each.what} {each.name} of {each.box}: {each.told}") for each in self.works.values()]
        lines += [(each.began, f"{each.what} of {each.box} until {each.until - begin:.3f}") for each in self.causes]
        ledger = [line for line in self.world.ledger.read_text().splitlines() if line.split()[1] in self.works]
        return "\n".join([*(f"{began - begin:.3f} {line}" for began, line in sorted(lines)), f"ledger: {ledger}"])


def code_of(error: dict[str, Any] | None) -> str | None:
    return None if error is None else error.get("code") or error["name"]


ACTIONS: dict[str, Callable[[Run, str, Step], Awaitable[None]]] = {
    **dict.fromkeys("cell lines keyed exit overdue stubborn".split(), Run.execute),
    **dict.fromkeys("restart interrupt".split(), Run.control),
    "watched": Run.watch,
    "command": Run.command,
    "attach": Run.attach,
    "list": Run.list_boxes,
    "upload": Run.upload,
    "download": Run.download,
    "create": Run.create,
    "delete": Run.delete,
    "expire": Run.expire,
    "die": Run.die,
    "trouble": Run.trouble,
    "session": Run.session,
}


@pytest.mark.timeout(600 + 10 * PROGRAMS)
async def test_random_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever overlaps, work ends once and truly, and places, processes, tasks, memory and records come back."""
    monkeypatch.setattr("tests.fakes.Store", Troubled)
    monkeypatch.setattr("kernel_gateway.sandbox.store.RETRY", (0.02, 0.1))
    driver = Counted(tmp_path)
    (tmp_path / "ledger").touch()
    async with serving(tmp_path, driver, max_sandboxes=PLACES) as service:
        world = World(service, driver, tmp_path)
        loop = asyncio.get_running_loop()

        @settings(
            max_examples=PROGRAMS,
            derandomize=PROGRAMS == SHORT,
            suppress_health_check=list(HealthCheck),
        )
        @given(PROGRAM)
        @example([Step(0.0, "cell", which=2), Step(0.01, "interrupt"), Step(0.01, "interrupt")])
        @example([Step(0.0, "cell", which=2), Step(0.01, "restart")])
        @example([*[Step(0.01, "cell", which=2)] * 3, Step(0.1, "delete"), Step(0.2, "cell")])
        @example([Step(0.0, "session", patience=0.05), Step(0.2, "delete")])
        @example([Step(0.0, "session"), Step(0.01, "session")])
        def play(program: list[Step]) -> None:
            asyncio.run_coroutine_threadsafe(world.play(program), loop).result()

        await loop.run_in_executor(None, play)  # in a thread, because hypothesis calls it without `await`
        await world.empty()
        assert {"finished", "unknown", "not_started", "refused"} <= set(world.endings)


# -- machines that can be saved

SAVING_PROGRAMS = int(os.environ.get("SAVING_PROGRAMS", "60"))
ANSWERS = {
    "cell": {200, 404, 409, 502, 503},
    "keyed": {200, 404, 409, 502, 503},
    "processes": {200, 404, 409, 502, 503},
    "pause": {204, 404, 409, 502, 507},
    "resume": {201, 404, 409, 502, 503},
    "connect": {200, 201, 404, 409, 502, 503},
    "snapshots": {201, 404, 409, 502, 507},
    "start": {201, 400, 404, 409, 503},
    "fork": {201, 404, 409, 502, 503, 507},
    "checkpoints": {201, 404, 409, 502, 507},
    "restore": {204, 404, 409, 502, 503},
    "delete": {204, 404},
}
"""What may be answered to each operation, whatever else goes on."""
FOLDERS = ("paused", "snapshots", "checkpoints")
MOVE = st.tuples(
    st.sampled_from([*ANSWERS, "cell", "keyed", "checkpoints", "restore", "restore", "expire", "die", "fail"]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.0, 0.01, 0.05]),
    st.sampled_from([None, None, None, 0.01]),
)


class Life:
    """One life of a server whose machines can be saved. `told` is what was said of each cell, by its name."""

    def __init__(self, service: Service, driver: SavingDriver, directory: Path, boxes: list[str]) -> None:
        self.service = service
        self.driver = driver
        self.directory = directory
        self.boxes = boxes
        self.told: dict[str, str] = {}
        self.keyed: dict[str, str] = {}

    async def take(self, what: str, box: str, number: int, patience: float | None) -> None:
        """Do one thing with a sandbox. The client may hang up."""
        sandbox = self.service.sandboxes.find(box)
        if what == "fail":
            self.driver.script.save_error = None if self.driver.script.save_error else NoSpace("full")
        elif what == "expire":
            if sandbox is not None and sandbox.state is State.RUNNING:
                sandbox.set_timeout(0)
        elif what == "die":
            if sandbox is not None and sandbox._guest is not None and isinstance(sandbox._guest.vm, FakeVm):
                sandbox._guest.vm.die("killed by a test")
        else:
            with suppress(HTTPTimeoutError):
                await self.ask(what, box, number, patience)

    async def ask(self, what: str, box: str, number: int, patience: float | None) -> None:
        method, path, body = "POST", f"/sandboxes/{box}/{what}", dict[str, Any]()
        headers = {}
        if what in ("cell", "keyed"):
            name = f"cell{len(self.told)}"
            self.told[name] = "unknown"
            path, sleep = f"/sandboxes/{box}/execute", (0.0, 0.01, 0.03, 0.1)[number]
            body = {"code": f"note('start {name}')\ntime.sleep({sleep})\nnote('end {name}')"}
            if what == "keyed":
                headers, self.keyed[name] = {"Idempotency-Key": name}, box
        elif what == "processes":
            body = {"cmd": "sleep", "args": ["0.02"]}
        elif what == "start":
            known = self.service.sandboxes.snapshots.of(self.service.owner)
            path, body = "/sandboxes", {"templateID": known[0].id if known else "none", "checkpoints": "cell"}
        elif what == "restore":
            path = f"/sandboxes/{box}/checkpoints/{number}/restore"
        elif what == "delete":
            method, path = "DELETE", f"/sandboxes/{box}"
        answer = await self.service.call(method, path, body, headers=headers, timeout=patience or 30)
        assert answer.code in ANSWERS[what], (what, answer.code, answer.body)
        if what in ("cell", "keyed"):
            told = json.loads(answer.body)
            self.told[name] = told.get("outcome") or "refused"
        elif answer.code == 201 and what == "start":
            self.boxes.append(json.loads(answer.body)["sandboxID"])
        elif answer.code == 201 and what == "fork":
            self.boxes += [each["sandbox"]["sandboxID"] for each in json.loads(answer.body) if "sandbox" in each]

    @property
    def paused(self) -> set[str]:
        return {each.id for each in self.service.sandboxes if each.state is State.PAUSED}

    def is_spent(self, box: str) -> bool:
        """Whether a paused fake has ended. The server whose death is played has resumed it after that moment."""
        guest = self.driver.saved[(self.directory / "paused" / box / "machine").read_text()]
        return isinstance(guest, FakeGuest) and guest.kernel.has_ended

    def rests(self) -> bool:
        """Whether every sandbox is in one legal state, and machines, places, files and records are those of it."""
        sandboxes = self.service.sandboxes
        running = {each for each in sandboxes if each.state is State.RUNNING}
        kept = [{path.name for path in (self.directory / name).iterdir()} for name in FOLDERS]
        return (
            len(running) + len(self.paused) == len(sandboxes)
            and not any(each.is_over() for each in running)
            and all(each.kernel is not None and not each.kernel.pending for each in running)
            and not sandboxes.checkpoints._following
            and {*sandboxes.places} == running
            and len(self.driver.alive) == len(running)
            and kept[0] == self.paused == set(self.service.store.paused())
            and kept[1] == {each.id for each in sandboxes.snapshots.of(self.service.owner)}
            and kept[2] == {f"{box.id}.{each.number}" for box in sandboxes for each in box.timeline.kept}
        )

    async def settle(self) -> None:
        """Wait for rest, let all sandboxes run in turn, and see that each works."""
        self.driver.script.save_error = None
        await eventually(self.rests, 10)
        for sandbox in list(self.service.sandboxes):
            answer = await self.service.call("POST", f"/sandboxes/{sandbox.id}/connect", {})
            assert answer.code in (200, 201, 503), answer.body
            if answer.code != 503:  # all places are taken
                await self.service.execute(sandbox.id, "1")
                for mark in sandbox.timeline.kept[:1]:
                    path = f"/sandboxes/{sandbox.id}/checkpoints/{mark.number}/restore"
                    assert (await self.service.call("POST", path)).code == 204
        await eventually(self.rests, 10)

    async def check(self, *, at_rest: bool) -> None:
        """Compare what was told of cells with what they have noted. Some may still run if it is not `at_rest`."""
        for name, box in self.keyed.items():
            answer = await self.service.call("GET", f"/sandboxes/{box}/executions/{name}")
            if answer.code == 200:
                status = json.loads(answer.body)["status"]
                if status == "running" and not at_rest:
                    continue
                assert status in ("finished", "unknown", "not_started"), (name, status)
                assert self.told[name] in (status, "unknown"), (name, status, self.told[name])
                self.told[name] = status
        for name, told in self.told.items():
            noted = [note for note in self.driver.script.notes if note.split()[1] == name]
            assert noted in ([], [f"start {name}"], [f"start {name}", f"end {name}"]), f"{name} ran twice"
            assert told != "finished" or len(noted) == 2, f"{name} has not finished"
            assert told not in ("not_started", "refused") or not noted, f"{name} has started"

    async def empty(self) -> None:
        """Delete everything, and see that nothing is left."""
        for sandbox in list(self.service.sandboxes):
            await self.service.sandboxes.kill(sandbox)
        for snapshot in self.service.sandboxes.snapshots.of(self.service.owner):
            await self.service.sandboxes.snapshots.delete(snapshot)
        await eventually(self.rests, 10)
        assert not any([*(self.directory / name).iterdir()] for name in FOLDERS)
        await self.service.store.flush(PATIENCE)
        with closing(sqlite3.connect(self.service.store.path)) as db:
            assert db.execute("SELECT id FROM sandboxes WHERE ended IS NULL").fetchall() == []
        await eventually(lambda: self.service.sandboxes.held.size == 0, 10)


def left_by(store: Path, target: Path) -> None:
    """Copy what a server would leave on disk if it were killed at this moment. Its threads write nothing meanwhile."""
    target.mkdir()
    with closing(sqlite3.connect(store)) as db:
        db.execute("BEGIN IMMEDIATE")
        # What is just being deleted may be copied in part.
        files = [
            str(path) for path in store.parent.iterdir() if path.name in FOLDERS or path.name.startswith(store.name)
        ]
        subprocess.run(["cp", "-a", *files, str(target)], check=False, stderr=subprocess.DEVNULL)


@settings(max_examples=SAVING_PROGRAMS, derandomize=SAVING_PROGRAMS == 60, suppress_health_check=list(HealthCheck))
@given(
    program=st.lists(MOVE, min_size=2, max_size=12),
    auto=st.booleans(),
    end=st.sampled_from(["", "stopped", "killed"]),
)
def test_random_programs_of_saved_machines(
    tmp_path_factory: pytest.TempPathFactory, program: list[tuple[str, int, float, float | None]], auto: bool, end: str
) -> None:
    """R26: whatever overlaps, answers are documented, work ends once and truly, and all comes back in one legal state.

    Then the server is stopped or killed in the middle. The next one on its data directory has all that was promised.
    """

    async def play() -> None:
        directory = tmp_path_factory.mktemp("program") / "data"
        directory.mkdir()
        driver = SavingDriver()
        driver.script = Script(save_delay=0.02, start_delay=0.02)
        options: dict[str, Any] = {"max_sandboxes": 4, "checkpoint_bytes": 10**6}
        async with serving(directory, driver, pause_at_close=end == "stopped", **options) as service:
            boxes = [
                await service.create(autoResume={"enabled": auto}, autoPause=auto, checkpoints=each)
                for each in (None, "cell")
            ]
            life = Life(service, driver, directory, boxes)
            tasks = []
            for what, number, wait, patience in program:
                chosen = boxes[number % len(boxes)]
                tasks.append(asyncio.create_task(life.take(what, chosen, number, patience)))
                await asyncio.sleep(wait)
            if end == "killed":
                left_by(service.store.path, directory.with_name("left"))
            await asyncio.gather(*tasks)
            if end == "":
                await life.settle()
            await life.check(at_rest=end == "")
            if end == "":
                await life.empty()
        if end:
            place = directory if end == "stopped" else directory.with_name("left")
            service_options = {**options, "max_sandboxes": 20}
            with closing(Store(place / "cellvm.db")) as store:
                store.end_all("host_restart")
            async with serving(place, driver, **service_options) as service:
                life = Life(service, driver, place, [])
                for box in life.paused:
                    if end == "killed" and life.is_spent(box):
                        await service.sandboxes.kill(service.sandboxes.get(service.owner, box))
                await life.settle()
                await life.empty()
        await driver.close()

    asyncio.run(play())
