"""A small world for tests of the network: a host of our own and an internet of stubs, each a network namespace.

    guest ── slot ── host 45.67.89.1 ── 45.67.89.2 internet: every address of DENIED, a name server, a router

Addresses in it are real ones, but nothing of it is visible outside, and nothing reaches the machine's own network. It
ends with the process that made it.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
HOST, ROUTER = "45.67.89.1", "45.67.89.2"
PUBLIC, OTHER_PUBLIC = "93.184.215.14", "151.101.0.223"
NAME_SERVER = "9.9.9.9"
DENIED = {
    "0.0.0.0/8": "0.1.2.3",
    "10.0.0.0/8": "10.1.2.3",
    "100.64.0.0/10": "100.100.100.200",
    "127.0.0.0/8": "127.0.0.1",
    "168.63.129.16/32": "168.63.129.16",
    "169.254.0.0/16": "169.254.169.254",
    "172.16.0.0/12": "172.31.255.254",
    "192.0.0.0/24": "192.0.0.192",
    "192.0.2.0/24": "192.0.2.7",
    "192.88.99.0/24": "192.88.99.1",
    "192.168.0.0/16": "192.168.1.1",
    "198.18.0.0/15": "198.18.0.1",
    "198.51.100.0/24": "198.51.100.9",
    "203.0.113.0/24": "203.0.113.9",
    "224.0.0.0/4": "224.0.0.251",
    "240.0.0.0/4": "250.1.2.3",
}
"""An address of every denied block."""
PORTS = (22, 25, 53, 80, 443, 853, 8080)
PROXY, PROXY_PORT = "10.1.2.3", 3128
"""A proxy on the host's network. It does not go anywhere, but answers with the target that it was asked for."""
NAMES = {
    "public.example.net": [PUBLIC],
    "other.example.net": [OTHER_PUBLIC],
    "www.shop.example.org": [OTHER_PUBLIC],
    "rebound.example.net": ["10.1.2.3"],
    "metadata.example.net": ["169.254.169.254"],
    "half.example.net": ["192.168.1.1", PUBLIC],
    "loop.example.net": ["127.0.0.1"],
    "host.example.net": [HOST],
}
_libc = ctypes.CDLL(None, use_errno=True)


class Space:
    """A network namespace that lives as long as this process and this object."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "setpriv", "--pdeathsig=KILL", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout
        self._holder.stdout.readline()
        self.pid = self._holder.pid
        self._fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        self.run("ip link set lo up")

    @property
    def enter(self) -> list[str]:
        """The prefix of commands that run in this namespace."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def run(self, script: str) -> str:
        """The output of a shell script, which must succeed."""
        done = subprocess.run([*self.enter, "sh", "-ec", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes within the block, and programs that it starts, are in this namespace.

        Threads that begin within the block stay here. Their starter must end them, or later tests would run here too.
        """
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            assert _libc.setns(self._fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert _libc.setns(outside, CLONE_NEWNET) == 0
            os.close(outside)
            here, deadline = f"net:[{os.fstat(self._fd).st_ino}]", time.monotonic() + 10
            while here in namespaces_of_threads():  # a thread may be ending just now
                assert time.monotonic() < deadline, "a thread is left in a network namespace of the tests"
                time.sleep(0.02)

    def close(self) -> None:
        os.close(self._fd)
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()


def namespaces_of_threads() -> set[str]:
    """The network namespaces of this process's threads."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):  # the thread has ended
            found.add(os.readlink(f"/proc/self/task/{task}/ns/net"))
    return found


class World:
    """A host and its internet. `hits` are the arrivals at all stubs."""

    def __init__(self, directory: Path) -> None:
        self.host, self.internet = Space(), Space()
        self._log = directory / "hits"
        self._log.touch()
        self.host.run(f"ip link add eth0 type veth peer name eth0 netns {self.internet.pid}")
        self.host.run(
            f"ip addr add {HOST}/24 dev eth0; ip link set eth0 up; ip route add default via {ROUTER};"
            # Distributions set these: passt pings without privileges, and nothing is forwarded.
            "sysctl -qw net.ipv4.ping_group_range='0 2147483647' net.ipv4.ip_forward=0;"
            # These are the host's own networks. The other side has stubs with the same addresses.
            f"ip addr add 10.200.0.1/24 dev eth0; ip addr add 8.8.4.4/32 dev eth0"
        )
        addresses = [PUBLIC, OTHER_PUBLIC, NAME_SERVER, *DENIED.values()]
        local = [address for address in addresses if not address.startswith(("0.", "127.", "224."))]
        self.internet.run(
            f"ip addr add {ROUTER}/24 dev eth0; ip link set eth0 up;"
            + "".join(f"ip addr add {address}/32 dev lo;" for address in local)
            # The internet answers packets that the host has masqueraded, and would also answer others.
            + f"ip route add default via {HOST}"
        )
        for block, address in DENIED.items():
            if address in local:
                self.host.run(f"ip route add {block} via {ROUTER} || true")
        stub = [sys.executable, str(Path(__file__).with_name("stubs.py")), str(self._log)]
        self._stubs = [
            subprocess.Popen([*space.enter, "setpriv", "--pdeathsig=KILL", *stub, role], stdout=subprocess.PIPE)
            for space, role in ((self.internet, "internet"), (self.host, "host"))
        ]
        for process in self._stubs:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"

    def hits(self) -> list[str]:
        """Lines `role protocol address port` of everything that arrived at a stub so far."""
        return self._log.read_text().splitlines()

    def close(self) -> None:
        for process in self._stubs:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()
        self.host.close()
        self.internet.close()
