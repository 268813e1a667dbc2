"""Commands that outlive their requests, over HTTP: real programs and terminals first, then what only a fake can do."""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_agent import wire
from kernel_gateway.errors import Conflict, SandboxDied
from kernel_gateway.guest import commands as module
from kernel_gateway.guest.commands import Command, Commands
from kernel_gateway.held import Held
from kernel_gateway.kernel.journal import Gap, Record
from kernel_gateway.sandbox.lifecycle import Event
from tests.api.clients import TIMEOUT
from tests.fakes import Service, Stream, error_of, eventually

MIB = 1024 * 1024
NDJSON = "application/x-ndjson"


class Follower:
    """A client that reads a command's events. `text` is all output so far, `seq` the last number."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.events: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(event.get("text", "") for event in self.events)

    @property
    def seq(self) -> int:
        return int(self.events[-1]["seq"])

    async def receive(self) -> dict[str, Any] | None:
        """The next event; None when the stream is over."""
        line = await asyncio.wait_for(self._reader.readline(), TIMEOUT)
        if not line:
            return None
        self.events.append(json.loads(line))
        return self.events[-1]

    async def until(self, pattern: str, start: int = 0) -> str:
        """Read until the output from place `start` on has the pattern; return that output."""
        while not re.search(pattern, self.text[start:], re.DOTALL):
            try:
                event = await self.receive()
            except TimeoutError:
                event = None
            assert event, f"{pattern!r} is not in {self.text[start:]!r}"
        return self.text[start:]

    async def end(self) -> dict[str, Any]:
        """Read to the end, and return the last event."""
        while await self.receive():
            pass
        assert [event["type"] for event in self.events].count("end") == 1
        assert self.events[-1]["type"] == "end"
        return self.events[-1]


@asynccontextmanager
async def stream(service: Service, method: str, path: str, body: object = None) -> AsyncIterator[Follower]:
    """An answer of events for the time of the block; leaving it earlier is hanging up."""
    content = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"{method} {path} HTTP/1.0\r\nX-API-Key: {service.key}\r\nAccept: {NDJSON}\r\nContent-Length: "
    writer.write(head.encode() + b"%d\r\n\r\n" % len(content) + content)
    try:
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT)
        assert answer.split()[1] in (b"200", b"201"), answer + await reader.read()
        yield Follower(reader)
    finally:
        writer.close()
        await writer.wait_closed()


def attached(service: Service, box: str, name: object, since: int = 0) -> Any:
    return stream(service, "GET", f"/sandboxes/{box}/commands/{name}?since={since}")


async def start(service: Service, box: str, cmd: str, *args: str, **fields: Any) -> Any:
    """A new command's record."""
    answer = await service.call("POST", f"/sandboxes/{box}/commands", {"cmd": cmd, "args": args, **fields})
    assert answer.code == 201, answer.body
    return json.loads(answer.body)


async def shell(service: Service, box: str, script: str, **fields: Any) -> Any:
    return await start(service, box, "bash", "-c", script, **fields)


async def record(service: Service, box: str, name: object) -> Any:
    answer = await service.call("GET", f"/sandboxes/{box}/commands/{name}")
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def over(service: Service, box: str, name: object) -> Any:
    """A command's record when it is over."""
    async with attached(service, box, name) as follower:
        await follower.end()
    return await record(service, box, name)


async def write(service: Service, box: str, name: object, text: str) -> int:
    return (await service.call("POST", f"/sandboxes/{box}/commands/{name}/stdin", {"text": text})).code


async def signal(service: Service, box: str, name: object, number: str) -> int:
    return (await service.call("POST", f"/sandboxes/{box}/commands/{name}/signal", {"signal": number})).code


