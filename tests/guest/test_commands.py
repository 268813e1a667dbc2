"""Commands on a real machine: users, and terminals of their own."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.api.test_commands import SPEAKER
from tests.guest.client import Sandbox


def start(box: Sandbox, cmd: str, *args: str, **fields: Any) -> Any:
    """A new command's record."""
    answer = box.post("/commands", json={"cmd": cmd, "args": args, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def output(box: Sandbox, cmd: str, *args: str, **fields: Any) -> str:
    """The output of a command that succeeds."""
    pid = start(box, cmd, *args, **fields)["pid"]
    answer = box.get(f"/commands/{pid}", headers={"Accept": "application/x-ndjson"})
    events = [json.loads(line) for line in answer.text.splitlines()]
    assert (events[-1]["type"], events[-1].get("exitCode")) == ("end", 0), events
    return "".join(event.get("text", "") for event in events)


class Terminal:
    """Somebody at a command's terminal."""

    def __init__(self, box: Sandbox, pid: int, lines: Iterator[bytes]) -> None:
        self.box = box
        self.pid = pid
        self.lines = lines
        self.text = ""
        self.end: dict[str, Any] = {}

    def until(self, pattern: str) -> str:
        """Read until the output since the last call has the pattern, and return that output."""
        while not re.search(pattern, self.text, re.DOTALL):
            event = json.loads(next(self.lines))
            assert event["type"] != "end", (pattern, self.text)
            self.text += event.get("text", "")
        found, self.text = self.text, ""
        return found

    def type(self, text: str, expect: str) -> str:
        assert self.box.post(f"/commands/{self.pid}/stdin", json={"text": text}).status_code == 204
        return self.until(expect)


@contextmanager
def bash(box: Sandbox, **fields: Any) -> Iterator[Terminal]:
    """An interactive shell with the prompt `pid> `, and its end."""
    given = {"pty": {"rows": 30, "cols": 100}, "envVars": {"PS1": "$$> "}, **fields}
    pid = start(box, "bash", "--norc", "-i", **given)["pid"]
    headers = {"Accept": "application/x-ndjson"}
    with box.get(f"/commands/{pid}", headers=headers, stream=True) as answer:
        terminal = Terminal(box, pid, answer.iter_lines(chunk_size=1))
        terminal.until(r"\d> ")
        yield terminal
        assert box.post(f"/commands/{pid}/stdin", json={"text": "exit 5\r"}).status_code == 204
        assert json.loads(list(terminal.lines)[-1])["exitCode"] == 5


def test_users(box: Sandbox) -> None:
    """A command runs as the sandbox's user, or as root, with that user's home and names. Other names are refused."""
    script = "echo $(id -un) $(id -gn) $(pwd) $HOME $USER $(cat /proc/self/oom_score_adj)"
    assert output(box, "sh", "-c", script) == "user user /home/user /home/user user 0\n"
    assert output(box, "sh", "-c", script, user="user") == "user user /home/user /home/user user 0\n"
    assert output(box, "sh", "-c", script, user="root") == "root root /root /root root 0\n"
    output(box, "sh", "-c", "mkdir -m 700 secret; umask 77; echo x > secret/file", user="root")
    assert output(box, "cat", "file", user="root", cwd="~/secret") == "x\n"
    assert box.run("cat", "/root/secret/file")["exitCode"] == 1
    answer = box.post("/commands", json={"cmd": "true", "user": "nobody-like-this"})
    assert (answer.status_code, answer.json()["outcome"]) == (400, "not_started")
    # What the agent does afterwards, it does as the sandbox's user again.
    assert box.upload("mine.txt", b"x").json()[0]["owner"] == "user"
    assert box.download("/root/secret/file").status_code in (403, 404)


def test_terminals(box: Sandbox) -> None:
    """Each user gets a terminal of its own with job control: its size, Ctrl-C, Ctrl-Z, /dev/tty and sudo work."""
    box.run("tee", "speaker.py", stdin=SPEAKER)
    for user in ("user", "root"):
        with bash(box, user=user) as shell:
            assert "30 100" in shell.type("stty size\r", r"\d+ \d+\r\n.*> $")
            body = {"rows": 50, "cols": 120}
            assert box.request("PUT", f"/commands/{shell.pid}/size", json=body).status_code == 204
            assert "50 120" in shell.type("stty size\r", r"\d+ \d+\r\n.*> $")
            assert f"\r{user} 620\r\n" in shell.type("stat -c '%U %a' $(tty)\r", r"\r\w+ \d+\r\n.*> $")
            shell.type("echo through > /dev/tty\r", r"through\r\n.*> $")
            shell.type("python ~user/speaker.py\r", r"begun\r\n")
            shell.type("\x03", r"\^C.*KeyboardInterrupt.*> $")
            shell.type("python ~user/speaker.py\r", r"begun\r\n")
            shell.type("\x1a", r"Stopped.*> $")
            shell.type("fg\r", r"resumed\r\n")
            shell.type("again\r", r"again\r\ngot again\r\n")
            shell.type("\x1a", r"Stopped.*> $")
            shell.type("fg\r", r"resumed\r\n")
            shell.type("\x1c", r"Quit.*> $")
            assert "root" in shell.type("sudo id -un\r", r"\rroot\r\n.*> $")


def test_100_at_once(box: Sandbox) -> None:
    """A hundred commands run at the same time on a real machine."""
    started = [start(box, "sh", "-c", f"echo {n}; read x; echo $x", tag=f"n{n}", stdin=True) for n in range(100)]
    assert len({each["pid"] for each in started}) == 100
    running = {each["tag"] for each in box.get("/commands").json() if each["status"] == "running"}
    assert running >= {f"n{n}" for n in range(100)}
    for n in range(100):
        assert box.post(f"/commands/n{n}/stdin", json={"text": f"hello {n}\n"}).status_code == 204
    for n in range(100):
        answer = box.get(f"/commands/n{n}", headers={"Accept": "application/x-ndjson"})
        events = [json.loads(line) for line in answer.text.splitlines()]
        assert "".join(event.get("text", "") for event in events) == f"{n}\nhello {n}\n"
