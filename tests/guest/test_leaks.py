"""Promises A22 and R30 on real machines: nothing of one sandbox reaches another, and no secret reaches the host."""

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from requests.auth import AuthBase

from tests.guest.client import CELLVM, KEY, Sandbox, Server, until

LATER = 20
"""Sandboxes after the one with the canary. Each takes 4 s."""

MEMORY = '''
import json, numpy as np, struct, sys

def words(number, read):
    """How often eight bytes stand in memory. Given is a number that makes them, or we would find ourselves."""
    half = int.from_bytes(bytes(range(8)), "little")
    return sum(int(np.count_nonzero((np.frombuffer(piece, "<u8") ^ half) == int(number, 16))) for piece in read)

def memory():
    """All of the machine's memory, as the kernel sees it."""
    with open("/proc/kcore", "rb", buffering=0) as core:
        head = core.read(64)
        start, count = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
        core.seek(start)
        table = core.read(56 * count)
        ram = int(open("/proc/meminfo").readline().split()[1]) << 10
        for at in range(0, len(table), 56):
            kind, _, offset, address, physical, size = struct.unpack_from("<IIQQQQ", table, at)
            if kind != 1 or physical > 2 * ram or size > 2 * ram:
                continue  # not what the machine's memory is mapped to
            for place in range(offset, offset + size, 1 << 22):
                core.seek(place)
                piece = core.read(min(1 << 22, offset + size - place))
                yield piece[: len(piece) & ~7]
'''


PLANT = """
import fcntl, json, os, struct, subprocess
word = bytes.fromhex({word!r})
text = word.hex().encode()
kept = word * 100_000
for path in ("/home/user/mark", "/tmp/mark", "/dev/shm/mark"):
    open(path, "wb").write(text * 1000)
os.environ["MARK"] = text.decode()
process = subprocess.Popen(["sleep", "1000"] , env={{"MARK": text.decode()}})
other = subprocess.Popen(["bash", "-c", f"sleep 1000; : {{text.decode()}}"])
name = text.decode()
os.system(f"sudo sh -c 'hostname {{name}}; echo {{name}} > /dev/kmsg; touch /etc/{{name}}'")
# Many blocks of the disk, and where on it they are (FIEMAP).
with open("/home/user/large", "wb") as file:
    for _ in range(16): file.write(word * (1 << 17))
    file.flush()
    os.fsync(file.fileno())
    request = bytearray(struct.pack("=QQIIII", 0, 1 << 40, 1, 0, 500, 0) + bytes(56 * 500))
    fcntl.ioctl(file, 0xC020660B, request)
    mapped = struct.unpack_from("=I", request, 20)[0]
    extents = [struct.unpack_from("=QQQ", request, 32 + 56 * at)[1:] for at in range(mapped)]
extents
"""
LOOK = """
import glob, json, os, subprocess, sys
halves, extents = json.load(sys.stdin)
text, word = "".join(halves).encode(), bytes.fromhex("".join(halves))
found = []
def look(name, content):
    if text in content or word in content:
        found.append(name)
for top in ("/home", "/tmp", "/var/tmp", "/dev/shm", "/run", "/root"):
    for directory, _, names in os.walk(top):
        for path in (os.path.join(directory, name) for name in names):
            look("name", path.encode())
            if os.path.isfile(path) and not os.path.islink(path):
                look(path, open(path, "rb").read(1 << 20))
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "comm"):
        try:
            look(f"/proc/{pid}/{name}", open(f"/proc/{pid}/{name}", "rb").read())
        except OSError:
            pass
look("/etc", b" ".join(name.encode() for name in os.listdir("/etc")))
look("hostname", os.uname().nodename.encode())
look("dmesg", subprocess.run(["dmesg"], capture_output=True).stdout)
with open("/dev/vdb", "rb", buffering=0) as disk:
    for physical, length in [(0, 8 << 20), *extents]:
        for at in range(0, length, 1 << 22):
            disk.seek(physical + at)
            look(f"/dev/vdb at {physical + at}", disk.read(min(1 << 22, length - at)))
print(json.dumps(sorted(set(found))))
"""


def look(box: Sandbox, halves: list[str], extents: list[list[int]]) -> list[str]:
    """The places where root finds the canary in a sandbox, apart from its memory."""
    result = box.run("sudo", "python3", "-IS", "-c", LOOK, stdin=json.dumps([halves, extents]), timeout=100)
    assert result["exitCode"] == 0, result
    return json.loads(result["stdout"])


def in_memory(box: Sandbox, word: str) -> int:
    """The number of times that the canary is in a machine's memory."""
    number = int.from_bytes(bytes.fromhex(word), "little") ^ int.from_bytes(bytes(range(8)), "little")
    script = MEMORY + "print(words(sys.argv[1], memory()))"
    result = box.run("sudo", "/opt/venv/bin/python", "-c", script, f"{number:x}", timeout=100)
    assert result["exitCode"] == 0, result
    return int(result["stdout"])


