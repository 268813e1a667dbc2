"""Promise R13: a sandbox with a lying agent and kernel does no harm to another owner's honest one."""

import asyncio
import json
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from guest_agent import wire
from guest_agent.wire import FrameType
from tests.api.clients import agent, channels
from tests.fakes import FakeDriver, FakeGuest, Script, Service, Stream, own_frame, resident, serving

PROGRAMS = 500
MALICE, SECRET = "malice", "secret-of-the-other"
DOCUMENTED = {200, 204, 400, 404, 409, 502}
AT_ONCE = 20
TIME_SCALE = 0.05
"""Factor for all seconds that a guest is given."""
PATIENCE = 10.0
"""Seconds within which every request must be answered."""

KINDS = (
    "status stream display_data update_display_data execute_result execute_input execute_reply error clear_output "
    "input_request comm_open comm_msg comm_close shutdown_reply interrupt_reply kernel_info_reply debug_event x"
).split()
GARBAGE = [b"", b"null", b"[]", b"7", b"{", b"\xff\xfe", b'{"a":' * 3000, b'{"msg_id": 3}', b'{"cellvm": 5}', b"1e999"]
CONTENTS = [
    {"execution_state": "idle"}, {"execution_state": "busy"}, {"execution_state": "dead"}, {"execution_state": [1]},
    {"name": "stdout", "text": MALICE}, {"name": 5, "text": {}}, {"name": "stdout", "text": "\ud800"},
    {"data": {"text/plain": MALICE}, "metadata": {}, "execution_count": -1}, {"data": 5},
    {"ename": MALICE, "evalue": {}, "traceback": [1, None]}, {"prompt": MALICE, "password": "yes"}, {"wait": MALICE},
    {"status": "ok", "execution_count": 1e308}, {"status": "error"}, {"status": "aborted"}, {"restart": False},
    {"code": MALICE, "execution_count": "x"}, {"comm_id": "c", "target_name": MALICE, "data": {}},
]  # fmt: skip


def part(value: Any) -> bytes:
    return json.dumps(value).encode()


HEADERS = st.builds(
    lambda kind, session, name: part({"msg_id": name, "msg_type": kind, "session": session, "username": MALICE}),
    st.sampled_from(KINDS),
    st.sampled_from(["fake", "mine", "other", ""]),
    st.sampled_from(["m", "mine", "other", ""]),
)
MESSAGES = st.fixed_dictionaries(
    {
        "stream": st.sampled_from([wire.KERNEL, wire.KERNEL, wire.KERNEL_CONTROL]),
        "channel": st.sampled_from([b"iopub", b"iopub", b"shell", b"stdin", b"control", b"hb", b"", b"\xff"]),
        "header": HEADERS | st.sampled_from(GARBAGE),
        "parent": st.sampled_from(["mine", "other", "over", "none", b"[]", b"{", b"\xff"]),
        "metadata": st.sampled_from([b"{}", b'{"cellvm": {"seq": 99999999}}', b'{"cellvm":{', b" { } ", *GARBAGE]),
        "content": st.sampled_from(CONTENTS).map(part) | st.sampled_from(GARBAGE),
        "buffers": st.lists(st.binary(max_size=10), max_size=2),
        "times": st.sampled_from([1, 1, 1, 2, 50]),
    }
).map(lambda fields: ("message", fields))
NUMBERS = st.sampled_from([0, 1, 3, -1, 2**31, -(2**63), 2**63 - 1])
EVENTS = st.builds(
    lambda state, reason, code, signal: (
        "event", wire.KernelStatus(state=state, reason=reason, exit_code=code, signal=signal)
    ),
    st.sampled_from(["starting", "idle", "restarting", "dead", "", MALICE]),
    st.sampled_from(["", MALICE, "\0\r\n", "x" * 5000]),
    NUMBERS,
    NUMBERS,
)  # fmt: skip
PAYLOADS = st.sampled_from([b"", b"\0\0\0\1", b"\xff\xff\xff\xff", b"\x80", b"\xc0", MALICE.encode(), bytes(1000)])
STREAMS = st.sampled_from([0, 1, 2, 3, 16, 17, 18, 20, 30, 2**32 - 1])
FRAMES = st.builds(
    lambda kind, stream, payload, flags: ("frame", own_frame(kind, stream, payload, flags)),
    st.sampled_from(list(FrameType)), STREAMS, PAYLOADS, st.sampled_from([0, 1, 2, wire.MORE, 0xFFFF]),
)  # fmt: skip
BODIES = st.sampled_from(
    [
        wire.Done(),
        wire.Exited(code=-5),
        wire.Failure(code="failed", message=MALICE),
        wire.Failure(code=MALICE, message=""),
    ]
)
ANSWERS = st.builds(lambda stream, body: ("answer", (stream, body)), STREAMS, BODIES)
DEEDS = st.sampled_from([("deed", name) for name in ("mute", "stall", "cut", "die", "nonsense", "unfinished message")])
COMMON = MESSAGES | MESSAGES | MESSAGES | EVENTS | FRAMES | ANSWERS
STEPS = st.lists(COMMON, min_size=1, max_size=8) | st.builds(
    lambda steps, last: [*steps, last], st.lists(COMMON, max_size=5), DEEDS
)


