"""A client of a small REST service: retries after 503, JSON errors, a token, paging."""

# %%
import json
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

calls = []


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, code, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        calls.append(sent)
        if self.headers["Authorization"] != "Bearer secret":
            self.answer(401, {"error": "who are you?"})
        elif len(calls) < 4:
            self.answer(503, {"error": "busy"}, Retry_After=0)
        else:
            self.answer(201, {"id": len(calls), **sent})

    def log_message(self, form, *args):
        print("  server:", form % args)


server = HTTPServer(("127.0.0.1", 0), Service)
thread = threading.Thread(target=server.serve_forever, args=(0.01,))
thread.start()


# %%
def post(body, token="secret", tries=5):
    for attempt in range(tries):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}/things",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return error.code, json.load(error)
            time.sleep(float(error.headers["Retry-After"]))
    raise TimeoutError


try:
    print(post({"name": "x"}, token="wrong"))
    print(post({"name": "ärger"}))
finally:
    server.shutdown()
    thread.join()
    server.server_close()
len(calls)