def is_alive(pid: int) -> bool:
    """Whether there is such a process here that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


# -- records


async def test_a_record(real: Service, real_box: str) -> None:
    """A command is known by pid and tag while it runs and afterwards, with all it was started with."""
    given = {"envVars": {"A": "b"}, "cwd": "/tmp", "tag": "one", "timeout": 60, "stdin": True}
    first = await shell(real, real_box, "echo $A; pwd; read x; exit 3", **given)
    assert is_alive(first["pid"])
    assert first == {
        "pid": first["pid"], "tag": "one", "cmd": "bash", "args": ["-c", "echo $A; pwd; read x; exit 3"],
        "envVars": {"A": "b"}, "cwd": "/tmp", "user": "user", "pty": None, "status": "running", "seq": first["seq"],
        "startedAt": first["startedAt"], "endedAt": None, "exitCode": None, "signal": None, "timedOut": None,
        "error": None,
    }  # fmt: skip
    listed = json.loads((await real.call("GET", f"/sandboxes/{real_box}/commands")).body)
    assert [each["pid"] for each in listed if each["tag"] == "one"] == [first["pid"]]
    async with attached(real, real_box, "one") as follower:
        assert await follower.receive() == {"type": "started", "seq": 0, "pid": first["pid"]}
        await follower.until("b\n/tmp\n")
        assert await write(real, real_box, first["pid"], "x\n") == 204
        end = await follower.end()
    assert (end["outcome"], end["exitCode"], end["timedOut"]) == ("finished", 3, False)
    last = await record(real, real_box, first["pid"])
    assert (last["status"], last["exitCode"], last["error"]) == ("finished", 3, None)
    assert last["startedAt"] <= last["endedAt"]
    assert (await record(real, real_box, "one")) == last


async def test_a_newer_command_takes_a_tag_over(real: Service, real_box: str) -> None:
    """A tag means the newest command that has it."""
    await over(real, real_box, (await shell(real, real_box, "true", tag="two"))["pid"])
    second = await shell(real, real_box, "exit 2", tag="two")
    assert (await over(real, real_box, "two"))["pid"] == second["pid"]


async def test_home_and_directories(real: Service, real_box: str) -> None:
    """Without `cwd` a command runs at home; a relative one begins there. A directory that is missing is refused."""
    home = (await real.run(real_box, "pwd"))["stdout"]
    for cwd in ("~", ".", "~/.", home.strip()):
        assert (await real.run(real_box, "pwd", cwd=cwd))["stdout"] == home
    answer = await real.call("POST", f"/sandboxes/{real_box}/commands", {"cmd": "true", "cwd": "none", "tag": "lost"})
    error = error_of(answer)
    assert (error["error"], error["outcome"]) == ("invalid", "not_started")
    lost = await record(real, real_box, "lost")
    assert (lost["pid"], lost["status"], lost["error"]["code"]) == (None, "not_started", "invalid")
    async with attached(real, real_box, "lost") as follower:
        assert (await follower.end())["outcome"] == "not_started"
    assert [event["type"] for event in follower.events] == ["end"]


async def test_what_can_not_be_run(real: Service, real_box: str) -> None:
    """A missing program is told when it is started, with a terminal too."""
    for pty in (None, {"rows": 10, "cols": 10}):
        answer = await real.call("POST", f"/sandboxes/{real_box}/commands", {"cmd": "frobnicate", "pty": pty})
        error = error_of(answer)
        assert (error["code"], error["error"], error["outcome"]) == (502, "cannot_run", "not_started")
        assert "frobnicate" in error["message"]


async def test_users(real: Service, real_box: str) -> None:
    """Without isolation a command runs as the server's user, and as no other."""
    own = (await real.run(real_box, "id", "-un"))["stdout"].strip()
    for user in ("user", own):
        started = await start(real, real_box, "id", "-un", user=user)
        async with attached(real, real_box, started["pid"]) as follower:
            assert await follower.until("\n") == f"{own}\n"
    answer = await real.call("POST", f"/sandboxes/{real_box}/commands", {"cmd": "id", "user": "daemon"})
    assert (error_of(answer)["error"], error_of(answer)["outcome"]) == ("permission_denied", "not_started")


# -- output


async def test_a_lost_connection_is_continued(real: Service, real_box: str) -> None:
    """A client that attaches again with the last number it has gets every byte once, at any place of the break."""
    script = "for i in $(seq 300); do echo line $i; sleep 0.002; done"
    pid = (await shell(real, real_box, script))["pid"]
    text, seq, breaks = "", 0, 0
    while True:
        async with attached(real, real_box, pid, seq) as follower:
            while (event := await follower.receive()) and event["type"] != "end" and len(follower.events) < 20:
                pass
            text, seq = text + follower.text, follower.seq
            if event is None or event["type"] == "end":
                break
            breaks += 1
    assert text == "".join(f"line {i}\n" for i in range(1, 301))
    assert breaks > 0
    async with attached(real, real_box, pid) as follower:
        await follower.end()
    assert follower.text == text


async def test_two_attachers(real: Service, real_box: str) -> None:
    """Two clients get the same events, and one that comes after the end gets them, too."""
    pid = (await shell(real, real_box, "echo a; echo b >&2; read x; echo c", stdin=True))["pid"]
    async with attached(real, real_box, pid) as one, attached(real, real_box, pid) as two:
        await asyncio.gather(one.until("a.*b|b.*a"), two.until("a.*b|b.*a"))
        await write(real, real_box, pid, "\n")
        await asyncio.gather(one.end(), two.end())
    async with attached(real, real_box, pid) as late:
        await late.end()
    assert one.events == two.events == late.events
    assert {(event["type"], event["text"]) for event in late.events if "text" in event} == {
        ("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c\n"),
    }  # fmt: skip


