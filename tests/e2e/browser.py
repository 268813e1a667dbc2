"""Uses JupyterLab in Chromium like somebody at a keyboard. It runs in the virtual environment that has playwright.

    python browser.py ADDRESS SCREENSHOT [KERNEL]

ADDRESS is JupyterLab's, with its token. KERNEL is the id of a kernel that somebody else has started. With it, this also
tries the features that need the classes of cellvm_lab. Each step prints one JSON object on a line. The first
step that fails is the last.
"""

import json
import re
import shutil
import sys
import time
import traceback
from typing import Any

from playwright.sync_api import Locator, Page, expect, sync_playwright

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SECONDS = 60
"""The limit of any one thing. Emulated machines are slow."""
PICTURE = """
import zlib, struct
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
rows = b"".join(b"\\0" + bytes((x * y) % 256 for x in range(3 * 37)) for y in range(23))
png = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 37, 23, 8, 2, 0, 0, 0)) + chunk(
    b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
"""
"""Makes `png`, a picture 37 wide and 23 high whose bytes are not valid UTF-8."""


class Notebook:
    """A notebook that is open in JupyterLab."""

    def __init__(self, page: Page, address: str, name: str) -> None:
        self.page = page
        base, _, token = address.partition("?")
        page.goto(f"{base}/tree/{name}?{token}&reset")
        self.panel = page.locator(".jp-NotebookPanel:visible")
        self.is_idle()

    def is_idle(self) -> None:
        """Wait until the kernel is idle."""
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle")

    def start(self, code: str) -> Locator:
        """Write a cell below the others, and run it."""
        cells = self.panel.locator(".jp-CodeCell")
        before = cells.count()
        self.panel.locator(".jp-Notebook-footer").click()
        expect(cells).to_have_count(before + 1)
        cell = cells.nth(before)
        cell.locator(".cm-content").fill(code)
        self.page.keyboard.press("Control+Enter")
        return cell

    def run(self, code: str) -> Locator:
        """Run a cell to its end, and return its output."""
        cell = self.start(code)
        self.has_ended(cell)
        return cell.locator(".jp-Cell-outputArea")

    def has_ended(self, cell: Locator) -> None:
        expect(cell.locator(".jp-InputArea-prompt")).to_have_text(re.compile(r"^\[\d+\]:$"))

    def press(self, keys: str) -> None:
        """Press keys outside of cells, where keys are commands."""
        self.page.keyboard.press("Escape")
        for key in keys:
            self.page.keyboard.press(key)

    def restart(self) -> None:
        self.press("00")
        self.accept()

    def accept(self) -> None:
        """Say yes to a dialog, and wait for the kernel."""
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        expect(self.page.locator(".jp-Dialog")).to_have_count(0)
        self.is_idle()


