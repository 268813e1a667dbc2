"""The jobs that the web page is for, each played through on a real machine. What the page shows is kept as pictures.

One sandbox serves most of them, and the jobs that need ways back share another one.
"""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from playwright.async_api import BrowserContext, expect

from tests.api.clients import agent as stream
from tests.e2e.tab import RESULTS, Tab
from tests.guest.client import KEY, Sandbox, Server

pytestmark = pytest.mark.alone
"""A browser and an emulated machine have two processors to share already."""

PATIENCE = 30_000
"""Milliseconds that anything may take. Emulated machines are slow."""


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    expect.set_options(timeout=PATIENCE)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture(scope="module")
def box(server: Server) -> Iterator[Sandbox]:
    policy = {"allow_internet_access": False, "network": {"allowOut": ["1.1.1.1/32"]}}
    with server.sandbox(metadata={"name": "report-7"}, **policy) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def kept(server: Server) -> Iterator[Sandbox]:
    """A sandbox with a checkpoint after each cell."""
    with server.sandbox(metadata={"name": "tries"}, checkpoints="cell") as sandbox:
        yield sandbox


@pytest.fixture
async def tab(context: BrowserContext, server: Server, request: pytest.FixtureRequest) -> AsyncIterator[Tab]:
    context.set_default_timeout(PATIENCE)
    made = Tab(await context.new_page(), server.url, KEY)
    yield made
    RESULTS.mkdir(parents=True, exist_ok=True)
    await made.page.screenshot(path=RESULTS / f"machine-{request.node.name.removeprefix('test_')}.png")
    made.check()


def agent(box: Sandbox, code: str) -> asyncio.Task[dict[str, Any]]:
    """Runs a cell as an agent does."""

    def run() -> dict[str, Any]:
        answer = box.post("/execute", json={"code": code}, headers={"X-Client-Name": "agent-42"})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    return asyncio.create_task(asyncio.to_thread(run))


async def test_j1_watch_an_agent(tab: Tab, box: Sandbox) -> None:
    """What an agent has run before the page came is there, and what it runs now is shown as it prints."""
    await agent(box, "rows = [1, 2, 3]\nprint('loaded', len(rows))")
    await tab.open(box.id)
    await expect(tab.cell("loaded").locator(".outputs")).to_have_text("loaded 3")
    code = "import time\nfor step in range(4): print('step', step, flush=True); time.sleep(0.5)"
    running = agent(box, code)
    cell = tab.cell("'step'")
    await expect(cell.locator(".outputs")).to_contain_text("step 0")
    assert not running.done()
    await expect(cell).to_have_attribute("aria-label", "Cell 2 by agent-42, running")
    await running
    await expect(cell).to_have_attribute("aria-label", "Cell 2 by agent-42")
    await expect(cell.locator(".outputs")).to_contain_text("step 3")


async def test_j2_take_over(tab: Tab, box: Sandbox) -> None:
    """A person stops an agent, holds its next cell, uses its variables and hands back."""
    await tab.open(box.id)
    runaway = agent(box, "found = 41\nwhile True: pass")
    await expect(tab.cell("while True")).to_have_class("cell running")
    await tab.page.get_by_role("button", name="Hold others").click()
    await expect(tab.page.locator(".held")).to_contain_text("held by you")
    await tab.page.get_by_role("button", name="Interrupt", exact=True).click()
    assert (await runaway)["error"]["name"] == "KeyboardInterrupt"
    waiting = agent(box, "print('found', found)")
    await expect(tab.page.locator(".waiting")).to_contain_text("print('found', found)")
    await expect((await tab.run("found += 1; found")).locator(".outputs")).to_have_text("42")
    assert not waiting.done()
    await tab.page.get_by_role("button", name="Let others run").click()
    assert (await waiting)["stdout"] == "found 42\n"
    await expect(tab.page.locator(".waiting")).to_have_count(0)