async def test_server_sent_events(real: Service, real_box: str) -> None:
    """The same events come as server-sent events, which continue after their last id."""
    pid = (await shell(real, real_box, "echo a; echo b >&2"))["pid"]
    await over(real, real_box, pid)
    path = f"/sandboxes/{real_box}/commands/{pid}"
    answer = await real.call("GET", path, headers={"Accept": "text/event-stream", "Last-Event-ID": "1"})
    events = [line for line in answer.body.decode().split("\n\n") if line]
    assert [line.split("\n")[0] for line in events] == ["id: 1", "id: 2", "id: 2"]
    assert [json.loads(line.split("data: ")[1])["type"] for line in events][::2] == ["started", "end"]


async def test_a_slow_client_loses_nothing(real: Service, real_box: str) -> None:
    """A command is held for the only client that reads its output, however slowly it does."""
    async with stream(real, "POST", f"/sandboxes/{real_box}/commands", {"cmd": "seq", "args": ["2000000"]}) as follower:
        await follower.receive()
        while (await record(real, real_box, follower.events[0]["pid"]))["seq"] == 0:
            await asyncio.sleep(0.01)
        end = await follower.end()
    assert end["outcome"] == "finished"
    assert "gap" not in {event["type"] for event in follower.events}
    assert follower.text == "".join(f"{i}\n" for i in range(1, 2_000_001))


async def test_nobody_attached(real: Service, real_box: str) -> None:
    """Output that nobody reads does not hold a command. The newest is kept, and readers are told of what is not."""
    pid = (await start(real, real_box, "seq", "3000000"))["pid"]
    commands = real.sandboxes.get(real.owner, real_box).guest.commands
    command = commands.find(str(pid))
    await eventually(lambda: command.outcome is not None, TIMEOUT)
    assert command.journal.held_bytes <= module.COMMAND_OUTPUT
    async with attached(real, real_box, pid) as follower:
        await follower.end()
    assert [event["type"] for event in follower.events[:2]] == ["started", "gap"]
    kept = [event for event in follower.events if "text" in event]
    assert follower.events[1]["messages"] + len(kept) == command.journal.last
    assert follower.text.endswith("2999999\n3000000\n")
    assert len(follower.text) > module.COMMAND_OUTPUT // 2


# -- input


async def test_stdin(real: Service, real_box: str) -> None:
    """Input arrives in the order of the requests, of any size and any text, and ends when it is closed."""
    pid = (await start(real, real_box, "cat", stdin=True))["pid"]
    pieces = ["a\n", "", "ünïcödé\n" * 100_000, "\0\x01\n", "end"]
    async with attached(real, real_box, pid) as follower:
        for piece in pieces:
            assert await write(real, real_box, pid, piece) == 204
        for _ in range(2):
            answer = await real.call("DELETE", f"/sandboxes/{real_box}/commands/{pid}/stdin")
            assert answer.code in (204, 409)  # the second may find that the command is over
        assert (await follower.end())["exitCode"] == 0
    assert follower.text == "".join(pieces)
    answer = await real.call("POST", f"/sandboxes/{real_box}/commands/{pid}/stdin", {"text": "x"})
    assert error_of(answer)["error"] == "conflict"


async def test_stdin_that_is_not_open(real: Service, real_box: str) -> None:
    """Without `stdin` a command finds its input at its end, and takes none."""
    pid = (await shell(real, real_box, "cat; sleep 60"))["pid"]
    answer = await real.call("POST", f"/sandboxes/{real_box}/commands/{pid}/stdin", {"text": "x"})
    assert "closed" in error_of(answer)["message"]
    assert await signal(real, real_box, pid, "SIGKILL") == 204
    assert (await over(real, real_box, pid))["signal"] == 9


async def test_too_much_waiting_input(real: Service, real_box: str) -> None:
    """Input for a command that does not read waits up to a bound. More is refused as a whole."""
    pid = (await start(real, real_box, "sleep", "60", stdin=True))["pid"]
    codes = [await write(real, real_box, pid, "x" * MIB) for _ in range(8)]
    assert codes == sorted(codes)
    assert set(codes) == {204, 429}
    await signal(real, real_box, pid, "SIGTERM")
    assert (await over(real, real_box, pid))["exitCode"] == 143


# -- the end


