"""Uses JupyterLab in Chromium like somebody at a keyboard. It runs in the virtual environment that has playwright.

    python browser.py ADDRESS SCREENSHOT STEPS [KERNEL]

ADDRESS is JupyterLab's, with its token. STEPS is a name in SETS. KERNEL is the id of a kernel that somebody else has
started; the steps `ours` need it. Each step prints one JSON object on a line. The first step that fails is the last.
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

    def save(self) -> None:
        with self.page.expect_response(
            lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url
        ):
            self.page.keyboard.press("Control+s")

    def cell(self, mark: str) -> Locator:
        """The cell with that text in its code."""
        return self.panel.locator(".jp-CodeCell", has=self.page.locator(".cm-content", has_text=mark))

    def ended(self, mark: str) -> Locator:
        """The output of the cell with that text in its code, when it has ended."""
        self.has_ended(self.cell(mark))
        return self.cell(mark).locator(".jp-Cell-outputArea")

    def answer(self, cell: Locator, text: str) -> None:
        box = cell.locator("input.jp-Stdin-input").last
        box.fill(text)
        box.press("Enter")

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

    def reload(self) -> dict[str, Any]:
        """The page is loaded again while a cell prints and another one waits. Both get all of their output."""
        self.notebook = Notebook(self.page, self.address, "reload.ipynb")
        cell = self.notebook.start("import time\nfor n in range(40): print(n, flush=True); time.sleep(0.2)")
        self.notebook.start('print("second", 6 * 7)')
        self.notebook.save()
        expect(cell.locator(".jp-Cell-outputArea")).to_contain_text("3")
        self.page.reload()
        outputs = [self.notebook.ended(mark) for mark in ("range(40)", '"second"')]
        return {"numbers": outputs[0].inner_text().split(), "second": outputs[1].inner_text().strip()}

    def away(self) -> dict[str, Any]:
        """No page is there until a cell has ended. A page that comes then has its text and picture as they ended."""
        code = 'for n in range(20): clear_output(wait=True); print("step", n); time.sleep(0.2)\nImage(png)'
        self.notebook.start(f"{PICTURE}from IPython.display import Image, clear_output\n{code}")
        self.notebook.save()
        self.page.goto("about:blank")
        time.sleep(6)
        self.notebook = Notebook(self.page, self.address, "reload.ipynb")
        output = self.notebook.ended("clear_output")
        text = output.locator(".jp-RenderedText").first.inner_text()
        return {"text": text.strip(), "png": picture_size(output.locator("img"))}

    def question(self) -> dict[str, Any]:
        """A cell that asks something asks it again on the new page."""
        cell = self.notebook.start('time.sleep(3); print("got", input("first? "), input("name? "))')
        self.notebook.save()  # JupyterLab saves nothing while a question is open
        self.notebook.answer(cell, "one")
        expect(cell.locator(".jp-Stdin-prompt", has_text="name?")).to_be_visible()
        self.page.reload()
        cell = self.notebook.cell("input(")
        expect(cell.locator("input.jp-Stdin-input")).to_have_count(1)
        self.notebook.answer(cell, "two")
        return {"text": self.notebook.ended("input(").locator("pre", has_text="got").inner_text().strip()}

    def unsaved(self) -> dict[str, Any]:
        """Output that came, but was not saved before the reload, comes again. What was cleared and saved does not."""
        for text in ("kept", "cleared"):
            self.notebook.run(f'print("{text}", 1)')
        self.notebook.save()
        self.page.get_by_role("menuitem", name="Edit").click()
        self.page.get_by_role("menuitem", name="Clear Cell Output", exact=True).click()
        self.notebook.save()
        cell = self.notebook.cell('"kept"')
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        self.notebook.has_ended(cell)
        prompt = cell.locator(".jp-InputArea-prompt").inner_text()
        self.page.reload()
        self.notebook.is_idle()
        cell = self.notebook.cell('"kept"')
        expect(cell.locator(".jp-InputArea-prompt")).to_have_text(prompt)
        cleared = self.notebook.cell('"cleared"').locator(".jp-OutputArea-output")
        return {"text": cell.locator(".jp-Cell-outputArea").inner_text().strip(), "cleared": cleared.count()}

    def prompt(self) -> str:
        return self.notebook.panel.locator(".jp-CodeCell .jp-InputArea-prompt").last.inner_text()


SETS = {
    "stock": ("text", "figure", "restart"),
    "ours": ("text", "table", "figure", "input", "widget", "large", "interrupt", "files", "restart", "attach"),
    "reload": ("reload", "away", "question", "unsaved"),
}


def picture_size(image: Locator) -> list[int]:
    """Width and height of a picture, after it is decoded."""
    expect(image).to_be_visible()
    size: list[int] = image.evaluate(
        "async each => { await each.decode(); return [each.naturalWidth, each.naturalHeight] }"
    )
    return size


def main(address: str, screenshot: str, names: str, kernel: str = "") -> int:
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1400, "height": 2200})
        page.set_default_timeout(SECONDS * 1000)
        page.on("dialog", lambda dialog: dialog.accept())  # a browser asks before it leaves what is not saved
        steps = Steps(page, address, kernel)
        for name in SETS[names]:
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