async def test_j3_try_code(tab: Tab, server: Server) -> None:
    """A newcomer has a sandbox of one's own, a result, a chart and a table, and ends it from the list. (14, in part)"""
    await tab.page.goto(server.url)
    await tab.page.get_by_label("API key").fill(KEY)
    await tab.page.get_by_role("button", name="Sign in").click()
    await tab.page.get_by_role("button", name="New sandbox").click()
    await tab.page.locator(".items").get_by_role("button", name=re.compile(r"^code_interpreter(?!_)")).click()
    cell = await tab.run("1 + 1")
    await expect(cell.locator(".outputs")).to_have_text("2")
    mine = tab.page.url.rpartition("/")[2]
    await tab.run("import matplotlib.pyplot as plt\nplt.plot([1, 4, 9, 16])\nplt.show()")
    await expect(tab.cell("plt.plot").locator("img")).to_be_visible()
    await tab.run("import pandas as pd\npd.DataFrame({'month': ['Jan', 'Feb'], 'orders': [1210, 1388]})")
    await expect(tab.cell("pd.DataFrame").frame_locator("iframe").locator("td").last).to_have_text("1388")
    await tab.run("import plotly.express as px\npx.line(x=[1, 2, 3], y=[3, 1, 2], title='Orders')")
    chart = tab.cell("px.line").frame_locator("iframe")
    await expect(chart.locator(".scatterlayer path.js-line")).to_be_visible()
    await expect(chart.locator(".gtitle")).to_have_text("Orders")
    await tab.page.screenshot(path=RESULTS / "machine-j3_the_chart.png")
    await tab.page.get_by_role("link", name="All sandboxes").click()
    row = tab.page.locator("tr", has_text=mine[:12])
    await row.get_by_role("button", name="More").click()
    await tab.page.get_by_role("button", name="End…").click()
    await tab.page.get_by_role("button", name="End", exact=True).click()
    await expect(row).to_have_count(0)


async def test_j4_answer(tab: Tab, box: Sandbox) -> None:
    """An agent's cell asks, and a person answers."""
    await tab.open(box.id)
    async with stream(SimpleNamespace(url=box.server.url, key=KEY), box.id, query={"client": "agent-42"}) as asking:
        await asking.send("execute", code="name = input('name? ')\nprint('hello', name)", id="asks")
        await tab.page.get_by_label("name?").fill("Ada")
        await tab.page.keyboard.press("Enter")
        cell = tab.cell("input(")
        await expect(cell.locator(".outputs")).to_contain_text("answered by web page")
        await expect(cell.locator(".outputs")).to_contain_text("hello Ada")
        await asking.until("end", id="asks")


async def test_j5_stop_a_runaway(tab: Tab, box: Sandbox) -> None:
    """A cell is interrupted from the list, and a kernel is restarted in its sandbox."""
    runaway = agent(box, "while True: pass")
    await tab.open()
    row = tab.page.get_by_role("row", name="report-7")
    await expect(row).to_contain_text("busy")
    await row.get_by_role("button", name="Interrupt report-7").click()
    assert (await runaway)["error"]["name"] == "KeyboardInterrupt"
    await expect(row).to_contain_text("idle")
    await row.get_by_role("link", name="report-7").click()
    await tab.page.get_by_role("button", name="Restart…").click()
    await tab.page.get_by_role("button", name="Restart", exact=True).click()
    await expect(tab.page.get_by_role("note").last).to_contain_text("variables are gone")
    await expect((await tab.run("'rows' in globals()")).locator(".outputs")).to_have_text("False")


async def test_j6_files(tab: Tab, box: Sandbox, tmp_path: Path) -> None:
    """A file goes up, a cell reads it and writes another one, and that comes down to the byte."""
    (tmp_path / "data.csv").write_text("n,square\n3,9\n")
    await tab.open(f"{box.id}/files")
    await tab.page.get_by_label("Files to upload").set_input_files(tmp_path / "data.csv")
    await expect(tab.page.get_by_role("button", name="data.csv", exact=True)).to_be_visible()
    await agent(box, "text = open('data.csv').read()\nopen('out.bin', 'wb').write(text.encode() + bytes(range(256)))")
    await tab.page.get_by_role("button", name="out.bin", exact=True).click()
    async with tab.page.expect_download() as download:
        await tab.page.get_by_role("button", name="Download", exact=True).click()
    assert Path(await (await download.value).path()).read_bytes() == b"n,square\n3,9\n" + bytes(range(256))
    await tab.page.get_by_role("button", name="data.csv", exact=True).click()
    await expect(tab.page.locator("pre.content")).to_contain_text("3,9")