@pytest.mark.parametrize(("name", "number"), [("SIGTERM", 15), ("SIGINT", 2), ("SIGKILL", 9), ("SIGUSR1", 10)])
async def test_signals_reach_the_group(real: Service, real_box: str, name: str, number: int) -> None:
    """A signal reaches the command and its children."""
    script = "sleep 600 & echo $!; trap 'echo got; exit' SIGHUP; wait"
    pid = (await shell(real, real_box, script))["pid"]
    async with attached(real, real_box, pid) as follower:
        child = int(await follower.until("\n"))
        assert is_alive(child)
        assert await signal(real, real_box, pid, name) == 204
        end = await follower.end()
    assert (end["exitCode"], end["signal"], end["outcome"]) == (128 + number, number, "finished")
    # A shell's background jobs ignore SIGINT.
    if name != "SIGINT":
        await eventually(lambda: not is_alive(child))
    else:
        os.kill(child, 9)
    assert await signal(real, real_box, pid, name) == 409


async def test_a_signal_that_is_handled(real: Service, real_box: str) -> None:
    """A command may handle a signal, stop and continue."""
    pid = (await shell(real, real_box, "trap 'echo hup' HUP; echo ready; while :; do sleep 0.01; done"))["pid"]
    async with attached(real, real_box, pid) as follower:
        await follower.until("ready")
        for name in ("SIGHUP", "SIGSTOP", "SIGCONT"):
            assert await signal(real, real_box, pid, name) == 204
        await follower.until("hup")
        await signal(real, real_box, pid, "SIGKILL")
        assert (await follower.end())["signal"] == 9


async def test_a_signal_at_the_moment_of_the_exit(real: Service, real_box: str) -> None:
    """A signal and an exit at the same time give one end, which all tell alike."""
    for delay in range(12):
        pid = (await shell(real, real_box, f"sleep 0.0{delay:02}; exit 5"))["pid"]
        async with attached(real, real_box, pid) as follower:
            code, end = await asyncio.gather(signal(real, real_box, pid, "SIGTERM"), follower.end())
        assert code in (204, 409)
        assert (end["exitCode"], end.get("signal")) in [(5, None), (143, 15)]
        assert (await record(real, real_box, pid))["exitCode"] == end["exitCode"]


async def test_a_timeout(real: Service, real_box: str) -> None:
    """At its timeout a command's group is killed; its output and its children tell so."""
    pid = (await shell(real, real_box, "sleep 600 & echo $!; wait", timeout=0.3))["pid"]
    async with attached(real, real_box, pid) as follower:
        end = await follower.end()
    assert (end["outcome"], end["exitCode"], end["timedOut"], end["signal"]) == ("finished", 124, True, 9)
    await eventually(lambda: not is_alive(int(follower.text)))


async def test_a_timeout_does_not_wait_for_a_reader(real: Service, real_box: str) -> None:
    """A client that has stopped reading delays neither the timeout nor the end."""
    box = await real.create()
    async with stream(real, "POST", f"/sandboxes/{box}/commands", {"cmd": "yes", "timeout": 1, "tag": "t"}) as follower:
        command = real.sandboxes.get(real.owner, box).guest.commands.find("t")
        await eventually(lambda: command.outcome is not None, TIMEOUT)
        assert (await record(real, box, "t"))["timedOut"]
        assert (await follower.end())["timedOut"]
    assert (await real.run(box, "true"))["exitCode"] == 0
    await real.call("DELETE", f"/sandboxes/{box}")


async def test_a_client_that_hangs_up(real: Service, real_box: str) -> None:
    """A hang-up changes nothing, and the command can be attached to again, unless the request asked for its end."""
    path = f"/sandboxes/{real_box}/commands"
    body = {"cmd": "bash", "args": ["-c", "echo $$; read x; echo $x"], "stdin": True}
    async with stream(real, "POST", path, body) as follower:
        pid = int(await follower.until("\n"))
    async with attached(real, real_box, pid, follower.seq) as again:
        await write(real, real_box, pid, "still here\n")
        assert (await again.end())["exitCode"] == 0
    assert again.text == "still here\n"

    async with stream(real, "POST", path, {**body, "killOnHangUp": True}) as follower:
        pid = int(await follower.until("\n"))
    async with attached(real, real_box, pid) as again:
        assert (await again.end())["signal"] == 9
    assert not is_alive(pid)


async def test_one_client_hangs_up_while_another_stays(real: Service, real_box: str) -> None:
    """An attached client gets everything, whenever another hangs up."""
    pid = (await start(real, real_box, "seq", "200000"))["pid"]
    async with attached(real, real_box, pid) as stays:
        for _ in range(5):
            async with attached(real, real_box, pid) as leaves:
                await leaves.receive()
        await stays.end()
    assert stays.text.endswith("199999\n200000\n")


