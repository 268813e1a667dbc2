"""Scrape a shop that runs here: pages with next links, a redirect, a missing page, parsed by Beautiful Soup."""

# %%
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urljoin, urlsplit

import requests
from bs4 import BeautifulSoup


class Shop(BaseHTTPRequestHandler):
    def do_GET(self):
        where = urlsplit(self.path)
        page = int(parse_qs(where.query).get("page", ["1"])[0])
        if where.path == "/":
            self.send_response(302)
            self.send_header("Location", "/list?page=1")
            self.end_headers()
            return
        items = "".join(
            f'<li class="item"><a href="/item/{n}">Thing № {n}</a><b>{n * 3}.50 €</b></li>'
            for n in range(page * 3, page * 3 + 3)
        )
        link = f'<a rel="next" href="?page={page + 1}">next</a>' if page < 3 else ""
        body = f"<html><ul>{items}</ul>{link}</html>".encode() if where.path == "/list" else b"gone"
        self.send_response(200 if where.path == "/list" else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = "http://127.0.0.1:%d/" % server.server_port

# %%
found, url, session = [], base, requests.Session()
while url:
    answer = session.get(url, timeout=10)
    soup = BeautifulSoup(answer.text, "html.parser")
    for item in soup.select("li.item"):
        found.append((item.a.text, float(item.b.text.split()[0])))
    print(urlsplit(answer.url).query, len(found), "redirected" if answer.history else "")
    following = soup.find("a", rel="next")
    url = urljoin(answer.url, following["href"]) if following else None
found[-1]

# %%
try:
    session.get(urljoin(base, "/nothing"), timeout=10).raise_for_status()
except requests.HTTPError as error:
    print(error.response.status_code, error.response.reason)
session.close()
server.shutdown()
server.server_close()
sum(price for _, price in found)
