"""The real internet. Tests may go no further than the package index from which this machine itself installs."""

import re
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from pip._internal.models.index import PyPI

from kernel_gateway.network.policy import Floor
from kernel_gateway.settings import Settings
from tests.guest.client import Server, until

PACKAGE = "iniconfig"
"""A small package of pure Python that is in no template."""


@pytest.fixture(scope="module")
def index() -> str:
    return f"{PyPI.simple_url.rstrip('/')}/{PACKAGE}/"


@pytest.fixture(scope="module")
def online(index: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose sandboxes reach the index, also when the index has an address that is not public."""
    page = requests.get(index, timeout=60, verify=str(Settings().ca_path or "") or True)
    page.raise_for_status()
    links = [urljoin(index, link) for link in re.findall(r'href="([^"]+)"', page.text)]
    hosts = {urlsplit(link).hostname for link in (index, *links)}
    addresses = {IPv4Address(socket.gethostbyname(host)) for host in hosts if host}
    exceptions = ",".join(f"{address}/32" for address in addresses if Floor().refuses(address))
    server = Server(
        tmp_path_factory.mktemp("server") / "data",
        pool_size=1,
        max_sandboxes=2,
        flags={"--egress-allow": exceptions, "--templates": "code_interpreter"},
    )
    yield server
    server.close()


def test_from_a_create_to_an_installed_package(online: Server, index: str) -> None:
    """`pip install` and `requests.get` work in a sandbox without any settings in it."""
    until(online.pool_ready, 60)
    begun = time.monotonic()
    with online.sandbox() as box:
        installed = box.run("pip", "install", "--quiet", PACKAGE, timeout=150)
        assert installed["exitCode"] == 0, installed
        print(f"from create to installed: {time.monotonic() - begun:.1f} s")
        assert box.value(f"import {PACKAGE}\n{PACKAGE}.__name__") == PACKAGE
        status, text = box.value(
            f"import requests\nanswer = requests.get({index!r})\n[answer.status_code, answer.text]"
        )
        assert status == 200
        assert PACKAGE in text
        assert box.get("/network").json()["refused"] == []


def test_off_means_no_card(tmp_path: Path) -> None:
    """With the network off a machine has no network device, and the server says so."""
    flags = {"--network": "off", "--templates": "base"}
    server = Server(tmp_path / "data", pool_size=0, max_sandboxes=1, flags=flags)
    try:
        assert server.get("/health").json()["network"] == "off"
        with server.sandbox("base", allow_internet_access=False) as box:
            assert box.shell("ls /sys/class/net") == "lo\n"
            assert box.get("/network").json()["mechanism"] == "off"
    finally:
        server.close()