async def test_100_at_once(real: Service, real_box: str) -> None:
    """A hundred commands run at the same time, each with its own input and output."""
    started = await asyncio.gather(*(start(real, real_box, "cat", stdin=True, tag=f"n{n}") for n in range(100)))
    assert len({each["pid"] for each in started}) == 100
    listed = json.loads((await real.call("GET", f"/sandboxes/{real_box}/commands")).body)
    assert sum(each["status"] == "running" for each in listed) == 100

    async def talk(number: int) -> str:
        async with attached(real, real_box, f"n{number}") as follower:
            await write(real, real_box, f"n{number}", f"hello {number}\n")
            await follower.until("\n")
            assert (await real.call("DELETE", f"/sandboxes/{real_box}/commands/n{number}/stdin")).code == 204
            assert (await follower.end())["exitCode"] == 0
        return follower.text

    assert await asyncio.gather(*map(talk, range(100))) == [f"hello {n}\n" for n in range(100)]


# -- terminals


@asynccontextmanager
async def terminal(service: Service, box: str, cmd: str, *args: str, **fields: Any) -> AsyncIterator["Terminal"]:
    """A command with a terminal, and a client at it."""
    given = {"pty": {"rows": 24, "cols": 80}, **fields}
    pid = (await start(service, box, cmd, *args, **given))["pid"]
    async with attached(service, box, pid) as follower:
        found = Terminal(service, box, pid, follower)
        yield found
        if (await record(service, box, pid))["status"] == "running":
            await signal(service, box, pid, "SIGKILL")
        await follower.end()


class Terminal:
    """Somebody at a terminal."""

    def __init__(self, service: Service, box: str, pid: int, follower: Follower) -> None:
        self.service = service
        self.box = box
        self.pid = pid
        self.follower = follower

    async def type(self, text: str, expect: str) -> str:
        """Type, and return the output from then on when it has the pattern."""
        before = len(self.follower.text)
        assert await write(self.service, self.box, self.pid, text) == 204
        return await self.follower.until(expect, before)

    async def resize(self, rows: int, cols: int) -> int:
        path = f"/sandboxes/{self.box}/commands/{self.pid}/size"
        return (await self.service.call("PUT", path, {"rows": rows, "cols": cols})).code


@asynccontextmanager
async def bash(service: Service, box: str) -> AsyncIterator[Terminal]:
    """An interactive shell with the prompt `$$$ `."""
    shell = terminal(service, box, "bash", "--norc", "--noprofile", "-i", envVars={"PS1": "$$$ "})
    async with shell as found:
        await found.follower.until(r"\d+\$ ")
        yield found


async def test_a_terminal(real: Service, real_box: str) -> None:
    """A command with `pty` has a terminal: its type, size, session and colours."""
    async with bash(real, real_box) as shell:
        assert {event["type"] for event in shell.follower.events} <= {"started", "pty"}
        assert "xterm-256color" in await shell.type("echo [$TERM]\r", r"\[xterm.*\$ $")
        assert "24 80" in await shell.type("stty size\r", r"\d+ \d+\r\n.*\$ $")
        tty = await shell.type("tty; ps -o tty=,sid= -p $$\r", r"sid.*\$ $")
        number = re.search(r"/dev/(pts/\d+)", tty)
        assert number is not None
        assert re.search(rf"{number[1]}\s+{shell.pid}\b", tty)
        await shell.type("mkdir -p colours && touch colours/run && chmod +x colours/run\r", r"\$ $")
        assert "\x1b[01;32mrun\x1b[0m" in await shell.type("ls --color=auto colours\r", r"run\x1b.*\$ $")
        assert "ü→😀" in await shell.type("printf 'ü→%s\\n' 😀\r", r"\rü→😀\r\n")
        await shell.type("exit 7\r", "exit")
        assert (await shell.follower.end())["exitCode"] == 7


async def test_the_size_of_a_terminal(real: Service, real_box: str) -> None:
    """A new size is seen by programs, which get SIGWINCH."""
    async with bash(real, real_box) as shell:
        await shell.type("trap 'echo changed' WINCH\r", r"\$ $")
        assert await shell.resize(40, 132) == 204
        await shell.type("\r", "changed")
        assert "40 132" in await shell.type("stty size\r", r"\d+ \d+\r\n")
        assert (await record(real, real_box, shell.pid))["pty"] == {"rows": 40, "cols": 132}


SPEAKER = """
import os, signal, sys
signal.signal(signal.SIGCONT, lambda *_: os.write(1, b"resumed\\n"))
os.write(1, b"begun\\n")
for line in sys.stdin:
    os.write(1, b"got " + line.encode())
"""
"""A program that says when the shell has put it in the foreground, because earlier keys may be the shell's."""


