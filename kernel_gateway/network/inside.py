"""A program that runs for a moment inside a new network namespace. It makes a slot's guest side and hands it out.

It is started as `unshare --net … python -I -S inside.py`. Its standard input is a socket on which it gets the `ip`,
`nft` and `tc` batches as JSON. It answers with one message: JSON and, if all went well, the descriptors of

    the network namespace, the user namespace, the tap, the resolver's UDP and TCP sockets, the gate's and the proxy's

When the last of these is closed, the kernel takes the whole slot down. The program imports only the standard library,
because it starts once for every slot.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
SYSCTLS = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/ip_forward": "1",
    "ipv4/icmp_ratelimit": "0",  # a guest hears of every refusal, not only of the first few
    "ipv4/tcp_synack_retries": "2",  # half-open connections hold an ended guest's namespace for 7 s, not for 63
}


def tap(name: str) -> int:
    """A new Ethernet device of this namespace; it lives as long as its descriptor is open."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return fd


def bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind is socket.SOCK_STREAM:
        sock.listen(128)
    return sock


def batch(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> None:
    channel = socket.socket(fileno=0)
    try:
        wanted = json.loads(channel.recv(1 << 20))
        for name, value in SYSCTLS.items():
            path = f"/proc/sys/net/{name}"
            if os.path.exists(path):
                with open(path, "w") as file:
                    file.write(value)
        device = tap(wanted["tap"])
        batch(["ip", "-batch", "-"], wanted["ip"])
        batch(["nft", "-f", "-"], wanted["nft"])
        if wanted["tc"]:
            batch(["tc", "-batch", "-"], wanted["tc"])
        address, dns, gate, proxy = wanted["address"], wanted["dns"], wanted["gate"], wanted["proxy"]
        sockets = [
            bound(socket.SOCK_DGRAM, address, dns),
            bound(socket.SOCK_STREAM, address, dns),
            bound(socket.SOCK_STREAM, address, gate),
            bound(socket.SOCK_STREAM, address, proxy),
        ]
        spaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "user")]
        socket.send_fds(channel, [b"{}"], [*spaces, device, *(sock.fileno() for sock in sockets)])
    except OSError as error:
        channel.send(json.dumps({"error": str(error)}).encode())
    os._exit(0)  # at once, because the server waits for it


main()
