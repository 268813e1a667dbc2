"""The web page in Debian's Chromium, over real agents and kernels (driver `unisolated`). One browser serves all tests.

A test fails if the page tells an error or breaks its own policy without the test having announced it, or if it asks
another server for anything.
"""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

from kernel_gateway.api.app import watch_keys
from kernel_gateway.drivers.unisolated import Unisolated
from tests.api.clients import channels
from tests.e2e import hostile as hostile_output
from tests.e2e.browser import PICTURE
from tests.e2e.conftest import cached, install_packages, run
from tests.e2e.tab import RESULTS, Tab
from tests.fakes import SavingDriver, Service, serving

pytestmark = pytest.mark.alone
"""A browser, a server and a kernel have two processors to share already."""

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
def packages(programs: None, progress: Any) -> Path:
    """The folder of the page's JavaScript packages, from its lock file."""

    def make(directory: Path) -> None:
        progress(f"installing the page's packages in {directory}")
        install_packages(FRONTEND, directory)

    return cached("page", FRONTEND / "package-lock.json", make) / "node_modules"


@pytest.fixture
async def tab(context: BrowserContext, real: Service) -> AsyncIterator[Tab]:
    made = Tab(await context.new_page(), real.url, real.key)
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
    """A cell by `/execute` appears while it runs, with its code and the client's name. So does one of Jupyter's. (5)"""
    await tab.open(box)
    code = "import time\nprint('here')\ntime.sleep(1)"
    body = {"code": code}
    running = asyncio.create_task(
        real.call("POST", f"/sandboxes/{box}/execute", body, headers={"X-Client-Name": "agent-42"})
    )
    cell = tab.cell("time.sleep(1)")
    await expect(cell.locator(".outputs")).to_have_text("here")
    assert not running.done()
    await expect(cell).to_have_attribute("aria-label", re.compile(r"Cell \d+ by agent-42, running"))
    await expect(cell.locator(".author")).to_have_text("agent-42")
    await running
    await expect(cell).not_to_have_class("running")
    async with channels(real, json.loads((await real.call("GET", f"/sandboxes/{box}")).body)["kernelID"]) as client:
        await client.run("'from Jupyter'")
    await expect(tab.cell("'from Jupyter'").locator(".author")).to_have_text("tests")


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
    other = Tab(await context.new_page(), real.url, real.key)
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