@pytest.mark.timeout(900)  # two minutes alone, and several beside other machines
def test_a22_a_canary_is_in_no_later_sandbox(server: Server) -> None:
    """A22: no later sandbox has anything of a sandbox's files, blocks, memory, variables, names or kernel log."""
    word = secrets.token_hex(8)
    halves = [word[:8], word[8:]]
    with server.sandbox(envVars={"CANARY": word}) as planter:
        extents = planter.value(PLANT.format(word=word))
        assert sum(length for _, length in extents) == 16 << 20
        planter.shell("sync")
        found = look(planter, halves, extents)
        # The search does find the canary in the sandbox that has it, in each kind of place.
        for place in ("/home/user/mark", "/tmp/mark", "/dev/shm/mark", "/etc", "hostname", "dmesg"):
            assert place in found, found
        for part in ("/environ", "/cmdline", "/dev/vdb at"):
            assert any(part in place for place in found), (part, found)
        assert in_memory(planter, word) > 100_000
    for number in range(LATER):
        with server.sandbox() as later:
            if number == 0:  # before `look`, which puts the canary there
                assert in_memory(later, word) == 0
            assert look(later, halves, extents) == []
            assert word not in str(later.get("/envs").json())


# -- R30

CANARY = "canary-" + secrets.token_hex(8)


class OwnKey(AuthBase):
    """Sends no Authorization header, because the request has the key in another form."""

    def __call__(self, request: Any) -> Any:
        request.headers.pop("Authorization", None)
        return request


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Server]:
    """A server whose log is as long as possible."""
    data = tmp_path_factory.mktemp("talkative") / "data"
    server = Server(data, pool_size=1, max_sandboxes=3, flags={"--log-level": "debug"})
    yield server
    server.close()


def of_processes(own: set[int]) -> str:
    """Command lines and environments of these processes and all below them."""
    texts, waiting = [], sorted(own)
    while waiting:
        pid = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            texts += [
                (Path(f"/proc/{pid}") / name).read_bytes().decode("utf-8", "replace") for name in ("cmdline", "environ")
            ]
        except OSError:
            continue  # the process has ended
    return "\n".join(texts)


def test_r30_no_secret_on_the_host(talkative: Server) -> None:
    """R30: keys, variables, code and files are in no log, command line, environment or file."""
    until(talkative.pool_ready, 60)
    with talkative.sandbox(envVars={"TOKEN": f"{CANARY}-env"}) as box:
        assert box.shell("echo $TOKEN") == f"{CANARY}-env\n"
        box.run("cat", "/dev/stdin", f"{CANARY}-arg", envVars={"OWN": f"{CANARY}-own"}, stdin=f"{CANARY}-stdin")
        box.execute(f"raise ValueError('{CANARY}-code')")
        box.upload(f"/home/user/{CANARY}-name", f"{CANARY}-file")
        box.download(f"/home/user/{CANARY}-missing")
        path = f"/sandboxes/{box.id}"
        for headers, query in (
            ({"X-API-Key": KEY}, ""),
            ({}, f"?token={KEY}"),
            ({"Authorization": f"token {KEY}"}, ""),
        ):
            answer = talkative.get(
                path + query, headers=headers, auth=OwnKey() if "Authorization" not in headers else None
            )
            assert answer.status_code == 200, answer.text
            assert talkative.get("/nothing" + query, headers=headers).status_code == 404
        assert talkative.get(f"/t/{KEY}/api/kernels", auth=OwnKey()).status_code == 200
        assert KEY not in talkative.get(f"/T/{KEY}/api/nothing").text
        machines = of_processes(talkative.machines())
        everything = of_processes({talkative.pid})
    assert CANARY not in machines
    assert KEY not in machines
    # The test itself gives the server the key in its environment.
    given = re.sub(r"CELLVM_API_KEY=[^\0]*\0", "", everything)
    assert CANARY not in given
    assert KEY not in given
    log = talkative.log.read_text()
    assert f"{path}/execute 200" in log
    assert CANARY not in log
    assert KEY not in log
    for file in talkative.data.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert CANARY.encode() not in content, file
            assert KEY.encode() not in content, file


def test_r30_a_proxy_with_a_password(tmp_path: Path) -> None:
    """R30: a proxy's address with a password is refused, and the message does not repeat it."""
    variables = {**os.environ, "CELLVM_UPSTREAM_PROXY": f"http://user:{CANARY}@127.0.0.1:9"}
    command = [CELLVM, "serve", "--port", "0", "--data-dir", tmp_path / "data"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "--upstream-proxy" in result.stderr
    assert CANARY not in result.stdout + result.stderr
