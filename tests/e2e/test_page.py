"""The web page in Debian's Chromium, over real agents and kernels (driver `unisolated`). One browser serves all tests.

A test fails if the page tells an error or breaks its own policy without the test having announced it, or if it asks
another server for anything.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, async_playwright, expect

from kernel_gateway.drivers.unisolated import Unisolated
from tests.e2e.browser import FLAGS, PICTURE
from tests.e2e.conftest import cached, install_packages, run
from tests.fakes import Service, serving

FRONTEND = Path(__file__).parents[2] / "frontend"
BUILT = Path(__file__).parents[2] / "kernel_gateway" / "_page"


@pytest.fixture(scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service over real agents and kernels."""
    directory = tmp_path_factory.mktemp("agents")
    async with serving(directory, Unisolated(directory), max_sandboxes=8) as running:
        yield running


@pytest.fixture(scope="module")
async def box(real: Service) -> str:
    """One sandbox for all tests that leave it alive."""
    return await real.create(metadata={"name": "shared"}, timeout=3600)


@pytest.fixture(scope="module")
async def browser(programs: None) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        yield chromium
        await chromium.close()


class Tab:
    """A page of the server, signed in unless told otherwise. `announced` are parts of errors that are expected."""

    def __init__(self, page: Page, service: Service) -> None:
        self.page = page
        self.service = service
        self.announced: list[str] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def open(self, where: str = "") -> None:
        """Sign in by the address, as `cellvm serve` prints it, and go there."""
        await self.page.goto(f"{self.service.url}/#key={self.service.key}")
        await expect(self.page.get_by_role("button", name="Sign out")).to_be_visible()
        if where:
            await self.page.goto(f"{self.service.url}/#/{where}")

    async def run(self, code: str) -> Locator:
        """Run a cell by the editor. Returns it."""
        editor = self.page.get_by_role("textbox", name="Code of the next cell")
        await editor.fill(code)
        await self.page.keyboard.press("Shift+Enter")
        return self.cell(code.split("\n")[0])

    def cell(self, code: str) -> Locator:
        """The newest cell with that text in its code."""
        return self.page.locator("article", has=self.page.locator(".code", has_text=code)).last

    def check(self) -> None:
        strange = [text for text in self.complaints if not any(part in text for part in self.announced)]
        assert not strange, strange
        away = [url for url in self.requests if not url.startswith((self.service.url, "data:", "blob:"))]
        assert not away, away


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    async with await browser.new_context(viewport={"width": 1280, "height": 860}) as made:
        made.set_default_timeout(20_000)
        yield made


@pytest.fixture
async def tab(context: BrowserContext, real: Service) -> AsyncIterator[Tab]:
    made = Tab(await context.new_page(), real)
    yield made
    made.check()


# -- the key


async def test_signing_in_by_hand(tab: Tab, real: Service, box: str) -> None:
    """A wrong key is an alert. A right one signs in, and leads to a first result. (1, 3)"""
    tab.announced.append("401")
    await tab.page.goto(f"{real.url}/#/{box}")
    await tab.page.get_by_label("API key").fill("e2b_" + "0" * 40)
    await tab.page.get_by_role("button", name="Sign in").click()
    await expect(tab.page.get_by_role("alert")).to_contain_text("The key is not known", ignore_case=True)
    await tab.page.get_by_label("API key").fill(real.key)
    await tab.page.get_by_role("button", name="Sign in").click()
    cell = await tab.run("1 + 1")
    await expect(cell.locator(".outputs")).to_have_text("2")


async def test_a_key_in_the_address(tab: Tab, real: Service, caplog: pytest.LogCaptureFixture) -> None:
    """The key in the fragment signs in. Then neither address, history, requests nor log hold it. (2)"""
    await tab.open()
    assert tab.page.url == f"{real.url}/"
    await tab.page.go_back()
    assert real.key not in tab.page.url
    assert not [url for url in tab.requests if real.key in url]
    assert real.key not in caplog.text


async def test_other_tabs(tab: Tab, context: BrowserContext, real: Service) -> None:
    """A second tab is signed in without typing, and signing out in one signs out both. (4)"""
    await tab.open()
    other = await context.new_page()
    await other.goto(real.url)
    await other.get_by_role("button", name="Sign out").click()
    for page in (tab.page, other):
        await expect(page.get_by_label("API key")).to_be_visible()
        assert await page.evaluate("sessionStorage.getItem('cellvm.key')") is None


# -- cells


