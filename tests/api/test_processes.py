"""Commands over HTTP: answers, refusals, and bounds on endless output."""

import asyncio
import json
import time

import pytest

from guest_agent import wire
from tests.fakes import Service, Stream, error_of, eventually, resident


async def refused(service: Service, box: str, **body: object) -> dict[str, object]:
    return error_of(await service.call("POST", f"/sandboxes/{box}/processes", body))


async def test_a_command(service: Service, box: str) -> None:
    """A command's output, exit status and every documented field come back."""
    assert await service.run(box, "echo", "a", "b c") == {
        "processID": "4711",
        "stdout": "a b c\n",
        "stderr": "",
        "exitCode": 0,
        "timedOut": False,
        "signal": None,
        "truncated": None,
    }
    result = await service.run(box, "sh", "-c", "echo oops >&2")
    assert (result["stdout"], result["stderr"]) == ("", "oops\n")


async def test_a_failing_command_is_no_error(service: Service, box: str) -> None:
    """A non-zero exit, a signal and a timeout are 200 with the facts."""
    assert (await service.run(box, "sh", "-c", "exit 7"))["exitCode"] == 7
    killed = await service.run(box, "sh", "-c", "kill -15 $$")
    assert (killed["exitCode"], killed["signal"]) == (143, 15)
    slow = await service.run(box, "sh", "-c", "echo begun; sleep 9", timeout=0.2)
    assert (slow["exitCode"], slow["timedOut"], slow["stdout"]) == (124, True, "begun\n")


async def test_stdin_environment_and_directory(service: Service, box: str) -> None:
    """Standard input arrives whole and ends. Variables win over the sandbox's. `cwd` begins at home."""
    text = "ünïcödé\n" * 300_000
    assert (await service.run(box, "cat", stdin=text))["stdout"] == text
    assert (await service.run(box, "cat"))["stdout"] == ""
    environment = (await service.run(box, "env", envVars={"E2B_SANDBOX": "mine", "B": "2"}))["stdout"].split("\n")
    assert {"E2B_SANDBOX=mine", "B=2", f"E2B_SANDBOX_ID={box}"} <= set(environment)
    seen = service.guest(box).requests
    for cwd, passed in ((None, "~"), ("~", "~"), ("/tmp", "/tmp"), (".", ".")):  # the guest resolves it
        await service.run(box, "true", **({"cwd": cwd} if cwd else {}))
        assert isinstance(seen[-1], wire.Spawn)
        assert seen[-1].cwd == passed
    assert (await refused(service, box, cmd="true", cwd="/none"))["error"] == "invalid"


async def test_output_that_is_not_utf8(service: Service, box: str) -> None:
    """Bytes that are no text become U+FFFD. A character that the transport has cut in two does not."""
    result = await service.run(box, "binary", "ff41fec3")
    assert result["stdout"] == "\ufffdA\ufffd\ufffd"

    async def halves(stream: Stream, body: wire.Spawn) -> None:
        await stream.event(wire.Started(pid=1))
        for byte in "ü€😀".encode():
            await stream.data(bytes([byte]), wire.STDOUT)
            await asyncio.sleep(0.001)
        await stream.reply(wire.Exited(code=0))

    service.guest(box).script.handlers[wire.Spawn] = halves
    assert (await service.run(box, "x"))["stdout"] == "ü€😀"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "cmd"),
        ({"cmd": ""}, "cmd"),
        ({"cmd": 1}, "cmd"),
        ({"cmd": "true", "args": "x"}, "args"),
        ({"cmd": "true", "args": [1]}, "args"),
        ({"cmd": "tr\0ue"}, "NUL"),
        ({"cmd": "true", "args": ["\0"]}, "NUL"),
        ({"cmd": "true", "args": ["x" * 1_000_000]}, "131071 bytes"),
        ({"cmd": "true", "args": ["ü" * 70_000]}, "131071 bytes"),
        ({"cmd": "true", "timeout": 0}, "timeout"),
        ({"cmd": "true", "timeout": -1}, "timeout"),
        ({"cmd": "true", "timeout": 3601}, "timeout"),
        ({"cmd": "true", "timeout": "1"}, "timeout"),
        ({"cmd": "true", "cwd": "a\0b"}, "NUL"),
        ({"cmd": "true", "envVars": {"A=": "x"}}, "environment"),
        ({"cmd": "true", "envVars": {"A": 1}}, "envVars"),
        ({"cmd": "true", "stdin": 1}, "stdin"),
    ],
)
async def test_refused(service: Service, box: str, body: dict[str, object], says: str) -> None:
    """An invalid request gets 400 with a message that says what is wrong, and nothing runs."""
    error = await refused(service, box, **body)
    assert (error["code"], error["error"]) == (400, "invalid_request")
    assert says in str(error["message"])
    assert not [each for each in service.guest(box).requests if isinstance(each, wire.Spawn)]


