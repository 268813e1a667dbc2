"""The network as seen from inside a real machine, by both mechanisms, on a stub internet.

The server, its host and the internet are in network namespaces of the tests' own, see world.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.client import Sandbox, Server, comm, until
from tests.guest.world import DENIED, HOST, NAME_SERVER, OTHER_PUBLIC, PROXY, PROXY_PORT, PUBLIC, World

PROBE = """
def probe(targets, limit=8):
    import selectors, socket, time
    selector, found, begun = selectors.DefaultSelector(), {}, time.monotonic()
    for protocol, address, port in targets:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        sock.setblocking(False)
        key = f"{protocol} {address} {port}"
        try:
            sock.connect_ex((address, port))
            if protocol == "udp":
                sock.send(b"hello")
        except OSError as error:
            found[key] = [type(error).__name__, 0.0]
            continue
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE * (protocol == "tcp"), (key, sock))
    while selector.get_map() and time.monotonic() - begun < limit:
        for chosen, events in selector.select(0.2):
            key, sock = chosen.data
            took = round(time.monotonic() - begun, 3)
            if events & selectors.EVENT_READ:
                try:
                    found[key] = [sock.recv(200).decode().strip() or "closed", took]
                except OSError as error:
                    found[key] = [type(error).__name__, took]
            elif error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                found[key] = [type(OSError(error, "")).__name__, took]
            else:
                sock.send(b"hello\\n")
                selector.modify(sock, selectors.EVENT_READ, (key, sock))
                continue
            selector.unregister(sock)
            sock.close()
    for chosen in list(selector.get_map().values()):
        found[chosen.data[0]] = ["silence", limit]
        chosen.data[1].close()
    return found
"""


@pytest.fixture(scope="module", params=["netns", "passt"])
def mechanism(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(mechanism: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world. The tests of this file run inside its host."""
    world = World(tmp_path_factory.mktemp("world"))
    with world.host.inside():
        yield world
    world.close()