def programs() -> list[list[Any]]:
    """Random programs. They are made first, because Hypothesis itself can't run many at a time."""
    found: list[list[Any]] = []

    @settings(max_examples=PROGRAMS, suppress_health_check=list(HealthCheck))
    @given(STEPS)
    def collect(steps: list[Any]) -> None:
        found.append(steps)

    collect()
    return found


class Side:
    """One owner's sandbox."""

    def __init__(self, service: Service, key: str) -> None:
        self.service = service
        self.key = key
        self.box = self.kernel = ""

    async def end(self) -> None:
        """Delete the sandbox, if there is one."""
        if self.box:
            assert (await self.ask("DELETE", "/sandboxes/{box}"))[0] in (204, 404)

    async def begin(self) -> None:
        """Make a new sandbox in place of the old one."""
        await self.end()
        status, answer = await self.ask("POST", "/api/kernels", {})
        assert status == 201, answer
        self.kernel, self.box = (json.loads(answer)[name] for name in ("id", "sandbox_id"))

    @property
    def guest(self) -> FakeGuest:
        return self.service.sandboxes._sandboxes[self.box].guest.vm.guest  # type: ignore[attr-defined]

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        answer = await self.service.call(method, path.format(box=self.box, kernel=self.kernel), body, key=self.key)
        return answer.code, answer.body


async def say_nothing(*_: Any) -> None:
    """Ignore a request. This replaces any handler of a guest."""
    await asyncio.sleep(60)


async def play(guest: FakeGuest, steps: list[Any], parents: dict[str, bytes]) -> None:
    """Let a guest do a program's steps, beside its honest work."""
    with suppress(OSError):  # the guest may be cut off for this
        for kind, what in steps:
            if kind == "message":
                parts = [what["channel"], what["header"], parents.get(what["parent"], what["parent"])]
                parts += [what["metadata"], what["content"], *what["buffers"]]
                frames = [b"".join(frame) for frame in wire.chunk(what["stream"], wire.pack_parts(parts))]
                await guest.send(b"".join(frames) * what["times"])
            elif kind == "event":
                await guest.send(wire.encode(FrameType.EVENT, wire.EVENTS, what))
            elif kind == "frame":
                await guest.send(what)
            elif kind == "answer":
                stream, body = what
                failed = isinstance(body, wire.Failure)
                await guest.send(wire.encode(FrameType.FAILURE if failed else FrameType.REPLY, stream, body))
            elif what == "mute":
                guest.script = Script(handlers=dict.fromkeys([wire.Interrupt, wire.Restart], say_nothing))
                guest.kernel.publish = say_nothing  # type: ignore[method-assign]
            elif what == "stall":
                guest.stall()
            elif what == "cut":
                guest.cut()
            elif what == "die":
                guest.die("killed by a test")
            elif what == "nonsense":
                await guest.send(MALICE.encode() * 100)
            elif what == "unfinished message":
                await guest.send(own_frame(FrameType.DATA, wire.KERNEL, bytes(wire.CHUNK), wire.MORE))
            await asyncio.sleep(0)


async def overhear(socket: ClientConnection, heard: bytearray) -> None:
    """Collect all bytes that a connection gets, without decoding them."""
    with suppress(ConnectionClosed):
        while True:
            frame = await socket.recv()
            heard += frame.encode("utf-8", "replace") if isinstance(frame, str) else frame