async def test_job_control(real: Service, real_box: str) -> None:
    """Ctrl-C interrupts, Ctrl-Z stops, `fg` continues, Ctrl-D ends the shell."""
    await real.run(real_box, "tee", "speaker.py", stdin=SPEAKER)
    async with bash(real, real_box) as shell:
        await shell.type("python speaker.py\r", "begun\r\n")
        await shell.type("\x03", r"\^C.*KeyboardInterrupt.*\$ $")
        assert "=130" in await shell.type("echo status=$?\r", r"status=\d+\r\n.*\$ $")
        await shell.type("python speaker.py\r", "begun\r\n")
        await shell.type("\x1a", r"Stopped.*\$ $")
        assert "Stopped" in await shell.type("jobs\r", r"jobs\r\n.*Stopped.*\$ $")
        await shell.type("fg\r", "resumed\r\n")
        await shell.type("again\r", "again\r\ngot again\r\n")
        await shell.type("\x04", r"\$ $")
        await write(real, real_box, shell.pid, "\x04")
        assert (await shell.follower.end())["outcome"] == "finished"


async def test_a_full_screen_program(real: Service, real_box: str) -> None:
    """An editor opens on the whole screen, is typed in, saves and quits."""
    editor = shutil.which("vim") or shutil.which("vi")
    assert editor is not None
    async with terminal(real, real_box, editor, "-u", "NONE", "-n", "note.txt") as screen:
        await screen.follower.until(r"note\.txt")
        await screen.type("ihello vim\x1b", "hello vim")
        await write(real, real_box, screen.pid, ":wq\r")
        assert (await screen.follower.end())["exitCode"] == 0
    assert "\x1b[?1049h" in screen.follower.text
    assert (await real.run(real_box, "cat", "note.txt"))["stdout"] == "hello vim\n"


async def test_the_end_of_a_terminal(real: Service, real_box: str) -> None:
    """The input of a terminal is not closed, only commands with one have a size, and a killed shell hangs up."""
    async with bash(real, real_box) as shell:
        answer = await real.call("DELETE", f"/sandboxes/{real_box}/commands/{shell.pid}/stdin")
        assert "Ctrl-D" in error_of(answer)["hint"]
        job = re.search(r"pid=(\d+)", await shell.type("sleep 600 & echo pid=$!\r", r"pid=\d+\r\n"))
        assert job is not None
        assert await signal(real, real_box, shell.pid, "SIGHUP") == 204
        assert (await shell.follower.end())["signal"] == 1
        await eventually(lambda: not is_alive(int(job[1])))
    pid = (await start(real, real_box, "sleep", "60"))["pid"]
    answer = await real.call("PUT", f"/sandboxes/{real_box}/commands/{pid}/size", {"rows": 1, "cols": 1})
    assert error_of(answer)["error"] == "conflict"
    await signal(real, real_box, pid, "SIGKILL")


# -- sandboxes that end


@pytest.mark.parametrize("event", [Event.KILL, Event.EXPIRED, Event.DIED, Event.SERVER_STOPPED])
async def test_a_sandbox_that_ends_under_a_command(service: Service, box: str, event: Event) -> None:
    """Whatever ends a sandbox, its commands' outcome is unknown, and all that wait are told that."""
    pid = (await start(service, box, "sleep", "60"))["pid"]
    commands = service.sandboxes.get(service.owner, box).guest.commands
    one_request = asyncio.create_task(
        service.call("POST", f"/sandboxes/{box}/processes", {"cmd": "sleep", "args": ["60"]})
    )
    await eventually(lambda: all(each.pid for each in commands) and len(list(commands)) == 2)
    async with attached(service, box, pid) as follower:
        await follower.receive()
        service.sandboxes.get(service.owner, box).apply(event)
        end = await follower.end()
    assert (end["outcome"], end["error"]["code"], "exitCode" in end) == ("unknown", "sandbox_died", False)
    error = error_of(await one_request)
    assert (error["code"], error["error"], error["outcome"]) == (502, "sandbox_died", "unknown")
    answer = await service.call("GET", f"/sandboxes/{box}/commands/{pid}")
    assert answer.code == 404


async def test_deleting_a_sandbox_of_real_commands(real: Service) -> None:
    """A deleted sandbox leaves no command waiting, also one that is held for its reader."""
    box = await real.create()
    async with stream(real, "POST", f"/sandboxes/{box}/commands", {"cmd": "yes"}) as follower:
        await follower.receive()
        command = real.sandboxes.get(real.owner, box).guest.commands.find(str(follower.events[0]["pid"]))
        await eventually(lambda: command.journal.last > 0)
        assert (await real.call("DELETE", f"/sandboxes/{box}")).code == 204
        assert (await follower.end())["outcome"] == "unknown"
    assert command.state == "unknown"