async def test_a_cell_of_an_agent(tab: Tab, real: Service, box: str) -> None:
    """A cell by `/execute` appears while it runs, with its code and the client's name. (5)"""
    await tab.open(box)
    code = "import time\nprint('here')\ntime.sleep(1)"
    body = {"code": code}
    running = asyncio.create_task(
        real.call("POST", f"/sandboxes/{box}/execute", body, headers={"X-Client-Name": "agent-42"})
    )
    cell = tab.cell("time.sleep(1)")
    await expect(cell.locator(".outputs")).to_have_text("here")
    assert not running.done()
    await expect(cell).to_have_attribute("aria-label", "Cell 2 by agent-42, running")
    await expect(cell.locator(".author")).to_have_text("agent-42")
    await running
    await expect(cell).not_to_have_class("running")


async def test_outputs(tab: Tab, box: str) -> None:
    """A picture, a table, SVG, progress, an updated display and a coloured traceback are shown. (14, in part)"""
    await tab.open(box)
    picture = await tab.run(f"{PICTURE}from IPython.display import Image\nImage(png)")
    picture = tab.cell("Image(png)").locator("img")
    assert await picture.evaluate("async each => { await each.decode(); return each.naturalWidth }") == 37
    await tab.run("display({'text/html': '<table><tr><td>cell</td></tr></table>'}, raw=True)")
    table = tab.cell("<table>").frame_locator("iframe").locator("td")
    await expect(table).to_have_text("cell")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><script>alert(1)</script></svg>'
    await tab.run(f"display({{'image/svg+xml': '{svg}'}}, raw=True)")
    await expect(tab.cell("svg+xml").locator("img")).to_have_js_property("naturalWidth", 30)
    await tab.run("for n in range(101): print(f'\\r{n} %', end='')")
    await expect(tab.cell("{n} %").locator(".outputs")).to_have_text("100 %")
    await tab.run("shown = display('before', display_id='d')\nshown.update('after')")
    await expect(tab.cell("shown.update").locator(".outputs")).to_have_text("'after'")
    await tab.run("1 / 0")
    failed = tab.cell("1 / 0")
    await expect(failed.locator("header")).to_contain_text("ZeroDivisionError")
    await expect(failed.locator(".f1").first).to_be_visible()


async def test_input(tab: Tab, context: BrowserContext, real: Service, box: str) -> None:
    """Another client's cell asks in two pages. One answers, the other says who did, and nobody shows a secret. (8)"""
    await tab.open(box)
    other = Tab(await context.new_page(), real)
    await other.page.goto(f"{real.url}/#/{box}")
    await tab.run("import getpass\nlen(getpass.getpass('secret? '))")
    cells = [each.cell("getpass") for each in (tab, other)]
    for cell in cells:
        await expect(cell.get_by_label("secret?")).to_be_visible()
    await cells[1].get_by_label("secret?").fill("hunter2")
    await other.page.keyboard.press("Enter")
    for cell in cells:
        await expect(cell.locator(".outputs")).to_contain_text("answered by web page")
        await expect(cell.locator(".outputs")).to_contain_text("7")
    for page in (tab.page, other.page):
        assert "hunter2" not in await page.content()


async def test_interrupt_from_the_list(tab: Tab, real: Service) -> None:
    """The list tells what a kernel does, and stops a runaway in a sandbox that is not open. (9)"""
    box = await real.create(metadata={"name": "runaway"})
    running = asyncio.create_task(real.execute(box, "while True: pass"))
    await tab.open()
    row = tab.page.get_by_role("row", name="runaway")
    await expect(row).to_contain_text("busy")
    await row.get_by_role("button", name="Interrupt runaway").click()
    assert (await running)["error"]["name"] == "KeyboardInterrupt"
    await expect(row).to_contain_text("idle")
    await real.call("DELETE", f"/sandboxes/{box}")
    await expect(row).to_have_count(0)


async def test_a_hold(tab: Tab, real: Service, box: str) -> None:
    """Cells of others wait while a page holds them, are shown, and run when they are let go. (10, in part)"""
    await tab.open(box)
    await tab.page.get_by_role("button", name="Hold others").click()
    await expect(tab.page.locator(".held")).to_contain_text("held by you")
    waiting = asyncio.create_task(real.execute(box, "'waited'"))
    await expect(tab.page.locator(".waiting")).to_contain_text("'waited'")
    await tab.page.get_by_role("button", name="Let others run").click()
    assert (await waiting)["outcome"] == "finished"
    await expect(tab.page.locator(".waiting")).to_have_count(0)