async def test_arguments_at_the_limit_and_too_many(service: Service, box: str) -> None:
    """An argument of just the limit passes. More than a frame holds gets 413, and the sandbox goes on."""
    long = "x" * 131071
    assert len((await service.run(box, "echo", long))["stdout"]) == 131072
    assert (await refused(service, box, cmd="true", args=[long] * 9))["error"] == "too_large"
    assert (await service.run(box, "true"))["exitCode"] == 0


async def test_no_such_program(service: Service, box: str) -> None:
    """A program that can't be started gives 502 cannot_run with its name."""
    error = await refused(service, box, cmd="frobnicate")
    assert (error["code"], error["error"]) == (502, "cannot_run")
    assert "frobnicate" in str(error["message"])
    assert error["outcome"] == "not_started"


async def test_r8_a_command_that_prints_200_mb(service: Service, box: str) -> None:
    """The answer holds the first 8 MiB and tells how much was left out. Memory grows by 48 MiB at most."""
    await service.run(box, "flood", "20")
    before, peak = resident(), 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, resident())
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    result = await service.run(box, "flood", "200", timeout=50)
    watching.cancel()
    size = len(b"flood! ") * 9362 * 16 * 200
    assert len(result["stdout"]) == 8 << 20
    assert result["truncated"] == {"stdout": size - (8 << 20)}
    # The client's copies of the answer are in this process too.
    assert peak - before <= 48 << 20


async def test_a_client_that_hangs_up_ends_its_command(service: Service, box: str) -> None:
    """Closing the connection cancels the command in the guest."""
    ended = asyncio.Event()

    async def endless(stream: Stream, body: wire.Spawn) -> None:
        await stream.event(wire.Started(pid=1))
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    service.guest(box).script.handlers[wire.Spawn] = endless
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    body = b'{"cmd": "x"}'
    head = f"POST /sandboxes/{box}/processes HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\nContent-Length: "
    writer.write(head.encode() + b"%d\r\n\r\n%s" % (len(body), body))
    await eventually(lambda: any(isinstance(r, wire.Spawn) for r in service.guest(box).requests))
    writer.close()
    await asyncio.wait_for(ended.wait(), 2)
    assert (await service.call("GET", f"/sandboxes/{box}/health")).code == 204


async def test_r16_a_guest_that_ignores_the_timeout(
    service: Service, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own watchdog ends a command that the guest does not. The sandbox is destroyed, with 502."""
    monkeypatch.setattr("kernel_gateway.guest.commands.WATCHDOG", 0.3)

    async def deaf(stream: Stream, body: wire.Spawn) -> None:
        await stream.event(wire.Started(pid=1))
        await asyncio.sleep(60)

    service.guest(box).script.handlers[wire.Spawn] = deaf
    begun = time.monotonic()
    error = await refused(service, box, cmd="x", timeout=0.2)
    assert 0.5 <= time.monotonic() - begun < 1.5
    assert (error["code"], error["error"], error["outcome"]) == (502, "guest_unresponsive", "unknown")
    await eventually(lambda: not service.driver.alive)


async def test_many_at_once(service: Service, box: str) -> None:
    """Commands run side by side, each with its own output, also beside a cell."""
    begun = time.monotonic()
    slow = asyncio.create_task(service.execute(box, "import time; time.sleep(0.3)"))
    sleeps = [service.run(box, "sleep", "0.3") for _ in range(5)]
    echoes = [service.run(box, "echo", str(number)) for number in range(30)]
    results = await asyncio.gather(*sleeps, *echoes)
    await slow
    assert [result["stdout"] for result in results[5:]] == [f"{number}\n" for number in range(30)]
    assert time.monotonic() - begun < 2


async def test_envs_health_metrics(service: Service, box: str) -> None:
    """The readings of a sandbox have the documented fields."""
    await service.call("DELETE", f"/sandboxes/{box}")
    box = await service.create(envVars={"MULTI": "a\nb=c"})
    answer = await service.call("GET", f"/sandboxes/{box}/envs")
    assert json.loads(answer.body) == {
        "HOME": "/home/user",
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": box,
        "E2B_TEMPLATE_ID": "code_interpreter",
        "MULTI": "a\nb=c",
    }
    answer = await service.call("GET", f"/sandboxes/{box}/health")
    assert (answer.code, answer.body) == (204, b"")
    metrics = json.loads((await service.call("GET", f"/sandboxes/{box}/metrics")).body)
    assert metrics["mem_total_mib"] == 2048
    assert metrics["mem_used_mib"] == 512
    assert set(metrics) == {
        "ts", "cpu_count", "cpu_used_pct", "mem_total", "mem_used", "mem_cache", "mem_total_mib", "mem_used_mib",
        "disk_total", "disk_used",
    }  # fmt: skip
