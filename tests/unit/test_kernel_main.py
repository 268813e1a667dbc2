"""A kernel's process, without an agent."""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from guest_agent.kernel import NURSERY, PORTS

KERNEL = "from guest_agent.kernel_main import run_kernel; import sys, os; run_kernel(sys.argv[1], dict(os.environ))"


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Path]:
    """The connection file of a running kernel to which nobody has connected."""
    file = tmp_path / "connection.json"
    ports = {f"{name}_port": number for number, name in enumerate(PORTS, 1)}
    info = {"transport": "ipc", "ip": str(tmp_path / "ipc"), "key": "key", "signature_scheme": "hmac-sha256"}
    file.write_text(json.dumps({**info, **ports, "kernel_name": ""}))
    (tmp_path / "cells").write_bytes(bytes(4096))
    with socket.socket(socket.AF_UNIX) as resumes:
        resumes.bind(str(tmp_path / "resume"))
        resumes.listen()
        kernel = subprocess.Popen(
            [sys.executable, "-c", KERNEL, str(file)],
            env={**os.environ, "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        resumes.settimeout(60)
        with resumes.accept()[0]:  # it has made all its sockets then
            yield file
        kernel.kill()
        kernel.wait()


async def test_a_slow_reader_that_came_late(connection: Path) -> None:
    """A reader that connects when the kernel already runs loses nothing, however slowly it reads."""
    client = AsyncKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)
        request = client.execute("for number in range(5000): print(number, flush=True)")
        assert (await client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] == request
        printed = []
        while (said := await client.get_iopub_msg(timeout=60))["content"].get("execution_state") != "idle":
            if said["msg_type"] == "stream":
                printed += said["content"]["text"].split()
        assert printed == [str(number) for number in range(5000)]
    finally:
        client.stop_channels()


def test_a_nursery_whose_agent_was_killed(tmp_path: Path) -> None:
    """It ends without a word, also when the agent had not read its last answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY.format(str(Path(__file__).parents[2])), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        ours.sendall(json.dumps({"is_current": {"HOME": str(tmp_path)}}).encode() + b"\n")
        assert select.select([ours], [], [], 60)[0]
        ours.close()
        assert nursery.communicate(timeout=60)[1] == ""
        assert nursery.returncode == 0