async def attack(bad: Side, good: Side, steps: list[Any]) -> bytes:
    """Play one program of the bad side while both sides' clients work. Return what the bad side's clients heard."""
    await bad.begin()
    service, guest, heard = bad.service, bad.guest, bytearray()
    async with AsyncExitStack() as stack:
        sockets = [
            (await stack.enter_async_context(opening)).socket
            for opening in (
                channels(service, bad.kernel, "mine", key=bad.key),
                channels(service, bad.kernel, "two", v1=False, key=bad.key),
                agent(service, bad.box, key=bad.key),
            )
        ]
        listening = [asyncio.create_task(overhear(socket, heard)) for socket in sockets]
        honest = await stack.enter_async_context(channels(service, good.kernel, "other", key=good.key))
        events = await stack.enter_async_context(agent(service, good.box, key=good.key))
        code = f'print("{SECRET}"); time.sleep(0.01); 6 * 7'
        running = await honest.start(code)
        fields = {"msg_type": "execute_request", "session": "mine", "username": "u", "version": "5.4"}
        own = part({"msg_id": "mine", **fields})
        await sockets[1].send(json.dumps({"header": json.loads(own), "content": {"code": "time.sleep(0.02); 1"}}))
        other = part({"msg_id": running, **fields, "session": "other"})
        parents = {"mine": own, "other": other, "over": part({"msg_id": "over", **fields}), "none": b"{}"}
        requests = [
            bad.ask("POST", "/sandboxes/{box}/execute", {"code": f'time.sleep(0.01); "{MALICE}"', "timeout": 0.2}),
            bad.ask("POST", "/sandboxes/{box}/processes", {"cmd": "echo", "args": ["x"], "timeout": 0.2}),
            bad.ask("GET", "/sandboxes/{box}/filesystem/list?path=/"),
            bad.ask("POST", "/api/kernels/{kernel}/interrupt"),
            bad.ask("GET", "/api/kernels/{kernel}/journal"),
            bad.ask("GET", "/api/kernels/{kernel}"),
            good.ask("POST", "/sandboxes/{box}/execute", {"code": code}),
            good.ask("GET", "/api/kernels/{kernel}/journal"),
        ]
        asking = [asyncio.create_task(request) for request in requests]
        await play(guest, steps, parents)
        await asyncio.wait(asking[:1], timeout=0.5)
        if not asking[0].done():  # it waits as long as the sandbox lives for a cell that still runs, as the kernel says
            await bad.end()
        _, hung = await asyncio.wait(asking, timeout=PATIENCE)
        assert not hung, f"requests {[n for n, task in enumerate(asking) if task in hung]} hang"
        answers = [task.result() for task in asking]
        answer, result = await honest.answer(running), await events.run('"end"')
        assert (answer.text, answer.value, result[-1]["type"]) == (f"{SECRET}\n", "42", "end")
        assert {code for code, _ in answers[:-2]} <= DOCUMENTED, answers
        assert [code for code, _ in answers[-2:]] == [200, 200]
        assert MALICE not in repr(honest.messages) + repr(events.events) + repr(answers[-2:])
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        assert SECRET.encode() not in heard
        assert SECRET not in repr(answers[:-2])
    return bytes(heard)


async def test_r13_programs_of_a_malicious_agent(tmp_path: Path) -> None:
    """No owner gets another's data, each request gets a documented answer, and the log shows no traceback."""
    waiting, heard = programs(), []
    async with serving(tmp_path, FakeDriver(time_scale=TIME_SCALE), max_sandboxes=2 * AT_ONCE) as service:

        async def work() -> None:
            bad, good = Side(service, service.key), Side(service, service.other_key)
            await good.begin()
            while waiting:
                steps = waiting.pop()
                try:
                    heard.append(await attack(bad, good, steps))
                except InvalidStatus as refused:
                    assert refused.response.status_code == 404  # noqa: PT017  the sandbox died before its clients came
                except BaseException as error:
                    error.add_note(f"the program: {steps}")
                    raise

        async with asyncio.TaskGroup() as workers:
            for _ in range(AT_ONCE):
                workers.create_task(work())
    assert not waiting
    assert any(MALICE.encode() in each for each in heard)


async def test_a_kernel_that_never_comes_back(tmp_path: Path) -> None:
    """An agent says `restarting` and nothing after it. Clients that wait for the kernel are told in time."""
    async with serving(tmp_path, FakeDriver(time_scale=0.005)) as service:
        side = Side(service, service.key)
        await side.begin()
        async with channels(service, side.kernel) as client:
            restarting = wire.KernelStatus(state="restarting", reason="said by a test")
            await side.guest.send(wire.encode(FrameType.EVENT, wire.EVENTS, restarting))
            await client.until_state("restarting")
            side.guest.script = Script(handlers={wire.Restart: say_nothing})
            async with asyncio.timeout(PATIENCE):
                status, body = await side.ask("POST", "/sandboxes/{box}/execute", {"code": "1"})
                assert (status, json.loads(body)["error"]) in [(502, "kernel_unavailable"), (502, "guest_unresponsive")]
                assert (await client.run("1")).reply["status"] == "error"


