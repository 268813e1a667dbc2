"""The README's JupyterLab blocks are pasted unchanged. Its other blocks are in tests/guest/test_readme.py."""

import os
import re
import signal
import subprocess
from pathlib import Path

import requests

from tests.guest.client import Server, until
from tests.guest.readme import Terminal, blocks, checkout


def handed_over(tree: Path, lab_python: Path) -> None:
    """Put the cached JupyterLab into `.venv-lab` before the README makes that, so that pip downloads nothing."""
    cached, ours = lab_python.parents[1], tree / ".venv-lab"
    packages = next(cached.glob("lib/python3*/site-packages"))
    for directory in (ours / "bin", ours / packages.relative_to(cached)):
        directory.mkdir(parents=True)
    (ours / packages.relative_to(cached) / "cached.pth").write_text(f"{packages}\n")
    for name in ("pip", "jupyter"):
        script = ours / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {cached}/bin/{name} "$@"\n')
        script.chmod(0o755)


def test_jupyterlab(server: Server, lab_python: Path, tmp_path: Path) -> None:
    """The environment is made, JupyterLab starts by the README's command, and its kernels are the server's."""
    tree = checkout(tmp_path)
    handed_over(tree, lab_python)
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        "CELLVM_DATA_DIR": str(server.data),
        "PIP_NO_INDEX": "1",
        "BROWSER": "true",  # the program `true` shows nothing
    }
    first, *_ = (block for block in blocks() if block.section == "A first sandbox")
    install, start = (block for block in blocks() if block.section == "JupyterLab")
    assert {first.language, install.language, start.language} == {"sh"}
    with Terminal(tree, server.url.removeprefix("http://"), environment) as terminal:
        terminal.run(first.text)
        terminal.run(install.text)
        names = terminal.run("printf '%s\\n' $KEY $URL").split()
    environment |= dict(zip(("KEY", "URL"), names, strict=True))
    log = tmp_path / "lab.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {start.text}"],  # `exec env` lets a signal reach JupyterLab itself
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tree, env=environment,
        )  # fmt: skip

    def address() -> re.Match[str] | None:
        text = log.read_text()
        assert process.poll() is None, text
        return re.search(r"^ +(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)$", text, re.MULTILINE)

    try:
        url, token = until(address, 120, every=0.1).groups()
        headers = {"Authorization": f"token {token}"}
        assert requests.get(f"{url}/lab", headers=headers, timeout=60).status_code == 200
        specs = requests.get(f"{url}/api/kernelspecs", headers=headers, timeout=60).json()
        assert "code_interpreter" in specs["kernelspecs"]
        made = requests.post(f"{url}/api/kernels", json={"name": "python3"}, headers=headers, timeout=60)
        assert made.status_code == 201, made.text
        assert made.json()["id"] in {kernel["id"] for kernel in kernels(server, environment["KEY"])}
        requests.delete(f"{url}/api/kernels/{made.json()['id']}", headers=headers, timeout=60)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert kernels(server, environment["KEY"]) == []


def kernels(server: Server, key: str) -> list[dict[str, object]]:
    """The server's kernels that this key may see."""
    return requests.get(f"{server.url}/api/kernels", headers={"X-API-Key": key}, timeout=60).json()