async def test_a_hold(tab: Tab, real: Service, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of others wait while a page holds them, are shown, and run when it lets them or is closed. (10)"""
    monkeypatch.setattr("kernel_gateway.kernel.kernel.HOLD_GRACE", 0.2)
    await tab.open(box)
    await tab.page.get_by_role("button", name="Hold others").click()
    await expect(tab.page.locator(".held")).to_contain_text("held by you")
    waiting = asyncio.create_task(real.execute(box, "'waited'"))
    await expect(tab.page.locator(".waiting")).to_contain_text("'waited'")
    await tab.page.get_by_role("button", name="Let others run").click()
    assert (await waiting)["outcome"] == "finished"
    await expect(tab.page.locator(".waiting")).to_have_count(0)
    await tab.page.get_by_role("button", name="Hold others").click()
    await expect(tab.page.locator(".held")).to_contain_text("held by you")
    waiting = asyncio.create_task(real.execute(box, "'waited again'"))
    await expect(tab.page.locator(".waiting")).to_contain_text("'waited again'")
    await tab.page.close()
    assert (await waiting)["outcome"] == "finished"


async def test_variables(tab: Tab, box: str) -> None:
    """Variables are listed while a cell runs, and a value that would take long to show disturbs nothing. (22)"""
    await tab.open(box)
    await tab.run("import time\nclass Bad:\n    def __repr__(self): time.sleep(60)\nbad, answer = Bad(), 42")
    await tab.run("import time; time.sleep(30)")
    await expect(tab.cell("time.sleep(30)")).to_have_class("cell running")
    listed = tab.page.locator(".variables > div")
    await expect(listed.filter(has_text="answer")).to_contain_text("42", timeout=10_000)
    await expect(listed.filter(has_text="bad")).to_be_visible()
    await tab.page.get_by_role("button", name="Interrupt", exact=True).click()
    await expect(tab.cell("time.sleep(30)")).to_have_class("cell failed")


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
    killed, late = await real.create(), await real.create(timeout=1)
    await real.call("DELETE", f"/sandboxes/{killed}")
    await expect(tab.page.get_by_role("row", name=killed)).to_contain_text("kill")
    await expect(tab.page.get_by_role("row", name=late)).to_contain_text("timeout")


# -- sandboxes as a whole


@pytest.fixture
async def saving(tmp_path: Path) -> AsyncIterator[Service]:
    """A service over fake machines that can be saved."""
    driver = SavingDriver()
    async with serving(tmp_path, driver) as running:
        yield running
    await driver.close()


async def test_snapshots_forks_and_pauses(context: BrowserContext, saving: Service) -> None:
    """A snapshot is taken, started from and deleted, a fork is opened, and a pause ends where it began. (J11, J12)"""
    tab = Tab(await context.new_page(), saving.url, saving.key)
    tab.announced.append("409")  # a reading that is asked for while the sandbox is being paused
    page, box = tab.page, await saving.create()

    async def choose(name: str) -> None:
        await page.get_by_role("button", name="More", exact=True).click()
        await page.get_by_role("button", name=name, exact=True).click()

    async def is_elsewhere(*before: str) -> str:
        await page.wait_for_function("before => !before.some((each) => location.hash.includes(each))", arg=before)
        await expect(tab.page.locator(".state")).to_contain_text("idle")
        return page.url.rpartition("/")[2]

    await tab.open(box)
    await choose("Snapshots…")
    await page.get_by_label("Name").fill("before-7")
    await page.get_by_role("button", name="Take a snapshot").click()
    await page.get_by_role("button", name="Start before-7").click()
    started = await is_elsewhere(box)
    await choose("Fork and open the copy")
    forked = await is_elsewhere(box, started)
    await choose("Pause…")
    await page.get_by_role("button", name="Pause", exact=True).click()
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator(".state")).to_contain_text("idle")
    await page.goto(f"{saving.url}/#/")
    await expect(page.locator("tbody tr")).to_have_count(3)
    row = page.locator("tr", has_text=forked[:12])
    await row.get_by_role("button", name="More").click()
    await page.get_by_role("button", name="End…").click()
    await page.get_by_role("button", name="End", exact=True).click()
    await expect(page.locator("tbody tr")).to_have_count(2)
    await page.get_by_role("button", name="New sandbox").click()
    await page.get_by_role("button", name="From a snapshot…").click()
    await page.get_by_role("button", name="Delete before-7").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(page.get_by_role("dialog", name="Snapshots")).to_contain_text("There is no snapshot yet")
    assert json.loads((await saving.call("GET", "/snapshots")).body) == []
    tab.check()


async def test_the_way_back(context: BrowserContext, saving: Service) -> None:
    """The timeline has a way back to before a cell, and the next cell of another client finds what was then. (J11)"""
    tab = Tab(await context.new_page(), saving.url, saving.key)
    page, box = tab.page, await saving.create()

    async def value() -> Any:
        return (await saving.execute(box, "x"))["results"][0]["data"]["text/plain"]

    await saving.execute(box, "x = 'then'")
    await tab.open(box)
    await page.get_by_role("button", name="More", exact=True).click()
    await page.get_by_role("button", name="Timeline…", exact=True).click()
    timeline = page.get_by_role("dialog", name="Timeline")
    await timeline.get_by_role("button", name="Take a checkpoint").click()
    await expect(timeline.get_by_text("Checkpoint 1", exact=True)).to_be_visible()
    await timeline.get_by_role("button", name="Close").click()
    await saving.execute(box, "x = 'now'")
    assert "now" in await value()
    await page.get_by_role("button", name="More", exact=True).click()
    await page.get_by_role("button", name="Timeline…", exact=True).click()
    back = timeline.get_by_role("button", name="Go back to before cell")
    await expect(back).to_have_count(1)
    await expect(back.locator("..")).to_contain_text("x = 'now'")
    await page.set_viewport_size({"width": 320, "height": 640})
    assert await timeline.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
    await back.click()
    await page.get_by_role("button", name="Go back", exact=True).click()
    await expect(timeline).to_contain_text("Went back to checkpoint 1")
    await timeline.get_by_role("button", name="Delete checkpoint 1").click()
    await expect(timeline).to_contain_text("deleted")
    await expect(timeline.get_by_role("button", name="Go back")).to_have_count(0)
    await timeline.get_by_role("button", name="Close").click()
    await expect(page.get_by_role("note")).to_contain_text("The sandbox went back to checkpoint 1.")
    assert "then" in await value()
    tab.check()


async def test_checkpoints_from_the_beginning(context: BrowserContext, saving: Service) -> None:
    """A sandbox that is created with ways back has a checkpoint after its first cell. (J11)"""
    tab = Tab(await context.new_page(), saving.url, saving.key)
    await saving.create()  # a list that is not empty
    await tab.open()
    await tab.page.get_by_role("button", name="New sandbox").click()
    await tab.page.get_by_label("Checkpoint after each cell").check()
    await tab.page.locator(".items:popover-open").get_by_role("button").first.click()
    cell = await tab.run("1")
    await expect(cell).to_have_class("cell done")
    await tab.page.get_by_role("button", name="More", exact=True).click()
    await tab.page.get_by_role("button", name="Timeline…", exact=True).click()
    await expect(tab.page.get_by_role("dialog", name="Timeline")).to_contain_text("Checkpoint 1")
    tab.check()


async def test_what_the_server_can_not_do(tab: Tab, box: str) -> None:
    """There is no button for what the server does not name."""
    await tab.open(box)
    await tab.page.get_by_role("button", name="More", exact=True).click()
    await expect(tab.page.get_by_role("button", name="Ports…")).to_be_visible()
    for name in ("Snapshots…", "Fork and open the copy", "Pause…"):
        await expect(tab.page.get_by_role("button", name=name)).to_have_count(0)


async def test_ports(tab: Tab, real: Service, box: str) -> None:
    """A service is opened in a tab of its own, which can't reach the page, and closed again. (J10)"""
    tab.announced.append("404")
    code = "import subprocess, os\nos.makedirs('site', exist_ok=True)\nopen('site/index.html', 'w').write('served')\n"
    await real.execute(box, code + "web = subprocess.Popen(['python3', '-m', 'http.server', '8123', '-d', 'site'])")
    await tab.open(box)
    await tab.page.get_by_role("button", name="More", exact=True).click()
    await tab.page.get_by_role("button", name="Ports…").click()
    await tab.page.get_by_label("Port", exact=True).fill("8123")
    await tab.page.get_by_role("button", name="Open", exact=True).click()
    async with tab.page.context.expect_page() as opened:
        await tab.page.get_by_role("link", name="8123").click()
    service = await opened.value
    for _ in range(50):  # the service has begun to listen at some time
        if "served" in await service.content():
            break
        await asyncio.sleep(0.1)
        await service.reload()
    assert "served" in await service.content()
    assert await service.evaluate("[window.opener, document.referrer, sessionStorage.length]") == [None, "", 0]
    await service.close()
    await tab.page.get_by_role("button", name="Close port 8123").click()
    await expect(tab.page.get_by_role("link", name="8123")).to_have_count(0)
    await real.execute(box, "web.kill()")


async def test_links(tab: Tab, browser: Browser, real: Service, box: str) -> None:
    """A link shows one sandbox to somebody without a key, to watch it or to use it, until it is revoked."""
    watching = asyncio.create_task(watch_keys(real.app))
    await tab.open(box)
    await tab.run("'before'")
    await tab.page.get_by_role("button", name="More", exact=True).click()
    await tab.page.get_by_role("button", name="Share…").click()
    for mode, may_use in (("watch", False), ("use", True)):
        await tab.page.get_by_label("Others may").select_option(mode)
        await tab.page.get_by_role("button", name="Make a link").click()
        url = tab.page.get_by_label("Link, shown once")
        await expect(url).to_have_value(re.compile(f"#{mode}="))
        async with await browser.new_context() as elsewhere:
            other = Tab(await elsewhere.new_page(), real.url, real.key)
            other.announced += ["401", "WebSocket"]
            await other.page.goto(await url.input_value())
            await expect(other.cell("'before'").locator(".outputs")).to_have_text("'before'")
            assert other.page.url == f"{real.url}/#/{box}"
            for name in ("Interrupt", "Restart…", "Hold others", "Run"):
                await expect(other.page.get_by_role("button", name=name, exact=True)).to_have_count(int(may_use))
            await expect(other.page.get_by_role("link", name="Terminal")).to_have_count(int(may_use))
            await expect(other.page.get_by_role("link", name="All sandboxes")).to_have_count(0)
            if may_use:
                await other.run("'theirs'")
                await expect(tab.cell("'theirs'").locator(".outputs")).to_have_text("'theirs'")
            await other.page.get_by_role("link", name="Files").click()
            await expect(other.page.get_by_role("button", name="Upload…")).to_be_enabled(enabled=may_use)
            await other.page.reload()
            await expect(other.page.get_by_role("button", name="Upload…")).to_be_enabled(enabled=may_use)
            await tab.page.get_by_role("button", name="Revoke").click()
            await expect(other.page.get_by_role("alert")).to_contain_text("not good any more")
            other.check()
        await expect(tab.page.get_by_role("dialog")).to_contain_text("There is no link.")
    watching.cancel()


async def test_keys(tab: Tab, box: str) -> None:
    """Names are completed, `?` lists the keys, and F6 moves between the parts of the page. (23, in part)"""
    await tab.open(box)
    cell = await tab.run("häuser_total, häuser_table = 1, 2")
    await expect(cell).to_have_class("cell done")
    page, editor = tab.page, tab.page.get_by_role("textbox", name="Code of the next cell")

    async def write(text: str) -> None:
        await page.keyboard.press("Control+a")
        await page.keyboard.press("Backspace")
        await page.keyboard.type(text)

    await write("'ö😀', häu")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("option")).to_have_count(2)
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Tab")
    await expect(editor).to_have_text("'ö😀', häuser_total")
    await write("if 1:")
    await page.keyboard.press("Tab")
    await expect(editor).to_have_text("if 1:    ")
    await page.keyboard.press("Escape")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Run", exact=True)).to_be_focused()
    await page.keyboard.press("F6")
    await expect(page.get_by_role("link", name="All sandboxes")).to_be_focused()
    await page.keyboard.press("F6")
    await expect(page.get_by_role("link", name="Cells")).to_be_focused()
    await page.keyboard.press("Shift+F6")
    await expect(page.get_by_role("link", name="All sandboxes")).to_be_focused()
    await tab.cell("häuser_total").focus()
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog", name="Keys")).to_contain_text("F6")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)