async def test_a_guest_that_answers_nonsense(service: Service, box: str) -> None:
    """A command whose agent answers with something else has an unknown outcome, and the sandbox goes on."""

    async def odd(stream: Stream, body: wire.Spawn) -> None:
        await stream.event(wire.Started(pid=-5))
        await stream.reply(wire.Done())

    service.guest(box).script.handlers[wire.Spawn] = odd
    started = await start(service, box, "x", tag="odd")
    assert started["pid"] == -5
    assert (await over(service, box, "odd"))["error"]["code"] == "guest_unresponsive"
    assert (await record(service, box, "odd"))["status"] == "unknown"


# -- without HTTP


@pytest.fixture
def commands(service: Service, box: str) -> Commands:
    return service.sandboxes.get(service.owner, box).guest.commands


def spawned(service: Service, box: str) -> int:
    return sum(isinstance(each, wire.Spawn) for each in service.guest(box).requests)


async def finished(command: Command) -> None:
    await eventually(lambda: command.outcome is not None)


async def test_cancelled_before_the_start(service: Service, box: str, commands: Commands) -> None:
    """A command that is cancelled before its request was sent is never sent, and is known as not started."""
    command = commands.start(["true"], env={})
    command.kill()
    assert command.state == "not_started"
    await service.run(box, "echo", "x")
    assert spawned(service, box) == 1
    with pytest.raises(Conflict, match="cancelled before"):
        await command.running()


async def test_a_sandbox_that_ended_before_the_start(service: Service, box: str, commands: Commands) -> None:
    """A command for a link that is closed was not started, though the sandbox died."""
    commands._link.close()
    command = commands.start(["true"], env={})
    with pytest.raises(SandboxDied) as refused:
        await command.running()
    assert (command.state, refused.value.outcome) == ("not_started", "not_started")


