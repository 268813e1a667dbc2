"""Programs as people write them with E2B's Python SDK: python programs.py NAME URL"""

import os
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

NAME, URL = sys.argv[1:3]
os.environ |= {"E2B_API_URL": URL, "E2B_SANDBOX_URL": URL}

from e2b import SandboxException, SandboxQuery, TimeoutException  # noqa: E402
from e2b_code_interpreter import Sandbox  # noqa: E402


def long_command() -> None:
    """Lines of a long command arrive while it runs."""
    with Sandbox.create(timeout=60) as box:
        arrived: list[tuple[float, str]] = []
        box.commands.run(
            "for n in 1 2 3; do echo line $n; sleep 1; done",
            on_stdout=lambda text: arrived.append((time.monotonic(), text)),
        )
        assert "".join(text for _, text in arrived) == "line 1\nline 2\nline 3\n"
        assert arrived[-1][0] - arrived[0][0] > 1, "they came all at once"


def csv_chart() -> None:
    """A table is uploaded and analysed, and a chart comes back as an image and as data."""
    with Sandbox.create(timeout=300) as box:
        box.files.write("harvest.csv", "year,apples\n2023,4\n2024,6\n2025,5\n")
        ran = box.run_code("import pandas as pd\ntable = pd.read_csv('harvest.csv')\ntable.describe().loc[['mean']]")
        assert ran.error is None, ran.error
        assert ran.results[0].data == {"year": [2024.0], "apples": [5.0]}
        assert "<table" in ran.results[0].html
        ran = box.run_code(
            "import matplotlib.pyplot as plt\nplt.bar(table['year'].astype(str), table['apples'])\n"
            "plt.ylabel('Apples (t)')\nplt.title('Harvest')\nplt.show()"
        )
        assert ran.error is None, ran.error
        shown = ran.results[0]
        assert shown.png
        assert (shown.chart.type.value, shown.chart.title, shown.chart.y_unit) == ("bar", "Harvest", "t")
        assert [(each.label, each.value) for each in shown.chart.elements] == [("2023", 4), ("2024", 6), ("2025", 5)]
        inside = box.commands.run("curl -s -o /dev/null -w '%{http_code}' http://0.0.0.0:49999/health; id -un; pwd")
        assert inside.stdout == "200user\n/home/user\n", inside
        assert box.commands.run("id -un; pwd", user="root").stdout == "root\n/root\n"
        box.files.write("mine", "1", user="root")
        assert box.files.get_info("/root/mine", user="root").owner == "root"
        box.files.write("/etc/motd", "root may write here", user="root")


def overnight() -> None:
    """A sandbox is paused and goes on as it was. It is copied, and started from again, while it goes on itself."""
    box = Sandbox.create(timeout=300)
    box.run_code("count = 1")
    sleeper = box.commands.run("sleep 600", background=True)
    box.pause()
    assert not box.is_running()
    assert box.get_info().state.value == "paused"
    box = Sandbox.connect(box.sandbox_id, timeout=300)
    assert sleeper.pid in [each.pid for each in box.commands.list()]
    assert box.run_code("count += 1; count").text == "2"
    snapshot = box.create_snapshot()
    assert snapshot.snapshot_id in [each.snapshot_id for each in Sandbox.list_snapshots().next_items()]
    with Sandbox.create(snapshot.snapshot_id, timeout=300) as other:
        assert other.run_code("count += 10; count").text == "12"
    forked = box.fork()
    assert box.run_code("count").text == "2"
    for each in forked:
        assert each.run_code("count += 100; count").text == "102"
        each.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id)
    box.kill()
    assert not box.is_running()


def upload_directory() -> None:
    """A directory goes up as it is."""
    with tempfile.TemporaryDirectory() as name, Sandbox.create(timeout=60) as box:
        for number in range(20):
            file = Path(name, f"part{number % 3}", f"{number}.txt")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"content {number}")
        found = [path for path in Path(name).rglob("*") if path.is_file()]
        box.files.write_files(
            [{"path": f"project/{path.relative_to(name)}", "data": path.read_text()} for path in found]
        )
        assert box.commands.run("cat project/*/*.txt | wc -c").stdout.strip() == str(
            sum(path.stat().st_size for path in found)
        )


def watch_folder() -> None:
    """A folder is watched while a command works in it."""
    with Sandbox.create(timeout=60) as box:
        box.files.make_dir("results")
        watcher = box.files.watch_dir("results")
        box.commands.run("echo 1 > results/one.csv; mv results/one.csv results/done.csv; rm results/done.csv")
        told = [(event.type.value, event.name) for event in watcher.get_new_events()]
        assert told[-3:] == [("rename", "one.csv"), ("create", "done.csv"), ("remove", "done.csv")], told
        watcher.stop()


def web_server() -> None:
    """A web server in a sandbox is reached by its host name, with the sandbox's token for its ports."""
    with Sandbox.create(timeout=60) as box:
        box.files.write("site/index.html", "<h1>here</h1>")
        server = box.commands.run("exec python3 -m http.server 31456 --directory site", background=True)
        host = box.get_host(31456)
        request = urllib.request.Request(URL + "/", headers={"Host": host})
        request.add_header("e2b-traffic-access-token", box.traffic_access_token)
        for _ in range(200):
            try:
                page = urllib.request.urlopen(request).read()
                break
            except urllib.error.HTTPError as error:
                assert error.code == 502, error.read()
                time.sleep(0.1)
        assert page == b"<h1>here</h1>"
        try:
            urllib.request.urlopen(urllib.request.Request(URL + "/", headers={"Host": host}))
        except urllib.error.HTTPError as error:
            assert error.code == 403
            assert b"Token header 'e2b-traffic-access-token' is missing" in error.read()
        else:
            raise AssertionError("a closed port was open")
        finally:
            server.kill()  # without isolation nobody else ends it


def by_metadata() -> None:
    """Sandboxes are found again by what they are for."""
    boxes = [Sandbox.create(timeout=60, metadata={"job": job}) for job in ("a", "b", "a")]
    try:
        listed = Sandbox.list(query=SandboxQuery(metadata={"job": "a"}), limit=1)
        found = []
        while listed.has_next:
            found += [each.sandbox_id for each in listed.next_items()]
        assert found == [boxes[2].sandbox_id, boxes[0].sandbox_id]
    finally:
        for box in boxes:
            box.kill()


def timeouts() -> None:
    """A command's time, and a sandbox's."""
    box = Sandbox.create(timeout=60)
    try:
        box.commands.run("sleep 30", timeout=0.5)
    except TimeoutException:
        pass
    else:
        raise AssertionError("the command outlived its time")
    deadline = time.monotonic() + 10
    while "sleep 30" in [each.args[-1] for each in box.commands.list()]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    box.set_timeout(1)
    while box.is_running():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def killed() -> None:
    """A sandbox is killed while a command runs, and the command's caller is told so."""
    box = Sandbox.create(timeout=60)
    threading.Timer(1, box.kill).start()
    try:
        box.commands.run("sleep 30")
    except SandboxException as error:
        assert "killed" in str(error) or "not found" in str(error), error
    else:
        raise AssertionError("the command ended well")


globals()[NAME]()