async def reach(wanted: Locator) -> None:
    """Press Tab until that has the focus."""
    await wanted.wait_for()
    for _ in range(60):
        await wanted.page.keyboard.press("Tab")
        if await wanted.evaluate("each => each === document.activeElement"):
            return
    raise AssertionError(f"Tab does not reach {wanted}")


async def test_a_newcomer_without_a_mouse(context: BrowserContext, real: Service, tmp_path: Path) -> None:
    """Signing in, a sandbox, a result, a chart, files, the notebook and the end, by keyboard alone. (23)"""
    tab = Tab(await context.new_page(), real.url, real.key)
    tab.announced.append("404")  # the sandbox ends while its page is open
    page = tab.page
    content = bytes(range(256))
    (tmp_path / "up.bin").write_bytes(content)

    def button(name: str, *, exact: bool = True) -> Locator:
        return page.get_by_role("button", name=name, exact=exact)

    async def choose(*wanted: Locator) -> None:
        for each in wanted:
            await reach(each)
            await page.keyboard.press("Enter")

    await page.goto(real.url)
    await expect(page.get_by_label("API key")).to_be_focused()
    await page.keyboard.type(real.key)
    await page.keyboard.press("Enter")
    await choose(button("New sandbox"), page.locator(".items:popover-open button").first)
    editor = page.get_by_role("textbox", name="Code of the next cell")
    await expect(editor).to_be_focused()
    await page.keyboard.type("1 + 1")
    await page.keyboard.press("Shift+Enter")
    await expect(tab.cell("1 + 1").locator(".outputs")).to_have_text("2")
    await page.keyboard.insert_text(f"{PICTURE}from IPython.display import Image\nImage(png)")
    await page.keyboard.press("Shift+Enter")
    await expect(tab.cell("Image(png)").locator("img")).to_be_visible()
    await page.keyboard.press("F6")
    await choose(page.get_by_role("link", name="Files"))
    async with page.expect_file_chooser() as chooser:
        await choose(button("Upload…"))
    await (await chooser.value).set_files(tmp_path / "up.bin")
    await choose(button("up.bin"))
    async with page.expect_download() as download:
        await choose(button("Download"))
    assert Path(await (await download.value).path()).read_bytes() == content
    await choose(button("More"))
    async with page.expect_download() as download:
        await choose(button("Save as notebook"))
    assert len(nbformat.read(await (await download.value).path(), as_version=4).cells) == 2
    await choose(button("More"), button("End…"), button("End"))
    await choose(page.get_by_role("alert").get_by_role("button", name="All sandboxes"))
    await expect(page.get_by_role("button", name="New sandbox")).to_be_visible()
    tab.check()


