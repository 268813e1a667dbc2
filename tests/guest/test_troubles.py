"""A machine or a program of the host stands still: others do not notice, and what waits for it ends in time."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.guest.client import Server, until


def test_a_machine_that_stands_still(server: Server) -> None:
    """Its cell is answered soon after the timeout, its command ends with it, and other requests do not wait."""
    until(server.pool_ready, 60)
    (machine,) = server.machines()
    with server.sandbox() as still, server.sandbox() as other, ThreadPoolExecutor() as threads:

        def ask(path: str, **body: object) -> tuple[requests.Response, float]:
            begun = time.monotonic()
            return still.post(path, json={"timeout": 2, **body}), time.monotonic() - begun

        os.kill(machine, signal.SIGSTOP)
        cell = threads.submit(ask, "/execute", code="1")
        command = threads.submit(ask, "/processes", cmd="true")
        assert other.value("6 * 7") == 42
        assert other.shell("echo here") == "here\n"
        with server.sandbox() as new:
            assert new.value("1 + 1") == 2
        answer, took = cell.result()
        assert answer.json()["error"]["code"] == "exec_timeout"
        assert took < 2 + 5
        answer, took = command.result()
        assert (answer.status_code, answer.json()["error"]) == (502, "guest_unresponsive")
        assert took < 2 + 30
        assert still.get("").status_code == 404
        until(lambda: machine not in server.machines(), 10)
        assert other.value("6 * 7") == 42


def test_a_machine_that_stands_still_is_deleted(server: Server) -> None:
    """A delete does not ask the machine, so it does not wait for it."""
    until(server.pool_ready, 60)
    (machine,) = server.machines()
    with server.sandbox() as still:
        os.kill(machine, signal.SIGSTOP)
        begun = time.monotonic()
        assert still.request("DELETE", "").status_code == 204
        assert time.monotonic() - begun < 5
        assert machine not in server.machines()