async def test_j7_a_shell(tab: Tab, box: Sandbox) -> None:
    """A shell of the machine has colours, takes the size of its window, and is there again after a reload. (21)"""
    await tab.open(f"{box.id}/terminal")
    screen = tab.page.frame_locator(".terminal iframe").locator(".xterm-rows")
    await expect(screen).to_contain_text("$")
    await tab.page.keyboard.type("trap 'echo size $(stty size)' WINCH; uname -n; echo $((6 * 7))\n")
    await expect(screen).to_contain_text("42")
    await tab.page.set_viewport_size({"width": 700, "height": 500})
    await expect(screen).to_contain_text("size ")
    await tab.page.reload()
    await expect(screen).to_contain_text("42")


async def test_j9_load_and_time(tab: Tab, box: Sandbox) -> None:
    """Variables are listed while a cell runs. Load is shown, and the sandbox gets more time. (22)"""
    assert box.post("/timeout", json={"timeout": 300}).status_code == 204
    await tab.open(box.id)
    await tab.run("answer = 42\nimport time; time.sleep(60)")
    await expect(tab.page.locator(".variables > div", has_text="answer")).to_contain_text("42")
    await expect(tab.cell("answer = 42")).to_have_class("cell running")
    await tab.page.get_by_role("button", name="Interrupt", exact=True).click()
    for name in ("CPU", "Memory", "Disk"):
        await expect(tab.page.locator(".load > div", has_text=name)).to_be_visible()
    before = box.get("").json()["endAt"]
    await tab.page.get_by_role("button", name="+10 min").click()
    await expect(tab.page.locator(".left")).to_contain_text("14:")
    assert box.get("").json()["endAt"] > before


async def test_j10_take_the_work_along(tab: Tab, box: Sandbox) -> None:
    """A service of the machine is opened, JupyterLab's commands are told, and the notebook is saved."""
    site = "import os, subprocess\nos.makedirs('site', exist_ok=True)\nopen('site/index.html', 'w').write('served')\n"
    await agent(box, site + "web = subprocess.Popen(['python3', '-m', 'http.server', '8000', '-d', 'site'])")
    await agent(box, "import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', 8000)): time.sleep(0.1)")
    await tab.open(box.id)
    more = tab.page.get_by_role("button", name="More", exact=True)
    await more.click()
    await tab.page.get_by_role("button", name="Open in JupyterLab…").click()
    lab = tab.page.get_by_role("dialog", name="Open in JupyterLab")
    await expect(lab).to_contain_text(box.model["kernelID"][:8])
    await lab.get_by_role("button", name="Close").click()
    await more.click()
    async with tab.page.expect_download() as download:
        await tab.page.get_by_role("button", name="Save as notebook").click()
    book = nbformat.read(await (await download.value).path(), as_version=4)
    nbformat.validate(book)
    assert "site" in book.cells[-2].source
    await more.click()
    await tab.page.get_by_role("button", name="Ports…").click()
    await tab.page.get_by_role("button", name="Open", exact=True).click()
    async with tab.page.context.expect_page() as opened:
        await tab.page.get_by_role("link", name="8000").click()
    await expect((await opened.value).locator("body")).to_have_text("served")


async def test_refused_connections(tab: Tab, box: Sandbox) -> None:
    """A refused connection is shown with its reason, and allowing it keeps the policy's other entries. (24)"""
    await agent(box, "import socket\nprint(socket.socket().connect_ex(('9.9.9.9', 443)))")
    await tab.open(box.id)
    line = tab.page.locator(".refused li", has_text="9.9.9.9:443")
    await expect(line).to_contain_text("policy")
    async with tab.page.expect_response(lambda answer: answer.request.method == "PUT"):
        await line.get_by_role("button", name="Allow").click()
    policy = box.get("/network").json()
    assert policy["allowInternetAccess"] is False
    assert [each.removesuffix("/32") for each in policy["allowOut"]] == ["1.1.1.1", "9.9.9.9"]