async def test_the_number_of_commands_is_bounded(
    service: Service, box: str, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More commands than the bound are refused with 429. Of those that are over only the last are known."""
    monkeypatch.setattr(module, "MAX_RUNNING", 3)
    monkeypatch.setattr(module, "KEPT", 2)
    running = [await start(service, box, "sleep", "60") for _ in range(3)]
    for path in ("commands", "processes"):
        error = error_of(await service.call("POST", f"/sandboxes/{box}/{path}", {"cmd": "true"}))
        assert (error["code"], error["error"]) == (429, "too_many_requests")
    assert spawned(service, box) == 3
    for each in running:
        await signal(service, box, each["pid"], "SIGTERM")
        assert (await over(service, box, each["pid"]))["exitCode"] == 143
    last = await start(service, box, "true", tag="last")
    known = json.loads((await service.call("GET", f"/sandboxes/{box}/commands")).body)
    assert [each["pid"] for each in known] == [running[1]["pid"], running[2]["pid"], last["pid"]]
    answer = await service.call("GET", f"/sandboxes/{box}/commands/{running[0]['pid']}")
    assert answer.code == 404


async def test_what_commands_were_started_with_is_bounded(commands: Commands) -> None:
    """Long arguments of commands that are over make room for new ones; those of running commands do not."""
    held = Held(most=500_000)
    commands.account = held.account("")
    for _ in range(5):
        await finished(commands.start(["true", "x" * 100_000], env={}))
    assert 2 <= len(list(commands)) <= 4
    for _ in range(2):
        await commands.start(["sleep", "60" + " " * 100_000], env={}).running()
    with pytest.raises(module.TooManyRequests, match="commands"):
        commands.start(["sleep", "60" + " " * 100_000], env={})
    assert len(list(commands)) == 2
    assert held.size == 2 * (100_000 + module.WINDOW) + sum(sys.getsizeof(text) for text in ["sleep", "60"] * 2)


async def test_the_output_of_a_sandbox_is_bounded(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept output of all commands together is bounded. The command with most of it loses its oldest."""
    monkeypatch.setattr(module, "SANDBOX_OUTPUT", 4 * MIB)
    quiet = commands.start(["echo", "quiet"], env={})
    await finished(quiet)
    floods = [commands.start(["flood", "5"], env={}) for _ in range(4)]
    for flood in floods:
        await finished(flood)
    assert 3 * MIB < sum(each.journal.held_bytes for each in commands) <= 4 * MIB
    assert [each async for each in quiet.output()] == [quiet.journal._records[1]]
    for flood in floods:
        pieces = [each async for each in flood.output()]
        assert isinstance(pieces[0], Gap)
        assert all(isinstance(each, Record) for each in pieces[1:])
        assert pieces[0].messages + len(pieces) - 1 == flood.journal.last


async def test_a_guest_is_held_for_the_fastest_reader(service: Service, box: str, commands: Commands) -> None:
    """Nothing is lost to a reader that stands still for a while. When it leaves, the output flows."""
    command = commands.start(["flood", "20"], env={})
    output = command.output()
    size = len((await anext(output)).parts[0])  # type: ignore[union-attr]
    await eventually(lambda: not command._may_flow.is_set())
    before = command.journal.last
    await service.run(box, "echo", "others go on")
    assert command.journal.last <= before + module.WINDOW // module.PIECE
    for _ in range(100):
        each = await anext(output)
        assert isinstance(each, Record)
        size += len(each.parts[0])
    assert command.outcome is None
    await output.aclose()
    await finished(command)
    assert command.exited == wire.Exited(code=0)


async def test_characters_are_kept_whole(service: Service, box: str, commands: Commands) -> None:
    """No record ends within a character, however the output is cut; other bytes are kept as they are."""
    text = ("ü€😀" * 20_000).encode()
    for data, step in ((text, 32_767), (text[:90], 1), (b"\xff\xfe\xe2\x82", 1), (b"\xe2\x82" * 3, 2)):

        async def cut(stream: Stream, body: wire.Spawn, data: bytes = data, step: int = step) -> None:
            await stream.event(wire.Started(pid=1))
            for at in range(0, len(data), step):
                await stream.data(data[at : at + step], wire.STDOUT)
                await stream.data(b"|", wire.STDERR)
            await stream.reply(wire.Exited(code=0))

        service.guest(box).script.handlers[wire.Spawn] = cut
        command = commands.start(["x"], env={})
        pieces = [
            each.parts[0] async for each in command.output() if isinstance(each, Record) and each.kind == "stdout"
        ]
        assert b"".join(pieces) == data
        if data in (text, text[:90]):
            assert "".join(piece.decode() for piece in pieces).encode() == data


# -- malformed requests


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "cmd"),
        ({"cmd": ""}, "cmd"),
        ({"cmd": "tr\0ue"}, "NUL"),
        ({"cmd": "true", "args": ["x" * 1_000_000]}, "131071 bytes"),
        ({"cmd": "true", "cwd": "a\0b"}, "NUL"),
        ({"cmd": "true", "cwd": "\ud800"}, "JSON"),
        ({"cmd": "true", "user": ""}, "user"),
        ({"cmd": "true", "user": "\ud800"}, "JSON"),
        ({"cmd": "true", "user": "nobody-like-this"}, "no user"),
        ({"cmd": "true", "timeout": -1}, "timeout"),
        ({"cmd": "true", "timeout": 3601}, "timeout"),
        ({"cmd": "true", "tag": ""}, "tag"),
        ({"cmd": "true", "tag": "12"}, "tag"),
        ({"cmd": "true", "tag": "a b"}, "tag"),
        ({"cmd": "true", "tag": "a\n"}, "tag"),
        ({"cmd": "true", "tag": "x" * 129}, "tag"),
        ({"cmd": "true", "pty": {"rows": 0}}, "pty.rows"),
        ({"cmd": "true", "pty": {"cols": 65536}}, "pty.cols"),
        ({"cmd": "true", "pty": True}, "pty"),
        ({"cmd": "true", "stdin": "x"}, "stdin"),
        ({"cmd": "true", "envVars": {"A=": "x"}}, "environment"),
        ({"cmd": "true", "killOnHangUp": True}, "stream"),
    ],
)
async def test_refused(service: Service, box: str, body: dict[str, object], says: str) -> None:
    """An invalid request gets 400 with a message that says what is wrong, and nothing runs."""
    sent = json.dumps(body).encode()
    error = error_of(await service.call("POST", f"/sandboxes/{box}/commands", body=sent))
    assert error["code"] == 400
    assert says in error["message"]


@pytest.mark.parametrize(
    ("method", "rest", "body", "code"),
    [
        ("POST", "/signal", {}, 400),
        ("POST", "/signal", {"signal": "SIGNOT"}, 400),
        ("POST", "/signal", {"signal": 9}, 400),
        ("POST", "/stdin", {}, 400),
        ("POST", "/stdin", {"text": 1}, 400),
        ("PUT", "/size", {"rows": -1}, 400),
        ("PUT", "/size", {"rows": 10, "cols": 10}, 409),
        ("GET", "?since=-1", None, 400),
        ("GET", "?since=999999999999999999999999", None, 200),
    ],
)
async def test_refused_of_a_running_command(
    service: Service, box: str, method: str, rest: str, body: object, code: int
) -> None:
    """What a command can't be asked gets a 4xx; for a command that nobody knows everything is 404."""
    pid = (await start(service, box, "sleep", "60"))["pid"]
    answer = await service.call(method, f"/sandboxes/{box}/commands/{pid}{rest}", body)
    assert answer.code == code, answer.body
    if code == 409:
        answer = await service.call(method, f"/sandboxes/{box}/commands/none{rest}", body)
        assert error_of(answer)["error"] == "not_found"