async def test_a_kernel_that_dies(tab: Tab, box: str) -> None:
    """Why the kernel was restarted and that variables are gone is said, and the next cell works. (11)"""
    await tab.open(box)
    await tab.run("import os; os._exit(1)")
    note = tab.page.get_by_role("note").last
    await expect(note).to_contain_text("exit code 1")
    await expect(note).to_contain_text("variables are gone")
    await tab.run("'alive'")
    await expect(tab.cell("'alive'").locator(".outputs")).to_have_text("'alive'")


async def test_a_sandbox_that_ends(tab: Tab, real: Service) -> None:
    """The banner and the list tell why. The transcript stays, and the page saves a valid notebook. (12, 13)"""
    box = await real.create()
    tab.announced.append("404")
    await tab.open(box)
    await tab.run("print('kept')")
    await expect(tab.cell("kept").locator(".outputs")).to_have_text("kept")
    await real.sandboxes.get(real.owner, box).guest.vm.kill()
    banner = tab.page.get_by_role("alert").filter(has_text="has ended")
    await expect(banner).to_contain_text("its machine ended by itself")
    await expect(tab.cell("kept").locator(".outputs")).to_have_text("kept")
    async with tab.page.expect_download() as download:
        await banner.get_by_role("button", name="Save as notebook").click()
    book = nbformat.read(await (await download.value).path(), as_version=4)
    nbformat.validate(book)
    assert book.cells[0].outputs[0].text == "kept\n"
    await banner.get_by_role("button", name="All sandboxes").click()
    await tab.page.get_by_role("radio", name="Ended, 24 h").check()
    await expect(tab.page.get_by_role("row", name=box)).to_contain_text("died")


# -- the built files


async def test_the_bundle_is_the_committed_one(programs: None, tmp_path: Path) -> None:
    """The sources make the committed files, byte for byte. (25, in part)"""

    def make(directory: Path) -> None:
        install_packages(FRONTEND, directory)

    packages = cached("page", FRONTEND / "package-lock.json", make)
    shutil.copytree(FRONTEND, tmp_path / "frontend", ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "frontend" / "node_modules").symlink_to(packages / "node_modules")
    run(["node", "build.mjs", str(tmp_path / "built")], cwd=tmp_path / "frontend")
    made, committed = (
        {each.name: each.read_bytes() for each in folder.iterdir()} for folder in (tmp_path / "built", BUILT)
    )
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


async def headers_of(service: Service, path: str, **options: Any) -> dict[str, str]:
    answer = await service.call("GET", path, key=None, **options)
    assert answer.code == 200, answer.body
    return dict(answer.headers)


async def test_headers(real: Service) -> None:
    """Each document has its policy, and nothing else can be framed. An address with a key is refused. (19)"""
    host = f"127.0.0.1:{real.port}"
    page = await headers_of(real, "/")
    assert page["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        f"connect-src 'self' ws://{host} wss://{host}; "
        f"frame-src {host}/ui/still.html {host}/ui/live.html {host}/ui/terminal.html; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    assert (page["X-Frame-Options"], page["Referrer-Policy"]) == ("DENY", "no-referrer")
    assert page["Cross-Origin-Opener-Policy"] == "same-origin"
    assert page["Cache-Control"] == "no-cache"
    still = await headers_of(real, "/ui/still.html")
    assert still["Content-Security-Policy"] == (
        f"sandbox allow-scripts; default-src 'none'; script-src {host}/ui/frame.js {host}/ui/lib/; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; media-src data: blob:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
    )
    assert "X-Frame-Options" not in still
    live = await headers_of(real, "/ui/live.html")
    assert (
        "'unsafe-inline' 'unsafe-eval' blob: data:; worker-src blob:; connect-src 'none'"
        in live["Content-Security-Policy"]
    )
    assert (await headers_of(real, "/ui/frame.js"))["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert (await headers_of(real, "/health"))["X-Frame-Options"] == "DENY"
    strange = await headers_of(real, "/", headers={"Host": "[::1]:8888"})
    assert "frame-src 'self'" in strange["Content-Security-Policy"]
    for path in ("/", "/ui/app.js"):
        assert (await real.call("GET", f"/t/{real.key}{path}", key=None)).code == 400
    again = await real.call("GET", "/", key=None, headers={"If-None-Match": page["Etag"]})
    assert again.code == 304
    missing = await real.call("GET", "/ui/nothing.js", key=None)
    assert (missing.code, json.loads(missing.body)["error"]) == (404, "not_found")