async def test_j11_go_back(tab: Tab, kept: Sandbox) -> None:
    """A sandbox goes back to before the cell that has spoilt its variables."""
    await tab.open(kept.id)
    timeline = tab.page.get_by_role("dialog", name="Timeline")

    async def look(text: str) -> None:
        """Open the timeline until it tells that."""
        while True:
            await tab.page.get_by_role("button", name="More", exact=True).click()
            await tab.page.get_by_role("button", name="Timeline…", exact=True).click()
            await expect(timeline.locator("li").first).to_be_visible()
            if text in await timeline.inner_text():
                return
            await timeline.get_by_role("button", name="Close").click()

    await agent(kept, "rows = [1, 2, 3]")
    await look("Checkpoint 1")
    await timeline.get_by_role("button", name="Close").click()
    await agent(kept, "rows.clear(); open('lost', 'w').close()")
    await look("Go back to before cell 2")
    await timeline.get_by_role("button", name="Go back to before cell 2").click()
    await tab.page.get_by_role("button", name="Go back", exact=True).click()
    await expect(timeline).to_contain_text("Went back to checkpoint 1")
    await timeline.get_by_role("button", name="Close").click()
    await expect(tab.page.get_by_role("note").last).to_contain_text("went back to checkpoint 1")
    cell = await tab.run("import os; rows, os.path.exists('lost')")
    await expect(cell.locator(".outputs")).to_have_text("([1, 2, 3], False)")


async def test_j12_fork(tab: Tab, kept: Sandbox) -> None:
    """A copy of the sandbox is opened. It has the variables, and what it does changes nothing in the first one."""
    tab.announced.append("404")  # the copy ends while its page is open
    await agent(kept, "x = 'both'")
    await tab.open(kept.id)
    await tab.page.get_by_role("button", name="More", exact=True).click()
    await tab.page.get_by_role("button", name="Fork and open the copy").click()
    await tab.page.wait_for_function("id => !location.hash.includes(id)", arg=kept.id)
    await expect((await tab.run("x += '!'; x")).locator(".outputs")).to_have_text("'both!'")
    assert (await agent(kept, "print(x)"))["stdout"] == "both\n"
    child = tab.page.url.rpartition("/")[2]
    assert kept.server.request("DELETE", f"/sandboxes/{child}").status_code == 204


async def test_j8_find_out_why(tab: Tab, server: Server, box: Sandbox) -> None:
    """Why a kernel, then the machine died is told. The transcript stays and can be saved. (12)"""
    tab.announced.append("404")
    await tab.open(box.id)
    await tab.run("import os; os._exit(3)")
    await expect(tab.page.get_by_role("note").last).to_contain_text("exit code 3")
    await tab.run("print('alive')")
    await expect(tab.cell("alive").locator(".outputs")).to_have_text("alive")
    await expect(tab.cell("alive")).not_to_have_class(re.compile("running"))
    for machine in server.machines():
        os.kill(machine, signal.SIGKILL)
    banner = tab.page.get_by_role("alert").filter(has_text="has ended")
    await expect(banner).to_contain_text("its machine ended by itself")
    await expect(tab.cell("alive").locator(".outputs")).to_have_text("alive")
    async with tab.page.expect_download() as download:
        await banner.get_by_role("button", name="Save as notebook").click()
    nbformat.validate(nbformat.read(await (await download.value).path(), as_version=4))
    await tab.page.screenshot(path=RESULTS / "machine-j8_the_banner.png")
    await banner.get_by_role("button", name="All sandboxes").click()
    await tab.page.get_by_role("radio", name="Ended, 24 h").check()
    await expect(tab.page.get_by_role("row", name=box.id)).to_contain_text("died")
