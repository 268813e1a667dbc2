"""Servers of a stub internet (or of the host), in one namespace. They note and answer everything that arrives.

The arguments are the file for the notes, and a role. TCP and UDP ports answer a line with the address that was asked
for. A line that looks like HTTP gets HTTP. Port 53 of the internet answers DNS from world.NAMES.
"""

import asyncio
import socket
import sys
from pathlib import Path

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.guest.world import NAME_SERVER, NAMES, PORTS, PROXY_PORT

IP_PKTINFO = 8
log, role = Path(sys.argv[1]), sys.argv[2]


def note(protocol: str, address: str, port: int) -> None:
    with log.open("a") as file:
        file.write(f"{role} {protocol} {address} {port}\n")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    address, port = writer.get_extra_info("sockname")[:2]
    note("tcp", address, port)
    try:
        first = await reader.readline()
        if b"HTTP/" in first:
            while (await reader.readline()).strip():
                pass
            if first.startswith(b"CONNECT "):
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                address, first = f"{address} for {first.split()[1].decode()}", await reader.readline()
                while (await reader.readline()).strip():
                    pass
            body = f"{role} {address} {first.decode('latin-1').strip()}\n".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        else:
            writer.write(f"{role} {address} {port}\n".encode())
        await writer.drain()
    except OSError:
        pass  # the client has gone
    finally:
        writer.close()


def datagram(sock: socket.socket, port: int) -> None:
    data, ancillary, _, sender = sock.recvmsg(65536, 256)
    packed = next((value for level, kind, value in ancillary if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO)), b"")
    address = socket.inet_ntoa(packed[8:12])
    note("udp", address, port)
    answer = resolve(data) if port == 53 and address == NAME_SERVER else f"{role} {address} {port}\n".encode()
    source = bytes(4) + packed[4:8] + bytes(4)
    sock.sendmsg([answer], [(socket.IPPROTO_IP, IP_PKTINFO, source)], 0, sender)


def resolve(data: bytes) -> bytes:
    query = dns.message.from_wire(data)
    answer = dns.message.make_response(query)
    answer.flags |= dns.flags.RA
    question = query.question[0]
    addresses = NAMES.get(question.name.to_text(omit_final_dot=True).lower(), [])
    if addresses and question.rdtype == dns.rdatatype.A:
        answer.answer.append(dns.rrset.from_text(question.name, 5, "IN", "A", *addresses))
    elif not addresses:
        answer.set_rcode(dns.rcode.NXDOMAIN)
    return answer.to_wire()


async def main() -> None:
    for port in (*PORTS, PROXY_PORT, 9000):
        await asyncio.start_server(serve, "0.0.0.0", port)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.setblocking(False)
        sock.bind(("0.0.0.0", port))
        asyncio.get_running_loop().add_reader(sock, datagram, sock, port)
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