# -- the built files


@pytest.fixture
def sources(packages: Path, tmp_path: Path) -> Path:
    """A copy of the page's sources, with the packages of its lock file."""
    copied = tmp_path / "frontend"
    shutil.copytree(FRONTEND, copied, ignore=shutil.ignore_patterns("node_modules"))
    (copied / "node_modules").symlink_to(packages)
    return copied


def test_the_bundle_is_the_committed_one(sources: Path, tmp_path: Path) -> None:
    """The sources make the committed files, byte for byte. (25, in part)"""
    built = tmp_path / "built"
    run(["node", "build.mjs", str(built)], cwd=sources)
    made, committed = ({each.name: each.read_bytes() for each in folder.iterdir()} for folder in (built, BUILT))
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


def test_the_sources(sources: Path) -> None:
    """The types, the format and the tests of the pure modules are right."""
    run(["npm", "run", "check"], cwd=sources)
    run(["npm", "test"], cwd=sources)


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


# -- connections


async def test_a_reload_amid_output(tab: Tab, real: Service, box: str) -> None:
    """After a reload amid 20,000 prints the text is what was printed, to the byte. (6)"""
    await tab.open(box)
    await tab.run("for n in range(20_000): print('line', n, flush=True)")
    await expect(tab.cell("20_000").locator(".outputs")).to_contain_text("line 300")
    await tab.page.reload()
    cell = tab.cell("20_000")
    await expect(cell).to_have_class("cell done", timeout=60_000)
    text = "".join(f"line {n}\n" for n in range(20_000))
    await expect(cell.locator("pre").last).to_be_attached()
    assert await until_text(cell, text) == text


async def until_text(cell: Locator, wanted: str) -> str:
    """The text of a cell's output, when all of it is drawn."""
    found = ""
    for _ in range(200):
        found = await cell.locator(".outputs pre:not(:empty)").evaluate_all(
            "all => all.map((each) => each.textContent).join('')"
        )
        if len(found) >= len(wanted):
            break
        await asyncio.sleep(0.05)
    return found


def cut(service: Service, box: str) -> None:
    """Cut all connections to a sandbox's kernel, as a network does that breaks."""
    for client in list(service.sandboxes.get(service.owner, box).guest.kernel.clients):
        client._stream.close()  # type: ignore[attr-defined]