class Steps:
    """The steps, in order."""

    def __init__(self, page: Page, address: str, kernel: str) -> None:
        self.page = page
        self.address = address
        self.kernel = kernel

    def text(self) -> dict[str, Any]:
        self.notebook = Notebook(self.page, self.address, "test.ipynb")
        return {"text": self.notebook.run('print("hello", 6 * 7)').inner_text().strip()}

    def table(self) -> dict[str, Any]:
        output = self.notebook.run('import pandas as pd\npd.DataFrame({"a": [1, 2], "b": ["x", "y"]})')
        return {"cells": output.locator("table.dataframe td").all_inner_texts()}

    def figure(self) -> dict[str, Any]:
        output = self.notebook.run("import matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);")
        return {"png": picture_size(output.locator("img"))}

    def input(self) -> dict[str, Any]:
        cell = self.notebook.start('print("got", input("name? "))')
        box = cell.locator("input.jp-Stdin-input")
        expect(box).to_be_visible()
        prompt = cell.locator(".jp-Stdin-prompt").inner_text()
        box.fill("Ada ✓")
        box.press("Enter")
        self.notebook.has_ended(cell)
        printed = cell.locator(".jp-OutputArea-output", has_text="got")
        return {"prompt": prompt, "text": printed.inner_text().strip()}

    def restart(self) -> dict[str, Any]:
        self.notebook.run("kept = 1")
        self.notebook.restart()
        output = self.notebook.run('print("kept" in globals())')
        return {"text": output.inner_text().strip(), "prompt": self.prompt()}

    def interrupt(self) -> dict[str, Any]:
        cell = self.notebook.start('print("asleep")\nimport time; time.sleep(120)')
        expect(cell.locator(".jp-OutputArea-output").first).to_contain_text("asleep")
        self.notebook.press("ii")
        expect(cell.locator(".jp-Cell-outputArea")).to_contain_text("KeyboardInterrupt")
        self.notebook.has_ended(cell)
        return {"text": self.notebook.run("print('awake')").inner_text().strip()}

    def widget(self) -> dict[str, Any]:
        """A picture widget's bytes come to the browser, and a file widget's bytes go to the kernel."""
        output = self.notebook.run(PICTURE + "import ipywidgets\nipywidgets.Image(value=png)")
        picture = picture_size(output.locator("img.widget-image"))
        output = self.notebook.run("upload = ipywidgets.FileUpload()\nupload")
        with self.page.expect_file_chooser() as chooser:
            output.locator("button.widget-upload").click()
        content = bytes(range(256))
        chooser.value.set_files([{"name": "bytes", "mimeType": "application/octet-stream", "buffer": content}])
        expect(output.locator("button.widget-upload")).to_contain_text("(1)")
        told = self.notebook.run("print(bytes(upload.value[0].content) == bytes(range(256)))").inner_text().strip()
        return {"picture": picture, "upload": told}

    def large(self) -> dict[str, Any]:
        """A message of 12 MiB comes to the browser, and the connection lives on."""
        code = 'display({"text/html": "<b class=end>" + "x" * 9 + "</b><!--" + "y" * (12 << 20) + "-->"}, raw=True)'
        output = self.notebook.run(code)
        expect(output.locator("b.end")).to_have_text("x" * 9)
        return {"text": self.notebook.run("print('alive')").inner_text().strip()}

    def files(self) -> dict[str, Any]:
        """A file of the sandbox is opened in the file browser, changed in the editor and read by the kernel."""
        code = 'import os\nwith open("/home/user/note.txt", "w") as file: file.write("from the sandbox")\n'
        box = self.notebook.run(code + 'print(os.environ["E2B_SANDBOX_ID"])').inner_text().strip()
        for name in ("sandboxes", box):
            self.page.locator(f'.jp-DirListing-item[title^="Name: {name}"]').dblclick()
        item = self.page.locator('.jp-DirListing-item[title^="Name: note.txt"]')
        item.dblclick()
        editor = self.page.locator(".jp-FileEditor .cm-content")
        expect(editor).to_have_text("from the sandbox")
        editor.fill("from the browser")
        self.page.keyboard.press("Control+s")
        expect(self.page.locator(".lm-TabBar-tab.jp-mod-dirty", has_text="note.txt")).to_have_count(0)
        self.page.locator(".jp-BreadCrumbs-home").click()
        self.page.locator(".lm-TabBar-tab", has_text="test.ipynb").first.click()
        return {"text": self.notebook.run('print(open("/home/user/note.txt").read())').inner_text().strip()}

    def attach(self) -> dict[str, Any]:
        """Change to somebody else's kernel, which has a variable `secret`."""
        self.page.locator(".jp-KernelName:visible").click()
        self.page.locator(".jp-Dialog select").select_option(json.dumps({"id": self.kernel}, separators=(",", ":")))
        self.notebook.accept()
        return {"text": self.notebook.run("print(secret)").inner_text().strip()}

    def prompt(self) -> str:
        return self.notebook.panel.locator(".jp-CodeCell .jp-InputArea-prompt").last.inner_text()


STOCK = ("text", "figure", "restart")
OURS = ("text", "table", "figure", "input", "widget", "large", "interrupt", "files", "restart", "attach")


def picture_size(image: Locator) -> list[int]:
    """Width and height of a picture, after it is decoded."""
    expect(image).to_be_visible()
    size: list[int] = image.evaluate(
        "async each => { await each.decode(); return [each.naturalWidth, each.naturalHeight] }"
    )
    return size


def main(address: str, screenshot: str, kernel: str = "") -> int:
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1400, "height": 2200})
        page.set_default_timeout(SECONDS * 1000)
        steps = Steps(page, address, kernel)
        for name in OURS if kernel else STOCK:
            began = time.monotonic()
            try:
                found = getattr(steps, name)()
            except Exception:  # noqa: BLE001  the test shows any failure
                page.screenshot(path=screenshot)
                print(json.dumps({"step": name, "error": traceback.format_exc()}), flush=True)
                return 1
            print(json.dumps({"step": name, "seconds": round(time.monotonic() - began, 1)} | found), flush=True)
        page.screenshot(path=screenshot)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