@pytest.fixture(scope="module")
def cell(world: World, mechanism: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the stub host."""
    flags = {"--network": mechanism, "--dns": NAME_SERVER, "--templates": "code_interpreter"}
    server = Server(tmp_path_factory.mktemp("server") / "data", pool_size=1, max_sandboxes=4, flags=flags)
    yield server
    server.close()


@pytest.fixture(scope="module")
def box(cell: Server) -> Iterator[Sandbox]:
    with cell.sandbox() as box:
        yield box


def probe(box: Sandbox, targets: list[tuple[str, str, int]], limit: float = 8) -> dict[str, list[Any]]:
    """Talk to each target from inside. Returns the answer or the error's name, and the seconds that it took."""
    return box.value(f"{PROBE}\nprobe({targets!r}, {limit * box.scale})")


@contextmanager
def nothing_arrives(world: World, *but: str) -> Iterator[None]:
    """During the block no stub, of the host or of the internet, gets anything, except at these addresses."""
    before = len(world.hits())
    yield
    assert [line for line in world.hits()[before:] if line.split()[2] not in but] == []


def refused(box: Sandbox) -> dict[tuple[str, int, str], str]:
    """The reasons of the sandbox's refusals, by destination, port and protocol."""
    time.sleep(1.1)  # a reading of the filter is shared for a second
    listed = box.get("/network").json()["refused"]
    return {(each["destination"], each["port"], each["protocol"]): each["reason"] for each in listed}


def test_the_mechanism_is_named(cell: Server, mechanism: str) -> None:
    """/health names the mechanism."""
    assert cell.get("/health").json()["network"] == mechanism


def test_the_public_internet_is_reached(box: Sandbox) -> None:
    """The internet is reached by TCP (except for mail and name servers), by UDP, and by name."""
    found = probe(box, [("tcp", PUBLIC, port) for port in (22, 80, 443, 8080)] + [("udp", PUBLIC, 9000)])
    assert {key: said for key, (said, _) in found.items()} == {
        **{f"tcp {PUBLIC} {port}": f"internet {PUBLIC} {port}" for port in (22, 80, 443, 8080)},
        f"udp {PUBLIC} 9000": f"internet {PUBLIC} 9000",
    }
    text = box.value("import requests\nrequests.get('http://public.example.net/x', timeout=60).text")
    assert text == f"internet {PUBLIC} GET /x HTTP/1.1\n"


def test_r29_no_denied_address_is_reached(world: World, box: Sandbox) -> None:
    """R29: every block of the deny list and every address of the host is refused at once and listed with the reason."""
    addresses = [*(address for address in DENIED.values() if address != "127.0.0.1"), HOST, "10.200.0.1", "8.8.4.4"]
    addresses += ["10.0.2.2", "10.0.2.3", "255.255.255.255", "198.18.0.2", "198.19.0.3", "169.254.170.2"]
    targets = [(protocol, address, port) for address in addresses for protocol in ("tcp", "udp") for port in (80, 443)]
    with nothing_arrives(world):
        found = probe(box, targets, 3)
    assert len(found) == len(targets)
    for key, (said, took) in found.items():
        assert said in ("ConnectionRefusedError", "OSError", "PermissionError", "silence"), (key, said)
        if key.startswith("tcp") and said != "OSError":
            assert said == "ConnectionRefusedError", (key, said)
            assert took <= 1.0 * box.scale, (key, took)
    reasons = refused(box)
    for address in set(DENIED.values()) - {"0.1.2.3", "127.0.0.1", "224.0.0.251", "250.1.2.3"}:
        assert reasons[address, 80, "tcp"] == "floor", address


def test_r29_the_host_and_the_gateway_are_out_of_reach(world: World, cell: Server, box: Sandbox) -> None:
    """R29: no port of the host or the gateway is reached, by the host's addresses, the slot's or the link's."""
    gateway = int(cell.url.rpartition(":")[2])
    links = [word.split("/")[0] for word in world.host.run("ip -4 -o addr").split() if word.startswith("198.18.")]
    addresses = [HOST, "10.200.0.1", "8.8.4.4", "198.19.0.1", "198.18.0.1", "198.18.0.2", *links]
    with nothing_arrives(world):
        found = probe(box, [("tcp", address, port) for address in addresses for port in (gateway, 22, 80, 9000)])
    assert {said for said, _ in found.values()} == {"ConnectionRefusedError"}, found


def test_r29_one_sandbox_does_not_reach_another(world: World, cell: Server, box: Sandbox) -> None:
    """R29: a service of one sandbox on all its addresses can't be reached from another."""
    with cell.sandbox() as other:
        other.execute("import http.server, threading\n"
                      "serving = http.server.HTTPServer(('0.0.0.0', 8000), http.server.BaseHTTPRequestHandler)\n"
                      "threading.Thread(target=serving.serve_forever, daemon=True).start()")  # fmt: skip
        assert "Error code: 400" in probe(other, [("tcp", "198.19.0.2", 8000)])["tcp 198.19.0.2 8000"][0]
        links = [word.split("/")[0] for word in world.host.run("ip -4 -o addr").split() if word.startswith("198.18.")]
        near = [f"{link.rpartition('.')[0]}.{int(link.rpartition('.')[2]) + 1}" for link in links]
        targets = [("tcp", address, 8000) for address in ["198.19.0.1", "198.19.0.2", "198.18.0.2", *links, *near]]
        found = probe(box, targets, 4)
    assert {said for said, _ in found.values()} == {"ConnectionRefusedError"}, found


def test_r29_names_of_denied_addresses(world: World, box: Sandbox) -> None:
    """R29: a name gets no denied address. It is not resolved if it has no other addresses. There is no IPv6."""
    code = """
import socket, time
def look(name, family=socket.AF_INET):
    begun = time.monotonic()
    try:
        addresses = sorted({each[4][0] for each in socket.getaddrinfo(name, 80, family)})
    except socket.gaierror as error:
        addresses = error.errno
    return addresses, time.monotonic() - begun
{name: look(name) for name in %r}
"""
    names = ["rebound", "metadata", "loop", "host", "half", "public", "nowhere"]
    found = box.value(code % [f"{name}.example.net" for name in names])
    none = -2  # EAI_NONAME
    assert {name.partition(".")[0]: addresses for name, (addresses, _) in found.items()} == {
        "rebound": none, "metadata": none, "loop": none, "host": none, "half": [PUBLIC], "public": [PUBLIC],
        "nowhere": none,
    }  # fmt: skip
    assert max(took for _, took in found.values()) < 2 * box.scale
    assert refused(box)["rebound.example.net", 0, "dns"] == "floor"
    with nothing_arrives(world):
        shell = box.run("bash", "-c", "ip -6 addr show dev eth0; getent ahostsv6 public.example.net; "
                        "timeout 5 curl -sS http://[2606:2800:220:1::1]/ http://[::ffff:10.1.2.3]/; true")  # fmt: skip
    assert "inet6" not in shell["stdout"]


def test_r29_other_name_servers_and_mail_are_refused(world: World, box: Sandbox) -> None:
    """R29: only the sandbox's resolver resolves names, and no mail is sent."""
    ports = [("tcp", PUBLIC, 25), ("tcp", PUBLIC, 53), ("udp", PUBLIC, 53), ("tcp", PUBLIC, 853)]
    with nothing_arrives(world):
        found = probe(box, ports, 3)
    assert {said for said, _ in found.values()} <= {"ConnectionRefusedError", "OSError"}, found
    reasons = refused(box)
    assert [reasons[PUBLIC, port, "tcp"] for port in (25, 53, 853)] == ["mail", "dns", "dns"]


RAW = """
import socket, struct, sys
GUEST, GATEWAY = bytes.fromhex("026376000002"), bytes.fromhex("026376000001")
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def packet(source, target, *, options=b"", protocol=17, fragment=0, payload=None):
    udp = payload if payload is not None else struct.pack(">HHHH", 4000, 9000, 13, 0) + b"hello"
    def head(total):
        return struct.pack(">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(udp), 7, fragment, 64,
                           protocol, total, socket.inet_aton(source), socket.inet_aton(target)) + options
    return head(checksum(head(0))) + udp
def send(ip, *, kind=0x0800, sender=GUEST, receiver=GATEWAY, tag=b""):
    raw.send(receiver + sender + tag + struct.pack(">H", kind) + ip)
me, public = "198.19.0.2", sys.argv[1]
for target in sys.argv[2:]:
    send(packet(me, target))
    send(packet("127.0.0.1", target))
    send(packet("198.19.0.1", target))
    send(packet("45.67.89.1", target))
    send(packet(me, target), sender=bytes.fromhex("026376000099"))
    send(packet(me, target), receiver=b"\\xff" * 6)
    send(packet(me, target), tag=bytes.fromhex("81000001"))
    send(packet(me, target, fragment=0x2000))
    # Loose source routing: to a public address first, then on to the one that is meant.
    send(packet(me, public, options=bytes([131, 7, 4]) + socket.inet_aton(target) + b"\\0"))
    inner = packet(me, target)
    send(packet(me, public, protocol=4, payload=inner))
    send(packet(me, public, protocol=47, payload=b"\\0\\0\\x08\\0" + inner))
six = struct.pack(">IHBB", 6 << 28, 13, 17, 64) + bytes(15) + b"\\2" + bytes(15) + b"\\1"
send(six + struct.pack(">HHHH", 4000, 9000, 13, 0) + b"hello", kind=0x86DD)
# Tell everybody that the gateway's address is ours, and that the host's is.
for address in ("198.19.0.1", "45.67.89.1"):
    own = socket.inet_aton(address)
    send(struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + GUEST + own + GATEWAY + own, kind=0x0806)
print("sent")
"""


def test_r29_raw_packets_reach_nothing(world: World, box: Sandbox) -> None:
    """R29: root in the guest can make any packets. Those with a false sender or a denied target arrive nowhere."""
    box.upload("/tmp/raw.py", RAW)
    targets = [
        "127.0.0.1",
        HOST,
        "10.200.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "192.168.1.1",
        "198.19.0.1",
        "224.0.0.251",
    ]
    with nothing_arrives(world, PUBLIC):
        assert box.shell(f"sudo python3 /tmp/raw.py {PUBLIC} {' '.join(targets)}") == "sent\n"
        # An honest packet is sent after them on the same way. When it has arrived, they would have arrived too.
        assert probe(box, [("udp", PUBLIC, 9000)])[f"udp {PUBLIC} 9000"][0] == f"internet {PUBLIC} 9000"
    assert [line for line in world.hits() if line.startswith("host")] == []


def put(box: Sandbox, **policy: Any) -> None:
    answer = box.request("PUT", "/network", json=policy)
    assert answer.status_code == 204, answer.text


def test_a_policy_of_addresses(world: World, cell: Server) -> None:
    """A policy holds at once: only one block, all but that block, nothing, and everything."""
    only = {"allow_internet_access": False, "network": {"allowOut": [f"{PUBLIC}/32"]}}
    with cell.sandbox(**only) as box:
        both = [("tcp", PUBLIC, 80), ("tcp", OTHER_PUBLIC, 80)]

        def reached() -> list[bool]:
            found = probe(box, both, 4)
            return [found[f"tcp {address} 80"][0].startswith("internet") for _, address, _ in both]

        assert reached() == [True, False]
        assert refused(box)[OTHER_PUBLIC, 80, "tcp"] == "policy"
        put(box, denyOut=[PUBLIC])
        assert reached() == [False, True]
        put(box, allow_internet_access=False)
        assert reached() == [False, False]
        put(box)
        assert reached() == [True, True]
        assert box.get("/network").json()["refused"]


def test_a_new_policy_cuts_what_it_forbids(cell: Server) -> None:
    """A connection that the old policy allowed and the new one forbids is cut."""
    with cell.sandbox() as box:
        box.execute(f"import socket\nopen_one = socket.create_connection(({PUBLIC!r}, 8080), timeout=20)")
        put(box, allow_internet_access=False)
        said = box.value("""
try:
    open_one.sendall(b"hello\\n")
    text = open_one.recv(100).decode()
except OSError as error:
    text = type(error).__name__
text""")
        assert said == "ConnectionResetError"


def test_a_policy_of_names(world: World, cell: Server) -> None:
    """Allowed names are reached on any port. Others are not, neither by their address nor by a false Host."""
    wanted = {"allow_internet_access": False, "network": {"allowOut": ["public.example.net", "*.shop.example.org"]}}
    with cell.sandbox(**wanted) as box:
        code = """
import requests
def ask(url, **headers):
    try:
        answer = requests.get(url, headers=headers, timeout=30)
        return answer.status_code, answer.text.strip()
    except requests.RequestException as error:
        return type(error).__name__, ""
found = [ask("http://public.example.net/a"), ask("http://www.shop.example.org/b"), ask("http://other.example.net/c"),
         ask("http://{other}/d"), ask("http://{public}/e"), ask("http://public.example.net:8080/g"),
         ask("http://public.example.net/f", Host="other.example.net")]
found""".replace("{other}", OTHER_PUBLIC).replace("{public}", PUBLIC)
        found = box.value(code, timeout=300)
        assert found[0] == [200, f"internet {PUBLIC} GET /a HTTP/1.1"]
        assert found[1] == [200, f"internet {OTHER_PUBLIC} GET /b HTTP/1.1"]
        assert found[2][0] == "ConnectionError"
        assert found[3][0] == 403
        assert found[4][0] == 403
        assert found[5] == [200, f"internet {PUBLIC} GET /g HTTP/1.1"]
        assert found[6][0] == 403
        reasons = refused(box)
        assert reasons["other.example.net", 0, "dns"] == "policy"


def test_too_many_connections(world: World, cell: Server) -> None:
    """A flood of new connections is throttled and told as refused, and other sandboxes are not disturbed."""
    with cell.sandbox() as box, cell.sandbox() as neighbour:
        code = f"""
import socket
refused = 0
for _ in range(1500):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(({PUBLIC!r}, 9000))
    sock.send(b"hello")
    sock.close()
"""
        assert box.execute(code, timeout=120)["error"] is None
        assert refused(box)[PUBLIC, 9000, "udp"] == "limit"
        assert probe(neighbour, [("tcp", PUBLIC, 80)])[f"tcp {PUBLIC} 80"][0] == f"internet {PUBLIC} 80"


def test_behind_a_proxy(world: World, mechanism: str, tmp_path: Path) -> None:
    """Where the host has a proxy, sandboxes use it without settings of their own, and only for allowed targets."""
    flags = {
        "--network": mechanism,
        "--dns": NAME_SERVER,
        "--templates": "code_interpreter",
        "--upstream-proxy": f"http://{PROXY}:{PROXY_PORT}",
        "--pip-index": "https://index.example.net/simple",
    }
    server = Server(tmp_path / "data", pool_size=0, max_sandboxes=1, flags=flags)
    try:
        with server.sandbox() as box:
            curl = "curl -sS --max-time 20 --proxytunnel"
            assert box.shell("curl -sS --max-time 20 http://public.example.net/a") == (
                f"internet {PROXY} GET http://public.example.net/a HTTP/1.1\n"
            )
            tunnelled = box.shell(f"{curl} http://public.example.net:8080/b")
            assert tunnelled == f"internet {PROXY} for public.example.net:8080 GET /b HTTP/1.1\n"
            for inside in (
                "http://169.254.169.254/",
                "http://metadata.example.net/",
                f"http://{HOST}/",
                f"http://{PROXY}/",
            ):
                with nothing_arrives(world, NAME_SERVER):
                    assert box.run("curl", "-sS", "--fail", "--max-time", "20", inside)["exitCode"] == 22
            assert probe(box, [("tcp", PROXY, PROXY_PORT)])[f"tcp {PROXY} {PROXY_PORT}"][0] == "ConnectionRefusedError"
            assert box.shell("pip config get global.index-url || echo $PIP_INDEX_URL").endswith("example.net/simple\n")
    finally:
        server.close()


def test_nothing_is_left(mechanism: str, tmp_path: Path) -> None:
    """After the server's end, also by force, none of its links, processes and namespaces is left. Its entries in the
    host's tables go with its own end, or when the next server starts."""
    world = World(tmp_path)
    flags = {"--network": mechanism, "--dns": NAME_SERVER, "--templates": "code_interpreter"}

    def left() -> list[str]:
        links = [word for word in world.host.run("ip -o link").split() if word.startswith("cvm")]
        return links + [line for line in world.host.run("nft list tables").splitlines() if "cellvm" in line]

    with world.host.inside():
        server = Server(tmp_path / "data", pool_size=1, max_sandboxes=2, flags=flags)
        until(server.pool_ready, 60)
        assert left() or mechanism == "passt"
        helpers = {pid for pid in children(server.pid) if comm(pid)}
        server.process.kill()
        server.close()
        until(lambda: not [line for line in left() if line.startswith("cvm")], 10)
        until(lambda: not [pid for pid in helpers if comm(pid)], 10)
        server = Server(tmp_path / "data", pool_size=1, max_sandboxes=2, flags=flags)
        server.close()
        until(lambda: left() == [], 10)
        assert world.host.run("cat /proc/sys/net/ipv4/ip_forward") == "0\n"
    world.close()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