async def test_lost_connections(tab: Tab, real: Service, box: str) -> None:
    """The banner comes and goes. No output is lost, and a cell that is run meanwhile runs once. (7)"""
    tab.announced += ["ERR_", "WebSocket", "503"]
    await real.execute(box, "runs = 0")
    await tab.open(box)
    await tab.run("import time\nfor n in range(300): print('beat', n, flush=True); time.sleep(0.02)")
    for _ in range(5):
        cut(real, box)
        await asyncio.sleep(0.3)
    real.sandboxes.places.is_draining = True  # new connections are refused
    cut(real, box)
    await expect(tab.page.get_by_role("alert")).to_contain_text("trying again")
    await tab.run("runs += 1; print('runs', runs)")
    real.sandboxes.places.is_draining = False
    await expect(tab.page.get_by_role("alert")).to_have_count(0)
    await expect(tab.cell("runs += 1").locator(".outputs")).to_have_text("runs 1", timeout=30_000)
    text = "".join(f"beat {n}\n" for n in range(300))
    assert await until_text(tab.cell("'beat'"), text) == text


# -- files and terminals


async def test_files(tab: Tab, real: Service, box: str, tmp_path: Path) -> None:
    """Files go up, are shown, come down to the byte, and are deleted. Their names are text. (20, in part)"""
    content = bytes(range(256)) * 4000
    (tmp_path / "up.bin").write_bytes(content)
    (tmp_path / "notes.txt").write_text("grüße\n" * 300)
    await tab.open(f"{box}/files")
    await tab.page.get_by_label("Files to upload").set_input_files([tmp_path / "up.bin", tmp_path / "notes.txt"])
    await tab.page.get_by_role("button", name="notes.txt", exact=True).click()
    preview = tab.page.get_by_role("region", name="Preview of notes.txt")
    await expect(preview.locator("pre")).to_contain_text("grüße")
    await expect(preview).to_contain_text("beginning of the file")
    await tab.page.get_by_role("button", name="up.bin", exact=True).click()
    async with tab.page.expect_download() as download:
        await tab.page.get_by_role("button", name="Download", exact=True).click()
    assert Path(await (await download.value).path()).read_bytes() == content
    await tab.page.get_by_role("button", name="Delete…").click()
    await tab.page.get_by_role("button", name="Delete", exact=True).click()
    await expect(tab.page.get_by_role("button", name="up.bin", exact=True)).to_have_count(0)
    await tab.page.get_by_role("button", name="New folder…").click()
    await tab.page.get_by_label("Name").fill("<b>new")
    await tab.page.get_by_role("button", name="Make").click()
    await expect(tab.page.get_by_label("Folder", exact=True)).to_contain_text("<b>new")