# -- listings


def listed(*names: str, **fields: Any) -> list[wire.Entry]:
    """Entries as an agent may send them."""
    given = {"kind": "file", "size": 0, "mode": 0o644, "owner": "", "group": "", "modified_ns": 0, **fields}
    return [wire.Entry(**{"name": name, "path": f"/{name}", **given}) for name in names]


PAGES: dict[str, list[wire.Entry]] = {
    "the same name for ever": listed("a"),
    "a name twice": listed("a", "a"),
    "names that go down": listed("b", "a"),
    "a name before the one asked for": listed("0"),
    "no name": listed(""),
    "nothing, but more": [],
    "more than asked for": listed(*(f"{number:09}" for number in range(3000))),
}


@pytest.mark.parametrize("page", PAGES)
async def test_a_listing_that_breaks_the_protocol(tmp_path: Path, page: str) -> None:
    """Pages that could go on for ever end the sandbox, with the documented answer."""

    async def lie(stream: Stream, body: wire.ListDir) -> None:
        asked.append(body)
        first = page == "a name before the one asked for" and len(asked) == 1
        await stream.reply(wire.Entries(entries=listed("5") if first else PAGES[page], more=True))

    asked: list[wire.ListDir] = []
    async with serving(tmp_path) as service:
        side = Side(service, service.key)
        await side.begin()
        side.guest.script = Script(handlers={wire.ListDir: lie})
        status, body = await side.ask("GET", "/sandboxes/{box}/filesystem/list?path=/&limit=2500")
        assert (status, json.loads(body)["error"]) == (502, "guest_unresponsive"), body
        assert len(asked) <= 2
        assert (await side.ask("GET", "/sandboxes/{box}"))[0] == 404


async def test_a_listing_without_end(tmp_path: Path) -> None:
    """B6: an agent always has more entries, small or huge ones. The answer is 413 or a page, in bounded memory."""

    async def small(stream: Stream, body: wire.ListDir) -> None:
        first = int(body.after or 10**9) + 1
        names = map(str, range(first, first + min(body.limit, 1000)))
        await stream.reply(wire.Entries(entries=listed(*names), more=True))

    async def huge(stream: Stream, body: wire.ListDir) -> None:
        first = int(body.after[:10] or 10**9) + 1
        names = (str(number) + "x" * 4000 for number in range(first, first + min(body.limit, 50)))
        long = "y" * wire.MAX_TEXT
        await stream.reply(wire.Entries(entries=listed(*names, path=long, target=long), more=True))

    async with serving(tmp_path) as service:
        side = Side(service, service.key)
        await side.begin()
        for lie, entries in ((small, 10_000), (huge, 700)):
            side.guest.script = Script(handlers={wire.ListDir: lie})
            before = resident()
            status, body = await side.ask("GET", "/sandboxes/{box}/filesystem/list?path=/")
            assert (status, json.loads(body)["error"]) == (413, "too_large")
            status, body = await side.ask("GET", "/sandboxes/{box}/filesystem/list?path=/&limit=10000")
            assert (status, len(json.loads(body))) == (200, entries)
            assert resident() - before <= 64 << 20
        assert (await side.ask("GET", "/sandboxes/{box}"))[0] == 200


async def test_a_listing_that_takes_for_ever(tmp_path: Path) -> None:
    """An agent sends one entry at a time, later and later. The whole listing has one deadline."""

    async def slow(stream: Stream, body: wire.ListDir) -> None:
        await asyncio.sleep(0.01)
        await stream.reply(wire.Entries(entries=listed(str(int(body.after or 10**9) + 1)), more=True))

    async with serving(tmp_path, FakeDriver(time_scale=0.01)) as service:
        side = Side(service, service.key)
        await side.begin()
        side.guest.script = Script(handlers={wire.ListDir: slow})
        status, body = await side.ask("GET", "/sandboxes/{box}/filesystem/list?path=/")
        assert (status, json.loads(body)["error"]) == (502, "guest_unresponsive")
