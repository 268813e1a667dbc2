"""A TCP server for many clients with selectors, and a binary protocol of frames."""

# %%
import selectors
import socket
import struct
import threading

listener = socket.create_server(("127.0.0.1", 0))
stop, stopped = socket.socketpair()


def serve():
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stopped, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is stopped:
                    return
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                elif data := key.fileobj.recv(4096):
                    key.fileobj.sendall(data.upper())
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


thread = threading.Thread(target=serve)
thread.start()


# %%
def exchange(text):
    with socket.create_connection(listener.getsockname(), timeout=10) as connection:
        data = text.encode()
        connection.sendall(struct.pack("!I", len(data)) + data)
        answer = b""
        while len(answer) < 4 + len(data):
            answer += connection.recv(7)
    (length,) = struct.unpack_from("!I", answer)
    return length, answer[4:].decode()


for word in ("hello", "frames of bytes", ""):
    print(exchange(word))
stop.close()
thread.join()
listener.close()
stopped.close()

# %%
struct.calcsize("!IHb") + struct.calcsize("<d")