async def test_dropped_files(tab: Tab, real: Service, box: str) -> None:
    """Files that are dropped go up one by one. One that is cancelled leaves the old file as it was. (20, in part)"""
    await real.run(box, "sh", "-c", "mkdir dropped; echo old > dropped/large")
    await tab.open(f"{box}/files/dropped")
    await expect(tab.page.get_by_role("button", name="large", exact=True)).to_be_visible()
    network = await tab.page.context.new_cdp_session(tab.page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
    await network.send("Network.emulateNetworkConditions", slow)
    await tab.page.locator("main").evaluate("""main => {
        const dataTransfer = new DataTransfer();
        for (const [name, size] of [["large", 5e6], ["second", 10], ["third", 20]])
            dataTransfer.items.add(new File([new Uint8Array(size)], name));
        main.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
    }""")
    uploads = tab.page.get_by_role("list", name="Uploads").get_by_role("listitem")
    await expect(uploads).to_have_count(3)
    await expect(uploads.filter(has_text="large")).to_contain_text(re.compile(r"[1-9]\d? %"))
    await uploads.filter(has_text="large").get_by_role("button", name="Cancel").click()
    await network.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
    for name in ("second", "third"):
        await expect(tab.page.get_by_role("button", name=name, exact=True)).to_be_visible()
    await expect(uploads).to_have_count(0)
    assert (await real.run(box, "sh", "-c", "cd dropped; cat large; wc -c < third"))["stdout"] == "old\n20\n"


async def test_an_upload_that_fails(tab: Tab, real: Service, box: str, tmp_path: Path) -> None:
    """An upload that is refused tells why at its row, and the next one goes on."""
    tab.announced.append("status of 40")
    (tmp_path / "a.txt").write_text("a")
    await tab.open(f"{box}/files/%2Fproc")
    await tab.page.get_by_label("Files to upload").set_input_files(tmp_path / "a.txt")
    await expect(tab.page.get_by_role("alert")).not_to_be_empty()


async def test_a_terminal(tab: Tab, real: Service, box: str) -> None:
    """A shell has UTF-8, Ctrl-C and its window's size. A reload attaches again, and F6 leaves it. (21)"""
    await tab.open(f"{box}/terminal")
    screen = tab.page.frame_locator(".terminal iframe").locator(".xterm-rows")
    await expect(screen).to_contain_text("#")
    await tab.page.keyboard.type("sleep 100\n")
    await tab.page.keyboard.press("Control+c")
    await tab.page.keyboard.type("stty size; echo h\u00e9llo $((6 * 7))\n")
    await expect(screen).to_contain_text("h\u00e9llo 42")
    await expect(screen).not_to_contain_text("24 80")
    await tab.page.keyboard.press("F6")
    assert await tab.page.evaluate("document.activeElement.tagName") == "A"
    await tab.page.reload()
    await expect(screen).to_contain_text("h\u00e9llo 42")
    await tab.page.keyboard.type("vi written\n")
    await expect(screen).to_contain_text('"written"')
    await tab.page.keyboard.type("igr\u00fc\u00dfe")
    await tab.page.keyboard.press("Escape")
    await tab.page.set_viewport_size({"width": 1280, "height": 500})
    await tab.page.reload()
    await expect(screen).to_contain_text("gr\u00fc\u00dfe")
    await expect(screen).not_to_contain_text("h\u00e9llo 42")
    await tab.page.keyboard.type(":wq\n")
    await expect(screen).to_contain_text("h\u00e9llo 42")
    await tab.page.keyboard.type("cat written; stty size\n")
    await expect(screen).to_contain_text(re.compile("gr\u00fc\u00dfe *1\\d "))
    await tab.page.get_by_role("button", name="End bash").first.click()
    await tab.page.get_by_role("button", name="End", exact=True).click()
    await expect(tab.page.get_by_role("button", name="End bash")).to_have_count(0)


# -- what a sandbox may not do


class Listener(asyncio.DatagramProtocol):
    """What has come to a TCP and a UDP port.

    A silent TCP connection, b"", is Chromium's: its net log says `is_preconnect` for the address of a frame that the
    policy blocks. It carries no bytes, but tells the listener the user's address. Load brings it.
    """

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.hears_silence = True

    async def __aenter__(self) -> "Listener":
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self.udp = self._udp.get_extra_info("sockname")[1]
        self._tcp = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.tcp = self._tcp.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._udp.close()
        self._tcp.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.heard.append(data)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(200)
        if data or self.hears_silence:
            self.heard.append(data)
        writer.close()

    def filled(self, text: str) -> str:
        url = f"http://127.0.0.1:{self.tcp}/"
        for name, value in (("url", url), ("ws", url.replace("http", "ws")), ("udp", str(self.udp))):
            text = text.replace(f"{{{name}}}", value)
        return text


@pytest.fixture(scope="module")
async def arena(real: Service) -> str:
    """A sandbox for hostile output."""
    return await real.create(metadata={"name": "churn-model", "team": "growth"}, timeout=3600)


@pytest.fixture
async def hostile(tab: Tab, arena: str) -> AsyncIterator[Listener]:
    """A listener that must hear nothing, and a page that must stay as it is."""
    tab.announced.append("")  # the browser tells each thing that it blocks
    await tab.open(arena)
    async with Listener() as listener:
        yield listener
        tab.requests.clear()  # what was blocked is among them; the listener knows what was not
        await asyncio.sleep(0.2)
        assert listener.heard == []
        assert tab.page.url.endswith(arena)
        assert await tab.page.evaluate("window.hacked") is None
        assert await tab.page.title() == "CellVM"
        assert len(tab.page.context.pages) == 1


async def display(tab: Tab, name: str, html: str) -> Locator:
    """The cell that has displayed some HTML, when that is drawn."""
    await tab.run(f"# {name}\ndisplay({{'text/html': {html!r}}}, raw=True)")
    cell = tab.cell(f"# {name}")
    await expect(cell.locator("iframe, [role=alert]")).to_be_attached()
    return cell


async def has_run(cell: Locator) -> bool:
    """Whether a script of the cell's output has run. One that led its frame away has a notice in place of it."""
    handle = await cell.locator("iframe").element_handles()
    frame = await handle[0].content_frame() if handle else None
    return frame is not None and await frame.evaluate("window.ran") is not None


async def test_hostile_output(tab: Tab, hostile: Listener) -> None:
    """No script of an output runs in a still frame. Nothing reaches a listener, the page or its address. (15, 16)"""
    for name, html in {
        **hostile_output.MARKUP,
        **{name: f"<script>window.ran = 1; {script}</script>" for name, script in hostile_output.SCRIPTS.items()},
    }.items():
        cell = await display(tab, f"still {name}", hostile.filled(html))
        await asyncio.sleep(0.2)
        assert not await has_run(cell), name
        assert hostile.heard == [], name


async def test_hostile_scripts(tab: Tab, hostile: Listener) -> None:
    """Scripts that the user lets run send no byte to a listener, and reach neither page nor address. (15, 16)"""
    hostile.hears_silence = False  # docs/page.md says that they can connect
    ran = []
    for name, script in hostile_output.SCRIPTS.items():
        other = await display(tab, f"beside {name}", "<script>window.ran = 1</script>")
        cell = await display(tab, f"live {name}", hostile.filled(f"<script>window.ran = 1; {script}</script>"))
        await cell.get_by_role("button", name="Run this output's scripts").click()
        await asyncio.sleep(0.3)
        assert not await has_run(other), name
        assert hostile.heard == [], name
        box = await cell.locator(".frame").bounding_box()
        assert box is None or box["height"] <= 2000, name
        ran += [name] if await has_run(cell) else []
    assert len(ran) >= len(hostile_output.SCRIPTS) - 3  # those that left their frame can't tell


async def test_hostile_text(tab: Tab, real: Service, arena: str, hostile: Listener) -> None:
    """Names, output, errors and prompts show as text, whatever they hold. Escapes but colours are dropped. (H18)"""
    text = hostile_output.TEXT
    box = await real.create(metadata={"name": text, text[:40]: text})
    await real.call(
        "POST", f"/sandboxes/{box}/execute",
        {"code": f"import sys\ntext = {text!r}\nprint(text)\nprint(text, file=sys.stderr)\nprint('x' * 1_000_000)\n"
                 "raise type('<img src=x onerror=hacked=1>', (Exception,), {})(text)"},
        headers={"X-Client-Name": "<img src=x onerror=hacked=1>"},
    )  # fmt: skip
    await tab.page.goto(f"{real.url}/#/{box}")
    cell = tab.page.locator("article")
    await expect(cell.locator(".stream").first).to_contain_text("<img src=x onerror=window.hacked=1>link")
    assert await cell.locator("img, a, script").count() == 0
    await expect(cell.locator(".author")).to_have_text("<img src=x onerror=hacked=1>")
    await tab.run("input(text)")
    await expect(tab.page.locator("form.prompt .asked")).to_contain_text("<script>")
    await tab.page.goto(f"{real.url}/#/")
    await expect(tab.page.get_by_role("row", name="<img src=x").first).to_be_visible()
    assert await tab.page.evaluate("window.hacked") is None
    await real.call("DELETE", f"/sandboxes/{box}")
    await tab.page.goto(f"{real.url}/#/{arena}")


async def test_a_thief_of_the_keyboard(tab: Tab, hostile: Listener) -> None:
    """A live frame that takes the focus is removed, and all that is typed is in the editor. (17, H12)"""
    thief = "<input id=i><script>setInterval(() => { focus(); document.getElementById('i').focus() }, 10)</script>"
    cell = await display(tab, "thief", thief)
    await cell.get_by_role("button", name="Run this output's scripts").click()
    editor = tab.page.get_by_role("textbox", name="Code of the next cell")
    await editor.click()
    await tab.page.keyboard.type("abcdefghijklmnopqrstuvwxyz012345", delay=15)
    await expect(editor).to_have_text("abcdefghijklmnopqrstuvwxyz012345")
    await expect(cell.get_by_role("alert")).to_contain_text("take the keyboard")
    await editor.fill("")


async def test_a_live_frame_that_loops(tab: Tab, hostile: Listener) -> None:
    """The page answers while a live frame loops, and soon draws all other outputs again. (18, H13)"""
    still = await display(tab, "innocent", "<p>innocent</p>")
    cell = await display(tab, "loop", "<script>setTimeout(() => { while (true); }, 300)</script>")
    await cell.get_by_role("button", name="Run this output's scripts").click()
    await asyncio.sleep(1)
    began = asyncio.get_running_loop().time()
    await tab.page.get_by_role("link", name="Cells").click()
    assert asyncio.get_running_loop().time() - began < 2  # a page that stood still would never answer
    await expect(cell.get_by_role("alert")).to_contain_text("did not answer", timeout=20_000)
    await expect(still.frame_locator("iframe").locator("p")).to_have_text("innocent", timeout=20_000)


async def test_pictures_that_are_too_large(tab: Tab, hostile: Listener) -> None:
    """A PNG of 50,000 × 50,000 is not decoded, and an SVG loads and runs nothing. (H17)"""
    await tab.run(
        "import base64, struct\nhead = b'\\x89PNG\\r\\n\\x1a\\n' + struct.pack('>I4sII', 13, b'IHDR', 50000, 50000)\n"
        "display({'image/png': base64.b64encode(head + bytes(20)).decode()}, raw=True)"
    )
    await expect(tab.cell("50000").locator(".outputs")).to_contain_text("50000 × 50000 pixels is not drawn")
    svg = hostile.filled(
        "<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}svg'/><script>hacked=1</script></svg>"
    )
    await tab.run(f"display({{'image/svg+xml': {svg!r}}}, raw=True)")
    await expect(tab.cell("svg+xml").locator("img")).to_be_visible()


async def test_a_hostile_terminal(tab: Tab, real: Service, box: str) -> None:
    """A terminal answers no question of a program, sets no title and no clipboard, and lives through noise. (H20)"""
    tab.announced.append("")
    await tab.open(f"{box}/terminal")
    screen = tab.page.frame_locator(".terminal iframe").locator(".xterm-rows")
    await expect(screen).to_contain_text("#")
    await tab.page.keyboard.type(
        r"printf '\e]52;c;aGFja2Vk\a\e]0;hacked\a\eP$q\"p\e\\\e[21t'; head -c 200K /dev/urandom" + "\n"
    )
    await tab.page.keyboard.type("reset; echo still $((40 + 2))\n")
    await expect(screen).to_contain_text("still 42", timeout=60_000)
    assert await tab.page.title() == "CellVM"
    await tab.page.keyboard.press("F6")
    await tab.page.get_by_role("button", name="End bash").first.click()
    await tab.page.get_by_role("button", name="End", exact=True).click()


# -- for everybody


AXE = "axe-core/axe.min.js"
SCREENS = ("", "{box}", "{box}/files", "{box}/terminal")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_accessibility(scheme: str, tab: Tab, real: Service, box: str, packages: Path) -> None:
    """axe finds nothing on screens and in dialogs, in both themes. Nothing scrolls sideways at 320 px. (23, in part)"""
    page = tab.page
    await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    axe = (packages / AXE).read_text()
    await page.goto(real.url)
    await page.get_by_label("API key").wait_for()
    found = {"sign-in": await violations(page, axe)}
    await tab.open(box)
    await tab.run("1 / 0")
    await expect(tab.cell("1 / 0").locator(".failure")).to_be_visible()
    for screen in SCREENS:
        await page.goto(f"{real.url}/#/{screen.format(box=box)}")
        await page.locator("main").wait_for()
        await asyncio.sleep(0.3)
        found[screen] = await violations(page, axe)
    for name in ("Ports…", "Share…", "Open in JupyterLab…", "End…"):
        await page.get_by_role("button", name="More", exact=True).click()
        await page.get_by_role("button", name=name).click()
        await page.get_by_role("dialog").wait_for()
        found[name] = await violations(page, axe)
        await page.keyboard.press("Escape")
    assert not any(found.values()), found
    await page.set_viewport_size({"width": 320, "height": 640})
    for screen in SCREENS:
        await page.goto(f"{real.url}/#/{screen.format(box=box)}")
        await page.locator("main").wait_for()
        await asyncio.sleep(0.2)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 320, screen


async def violations(page: Page, axe: str) -> list[Any]:
    """What axe finds on the page, but not in frames, which have origins of their own."""
    await page.evaluate(axe)
    found = await page.evaluate(
        "axe.run({exclude: [['iframe']]}, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})"
    )
    return [(each["id"], [node["html"][:200] for node in each["nodes"]][:4]) for each in found["violations"]]


# -- pictures


IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHOWN = [
    ("agent-42", "import random\n\nfor step in range(1, 4):\n    print(f'step {step} of 3')"),
    ("agent-42", "display({'text/html': table}, raw=True)"),
    ("agent-42", "import math\n\nmath.sqrt(-1)"),
]
TABLE = "<table><thead><tr><th></th><th>month</th><th>orders</th></tr></thead><tbody>" + "".join(
    f"<tr><th>{row}</th><td>{month}</td><td>{orders}</td></tr>"
    for row, (month, orders) in enumerate([("January", 1210), ("February", 1388), ("March", 1502)])
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pictures(scheme: str, tab: Tab, real: Service) -> None:
    """The main states are kept as pictures in `test-results/page`. With BLESS=1 they become those of the manual."""
    folder = IMAGES if os.environ.get("BLESS") else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    page = tab.page
    await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    await page.goto(real.url)
    await page.get_by_label("API key").wait_for()
    await page.screenshot(path=folder / f"sign-in-{scheme}.png")
    box = await real.create(metadata={"name": "report-7"}, timeout=3600)
    await real.execute(box, f"table = {TABLE!r}")
    for client, code in SHOWN:
        body = {"code": code}
        await real.call("POST", f"/sandboxes/{box}/execute", body, headers={"X-Client-Name": client})
    await real.run(box, "sh", "-c", "mkdir -p models; for n in 1 2 3; do echo $n,$((n * n)); done > squares.csv")
    await tab.open()
    await expect(page.get_by_role("row", name="report-7")).to_be_visible()
    await page.screenshot(path=folder / f"list-{scheme}.png")
    await page.goto(f"{real.url}/#/{box}")
    await expect(tab.cell("display(").frame_locator("iframe").locator("td").last).to_have_text("1502")
    await expect(page.locator(".code-keyword").last).to_be_visible()
    await page.screenshot(path=folder / f"cells-{scheme}.png")
    await page.set_viewport_size({"width": 390, "height": 800})
    await page.reload()
    await expect(page.locator(".code-keyword").last).to_be_visible()
    await page.screenshot(path=folder / f"phone-{scheme}.png")
    await page.set_viewport_size({"width": 1280, "height": 860})
    await page.goto(f"{real.url}/#/{box}/files")
    await page.get_by_role("button", name="squares.csv", exact=True).click()
    await expect(page.locator("pre.content")).to_contain_text("3,9")
    await page.screenshot(path=folder / f"files-{scheme}.png")
    await page.goto(f"{real.url}/#/{box}/terminal")
    await expect(page.frame_locator(".terminal iframe").locator(".xterm-rows")).to_contain_text("#")
    await page.keyboard.type("ls --color=always && python3 -c 'print(6 * 7)'\n")
    await expect(page.frame_locator(".terminal iframe").locator(".xterm-rows")).to_contain_text("42")
    await page.screenshot(path=folder / f"terminal-{scheme}.png")
    await page.goto("about:blank")  # a page with a sandbox that goes would complain
    await real.call("DELETE", f"/sandboxes/{box}")
