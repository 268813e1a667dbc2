"""The template page's promises about `code_interpreter`: its libraries, its use cases, and its environment."""

import json
import re
from typing import Any

import pytest

from tests.guest.client import Sandbox, Server

LIBRARIES: dict[str, tuple[str, Any]] = {
    "numpy": ("import numpy as np\nnp.linalg.solve([[2, 0], [0, 4]], [2, 8]).tolist()", [1.0, 2.0]),
    "pandas": (
        "import pandas as pd\npd.DataFrame({'k': list('aba'), 'v': [1, 2, 3]}).groupby('k').v.sum().to_dict()",
        {"a": 4, "b": 2},
    ),
    "polars": (
        "import polars as pl\npl.DataFrame({'v': [1, 2, 3]}).filter(pl.col('v') > 1).select(pl.col('v').sum()).item()",
        5,
    ),
    "scipy": ("from scipy import integrate\nround(integrate.quad(lambda x: x * x, 0, 3)[0], 6)", 9.0),
    "matplotlib": (
        "import io\nfrom matplotlib.figure import Figure\nout = io.BytesIO()\n"
        "figure = Figure(figsize=(2, 1))\nfigure.subplots().plot([1, 2])\nfigure.savefig(out, dpi=100)\n"
        "from PIL import Image\nImage.open(out).size",
        [200, 100],
    ),
    "seaborn": (
        "import matplotlib.pyplot as plt, pandas as pd, seaborn as sns\n"
        "axes = sns.barplot(pd.DataFrame({'x': ['a', 'b'], 'y': [3, 5]}), x='x', y='y')\n"
        "heights = sorted(float(bar.get_height()) for bar in axes.patches)\nplt.close('all')\nheights",
        [3.0, 5.0],
    ),
    "plotly": (
        "import json, plotly.express as px\nlist(json.loads(px.line(x=[1, 2], y=[3, 4]).to_json())['data'][0]['type'])",
        list("scatter"),
    ),
    "sklearn": (
        "from sklearn.linear_model import LinearRegression\n"
        "round(float(LinearRegression().fit([[0], [1], [2]], [1, 3, 5]).predict([[10]])[0]), 6)",
        21.0,
    ),
    "xgboost": (
        "import numpy as np, xgboost\nX = np.arange(40.0).reshape(-1, 1)\n"
        "model = xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(X, X[:, 0] > 19)\n"
        "model.predict([[2.0], [37.0]]).tolist()",
        [0, 1],
    ),
    "requests": (
        "import requests\nrequests.Request('GET', 'http://x/', params={'a': 'b c'}).prepare().url",
        "http://x/?a=b+c",
    ),
    "bs4": ("import bs4\nbs4.BeautifulSoup('<p>a<b>c</b></p>', 'html.parser').b.text", "c"),
    "httpx": (
        "import httpx\n"
        "transport = httpx.MockTransport(lambda request: httpx.Response(200, json={'path': request.url.path}))\n"
        "httpx.Client(transport=transport).get('http://x/y').json()",
        {"path": "/y"},
    ),
    "PIL": (
        "from PIL import Image\nimage = Image.new('RGB', (4, 2), 'red').rotate(90, expand=True)\n"
        "[*image.size, *image.getpixel((0, 0))]",
        [2, 4, 255, 0, 0],
    ),
    "openpyxl": (
        "import io, openpyxl\nbook = openpyxl.Workbook()\nbook.active['B2'] = 7\nout = io.BytesIO()\nbook.save(out)\n"
        "openpyxl.load_workbook(out).active['B2'].value",
        7,
    ),
    "yaml": ("import yaml\nyaml.safe_load(yaml.safe_dump({'a': [1, {'b': None}]}))", {"a": [1, {"b": None}]}),
    "ipywidgets": (
        "import ipywidgets\nslider = ipywidgets.IntSlider(3)\n"
        "[slider.value, ipywidgets.Image(value=bytes(range(256))).value == bytes(range(256))]",
        [3, True],
    ),
    "tqdm": (
        "import contextlib, io\nfrom tqdm import tqdm\nout = io.StringIO()\n"
        "for _ in tqdm(range(3), file=out): pass\n'3/3' in out.getvalue()",
        True,
    ),
    "tabulate": (
        "import pandas as pd\npd.DataFrame({'a': [1]}).to_markdown(index=False)",
        "|   a |\n|----:|\n|   1 |",
    ),
    "lxml": (
        "import io, pandas as pd\ntable = '<table><tr><th>a</th></tr><tr><td>1</td></tr></table>'\n"
        "xml = pd.read_xml(io.StringIO('<r><i><b>2</b></i></r>'))\n"
        "[pd.read_html(io.StringIO(table), flavor=f)[0].a.item() for f in ('lxml', 'html5lib')] + [xml.b.item()]",
        [1, 1, 2],
    ),
    "pyarrow": (
        "import pandas as pd, polars as pl\nframe = pd.DataFrame({'a': [1, 2], 'b': ['x', None]})\n"
        "frame.to_parquet('a.parquet'); frame.to_feather('a.feather')\n"
        "[pd.read_parquet('a.parquet').equals(frame), pd.read_feather('a.feather').equals(frame),"
        " pl.from_pandas(frame).to_pandas().a.sum().item()]",
        [True, True, 3],
    ),
    "xlsxwriter": (
        "import pandas as pd\nframe = pd.DataFrame({'a': [1]})\n"
        "frame.to_excel('w.xlsx', engine='xlsxwriter', index=False)\n"
        "import xlrd\n[pd.read_excel('w.xlsx').equals(frame), xlrd.__name__]",
        [True, "xlrd"],
    ),
    "time zones": (
        "import datetime, pytz, zoneinfo\nzones = [pytz.timezone('Asia/Tokyo'), zoneinfo.ZoneInfo('Asia/Tokyo')]\n"
        "[datetime.datetime.fromtimestamp(0, zone).hour for zone in zones]",
        [9, 9],
    ),
    "jinja2": ("import jinja2\njinja2.Template('{% for n in x %}{{ n }};{% endfor %}').render(x=[1, 2])", "1;2;"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_library(box: Sandbox, library: str) -> None:
    """Every documented library does its work."""
    code, expected = LIBRARIES[library]
    assert box.value(code) == expected


ORDERS = """
import numpy as np
rng = np.random.default_rng(1)
wrong = []
for size in (10, 100, 257, 3000, 20000):
    for kind in ("int32", "int64", "uint64", "float32", "float64"):
        values = rng.permutation(size).astype(kind)
        for name, order in (("argsort", np.argsort(values)), ("stable", np.argsort(values, kind="stable"))):
            if not np.array_equal(values[order], np.arange(size).astype(kind)):
                wrong.append((name, size, kind))
        if values[np.argpartition(values, size // 2)[size // 2]] != size // 2:
            wrong.append(("argpartition", size, kind))
wrong
"""


def test_sorting(box: Sandbox) -> None:
    """numpy sorts correctly. Emulated vector instructions once made it sort wrongly (docs/adr/0008)."""
    assert box.value(ORDERS) == []


USE_CASES = {
    "csv": (
        "import pandas as pd\nframe = pd.DataFrame({'n': [1, 2], 't': ['ä,\"x\"', 'b\\nc']})\n"
        "frame.to_csv('/home/user/t.csv', index=False)\npd.read_csv('t.csv').equals(frame)"
    ),
    "json": (
        "import json, pandas as pd\nframe = pd.DataFrame({'n': [1, 2], 't': ['ä', 'b']})\n"
        "frame.to_json('t.json', orient='records')\n"
        "pd.read_json('t.json').equals(frame) and json.load(open('t.json'))[0] == {'n': 1, 't': 'ä'}"
    ),
    "excel": (
        "import pandas as pd\nframe = pd.DataFrame({'n': [1, 2], 't': ['ä', 'b']})\n"
        "frame.to_excel('t.xlsx', index=False, sheet_name='s')\n"
        "pd.read_excel('t.xlsx', sheet_name='s').equals(frame)"
    ),
    "statistics": (
        "import numpy as np\nfrom scipy import stats\nx = np.linspace(0, 1, 50)\n"
        "fit = stats.linregress(x, 3 * x + 1)\n"
        "same = stats.ttest_ind(x, x + 1).pvalue\n"
        "bool(abs(fit.slope - 3) < 1e-9 and abs(fit.intercept - 1) < 1e-9 and same < 1e-6)"
    ),
    "optimisation": (
        "from scipy.optimize import minimize\nfound = minimize(lambda p: (p[0] - 1) ** 2 + (p[1] + 2) ** 2, [0, 0])\n"
        "bool(found.success and abs(found.x[0] - 1) < 1e-3 and abs(found.x[1] + 2) < 1e-3)"
    ),
    "training": (
        "import numpy as np\nfrom sklearn.ensemble import RandomForestClassifier\n"
        "from sklearn.model_selection import train_test_split\n"
        "rng = np.random.default_rng(0)\nX = rng.normal(size=(200, 3))\ny = X[:, 0] + X[:, 1] > 0\n"
        "a, b, c, d = train_test_split(X, y, random_state=0)\n"
        "bool(RandomForestClassifier(10, random_state=0).fit(a, c).score(b, d) > 0.8)"
    ),
    "boosting": (
        "import numpy as np, xgboost\nrng = np.random.default_rng(0)\nX = rng.normal(size=(200, 2))\n"
        "y = 2 * X[:, 0] - X[:, 1]\nmodel = xgboost.train({'nthread': 1, 'max_depth': 3}, xgboost.DMatrix(X, y), 20)\n"
        "model.save_model('m.json')\nagain = xgboost.Booster(model_file='m.json')\n"
        "bool(np.corrcoef(again.predict(xgboost.DMatrix(X)), y)[0, 1] > 0.9)"
    ),
    "conversion": (
        "import json, polars as pl, yaml\nfrom PIL import Image\n"
        "yaml.safe_dump({'rows': [{'a': 1}, {'a': 2}]}, open('t.yaml', 'w'))\n"
        "pl.DataFrame(yaml.safe_load(open('t.yaml'))['rows']).write_parquet('t.parquet')\n"
        "pl.read_parquet('t.parquet').write_csv('t2.csv')\n"
        "Image.new('RGB', (8, 8), 'blue').save('t.png')\nImage.open('t.png').save('t.jpg')\n"
        "open('t2.csv').read() == 'a\\n1\\n2\\n' and Image.open('t.jpg').format == 'JPEG'"
    ),
}


@pytest.mark.parametrize("case", USE_CASES)
def test_use_case(box: Sandbox, case: str) -> None:
    """Every documented use case works, files included."""
    assert box.value(USE_CASES[case]) is True


@pytest.mark.parametrize(
    ("code", "kind", "dtypes"),
    [
        ("pandas as l\nl.DataFrame({'a': range(99), 'b': [None, *'x' * 98]})", "DataFrame", ["int64", "str"]),
        ("polars as l\nl.DataFrame({'a': range(99), 'b': [None, *'x' * 98]})", "DataFrame", ["Int64", "String"]),
        ("pandas as l\nl.Series(range(99), name='a')", "Series", ["int64"]),
        ("polars as l\nl.Series('a', range(99))", "Series", ["Int64"]),
    ],
)
def test_tables(box: Sandbox, code: str, kind: str, dtypes: list[str]) -> None:
    """Data frames and series come with their first and last rows as data."""
    table = box.execute(f"import {code}")["results"][0]["data"]["application/vnd.cellvm.table+json"]
    assert (table["kind"], table["shape"]) == (kind, [99, len(dtypes)])
    assert [each["dtype"] for each in table["columns"]] == dtypes
    assert [row[:2] for row in table["first"]] == [[str(n), str(n)] for n in range(5)]
    assert [row[:2] for row in table["last"]] == [[str(n), str(n)] for n in range(96, 99)]


def test_chart(box: Sandbox) -> None:
    """A command makes a chart, and the chart is downloaded as a PNG."""
    code = "import matplotlib.pyplot as plt; plt.bar(['a', 'b'], [1, 2]); plt.savefig('bars.png')"
    assert box.run("python3", "-c", code)["exitCode"] == 0
    assert box.download("bars.png").content.startswith(b"\x89PNG")


# -- fonts, tools, locales

SCRIPTS = {
    "Chinese, Japanese, Korean": "import matplotlib.pyplot as plt\nplt.title('销售额 売上 매출')",
    "emoji": "import matplotlib.pyplot as plt\nplt.title('up 📈 down 📉')",
    "seaborn's styles": "import seaborn as sns, matplotlib.pyplot as plt\nsns.set_theme()\nplt.title('销售额')",
    "a style of matplotlib": "import matplotlib.pyplot as plt\nplt.style.use('classic')\nplt.title('売上')",
    "the usual advice": (
        "import matplotlib.pyplot as plt\nplt.rcParams['font.sans-serif'] = ['SimHei']\n"
        "plt.rcParams['axes.unicode_minus'] = False\nplt.title('销售额')"
    ),
    "Arial": "import matplotlib.pyplot as plt\nplt.rcParams['font.family'] = 'Arial'\nplt.title('title')",
    "Times": "import matplotlib.pyplot as plt\nplt.title('title', fontname='Times New Roman')",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_fonts(box: Sandbox, script: str) -> None:
    """A plot in any writing has glyphs, and fonts of other systems have substitutes: no warning is printed."""
    cell = box.execute(f"{SCRIPTS[script]}\nplt.show()\nplt.rcdefaults()")
    assert cell["stderr"] == ""
    assert cell["error"] is None
    assert "image/png" in cell["results"][0]["data"]


def test_fonts_of_commands(box: Sandbox) -> None:
    """A command draws without making a list of fonts first, and Pillow finds a font by its name."""
    code = (
        "import matplotlib.pyplot as plt; plt.title('销售额'); plt.savefig('c.png')\n"
        "from PIL import ImageFont; print(ImageFont.truetype('DejaVuSans.ttf', 20).getname()[0])"
    )
    answer = box.run("python3", "-W", "error", "-c", code)
    assert (answer["stdout"], answer["stderr"]) == ("DejaVu Sans\n", "")


def test_locales(box: Sandbox) -> None:
    """The locales that scripts name are there."""
    code = "import locale; print(locale.setlocale(locale.LC_ALL, ''), locale.format_string('%d', 12345, grouping=True))"
    assert box.shell(f'python3 -c "{code}"', envVars={"LC_ALL": "en_US.UTF-8"}) == "en_US.UTF-8 12,345\n"


@pytest.mark.parametrize(
    "script",
    [
        "tar cJf a.tar.xz /etc/hostname && tar tf a.tar.xz",
        "tar cjf a.tar.bz2 /etc/hostname && tar tf a.tar.bz2",
        "zip -q a.zip /etc/debian_version && unzip -l a.zip",
        "wget --version && vi --version",
        "ping -c 1 127.0.0.1",
    ],
)
def test_tools(box: Sandbox, script: str) -> None:
    """The small tools that scripts take for granted are there, and work."""
    box.shell(script)


def test_progress_bars(box: Sandbox) -> None:
    """A progress bar for notebooks is text in an answer, and the text is its end."""
    cell = box.execute("from tqdm.auto import tqdm\nfor _ in tqdm(range(5)): pass")
    shown = cell["stderr"] + "".join(result["data"].get("text/plain", "") for result in cell["results"])
    assert "5/5" in shown
    assert "100%" in shown


# -- a kernel is what a freshly started interpreter would be


def test_variables_that_are_read_at_start(server: Server) -> None:
    """Kernels from a snapshot act on variables that Python and its libraries read only when they start."""
    variables = {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with server.sandbox(envVars=variables) as sandbox:
        code = "import time, os\n[time.tzname[0], time.localtime(0).tm_hour, hash('text')]"
        command = "import time; print(time.tzname[0], time.localtime(0).tm_hour, hash('text'))"
        expected = sandbox.run("python3", "-c", command)["stdout"].split()
        assert [str(value) for value in sandbox.value(code)] == expected
        assert (
            sandbox.value(
                "import numpy\nfrom threadpoolctl import threadpool_info\n"
                "max(pool['num_threads'] for pool in threadpool_info())"
            )
            == 1
        )


def test_time_zone_costs_nothing(server: Server) -> None:
    """A time zone leaves the kernel warm, before and after a restart."""
    with server.sandbox(envVars={"TZ": "Asia/Tokyo"}) as sandbox:
        code = "import sys, time\n[time.tzname[0], 'pandas' in sys.modules]"
        assert sandbox.value(code) == ["JST", True]
        restart(sandbox)
        assert sandbox.value(code) == ["JST", True]


def test_a_package_that_has_changed(server: Server) -> None:
    """After a restart a kernel has what is installed, though the snapshot had imported something else."""
    with server.sandbox() as sandbox:
        sandbox.shell(
            "sed -i 's/^__version__ = .*/__version__ = \"0.1\"/' /opt/venv/lib/python3.11/site-packages/"
            "requests/__version__.py"
        )
        restart(sandbox)
        assert sandbox.value("import requests\nrequests.__version__") == "0.1"
        assert sandbox.value("import pandas\npandas.DataFrame({'a': [1]}).a.sum().item()") == 1


def restart(sandbox: Sandbox) -> None:
    (kernel,) = (each for each in sandbox.server.get("/api/kernels").json() if each["sandbox_id"] == sandbox.id)
    assert sandbox.server.post(f"/api/kernels/{kernel['id']}/restart").status_code == 200


# -- a fresh kernel


@pytest.fixture(scope="module")
def fresh(server: Server) -> Any:
    """A sandbox whose kernel has run one cell, and the result of that cell."""
    with server.sandbox(envVars={"DATABASE_URL": "postgresql://x", "EMPTY": ""}) as sandbox:
        yield sandbox, sandbox.execute("sorted(name for name in globals() if not name.startswith('_')), _, __, ___")


def test_kernel_starts_empty(fresh: Any) -> None:
    """A fresh kernel counts from 1, has only IPython's own names, and has no last result."""
    _, cell = fresh
    assert cell["executionCount"] == 1
    names = cell["results"][0]["data"]["text/plain"]
    assert names == "(['In', 'Out', 'exit', 'get_ipython', 'open', 'quit'], '', '', '')"


def test_kernel_is_warm(fresh: Any) -> None:
    """The heavy modules are imported before the first cell."""
    heavy = ["numpy", "pandas", "matplotlib.pyplot", "scipy.stats", "sklearn", "xgboost", "polars"]
    assert fresh[0].value(f"__import__('sys').modules.keys() >= set({heavy})")


def test_kernel_history(fresh: Any) -> None:
    """The user's history holds none of the code that warmed the kernel."""
    history = fresh[0].value("list(In[:2])")
    assert history[0] == ""
    assert history[1].startswith("sorted(name")


# -- the environment

EXPECTED_ENV = {"DATABASE_URL": "postgresql://x", "EMPTY": "", "E2B_SANDBOX": "true"}


def test_environment_everywhere(fresh: Any) -> None:
    """The sandbox's variables and E2B's are the same for commands, for the kernel and in /envs."""
    sandbox = fresh[0]
    expected = {**EXPECTED_ENV, "E2B_SANDBOX_ID": sandbox.id, "E2B_TEMPLATE_ID": "code_interpreter"}
    dump = "import json, os; print(json.dumps(dict(os.environ)))"
    for seen in (
        json.loads(sandbox.run("python3", "-c", dump)["stdout"]),
        sandbox.value("dict(__import__('os').environ)"),
        sandbox.get("/envs").json(),
        dict(line.split("=", 1) for line in sandbox.shell("bash -lc env").splitlines() if "=" in line),
    ):
        assert expected.items() <= seen.items()


def test_environment_of_one_command(fresh: Any) -> None:
    """A command's own variables replace the sandbox's, for that command only."""
    sandbox = fresh[0]
    override = {"DATABASE_URL": "other", "MORE": "1"}
    assert sandbox.shell('echo "$DATABASE_URL $MORE $E2B_SANDBOX"', envVars=override) == "other 1 true\n"
    assert sandbox.shell('echo "$DATABASE_URL ${MORE-unset}"') == "postgresql://x unset\n"


@pytest.mark.parametrize(
    "command",
    [
        "python",
        "python3",
        "bash -c python3",
        "bash -lc python3",
        "sudo python3",
        "sudo -i python3",
        "sh -c 'exec python3'",
    ],
)
def test_virtual_environment_is_active(box: Sandbox, command: str) -> None:
    """Every way to start Python starts 3.11 of the virtual environment, with its libraries."""
    script = "import sys, yaml; print(sys.prefix, *sys.version_info[:2])"
    result = box.run("bash", "-c", command, stdin=script)
    assert result["stdout"] == "/opt/venv 3 11\n", result


def test_user(box: Sandbox) -> None:
    """Commands and cells run as `user` in /home/user, and `user` owns that folder."""
    script = 'echo "$(id -un) $(id -gn) $PWD $HOME $USER $SHELL"; touch /home/user/mine'
    assert box.shell(script) == "user user /home/user /home/user user /bin/bash\n"
    assert box.value("[__import__('os').getcwd(), __import__('getpass').getuser()]") == ["/home/user", "user"]


def test_sudo(box: Sandbox) -> None:
    """`sudo` needs no password, prints nothing of its own, and runs as root."""
    result = box.run("sudo", "id", "-u")
    assert (result["stdout"], result["stderr"], result["exitCode"]) == ("0\n", "", 0)
    assert box.shell("sudo touch /etc/made-by-root && stat -c %U /etc/made-by-root") == "root\n"


def test_pip(box: Sandbox) -> None:
    """pip belongs to the virtual environment, and the user may write there."""
    assert "/opt/venv/" in box.shell("pip --version")
    assert box.shell("test -w /opt/venv/lib/python3.11/site-packages && echo writable") == "writable\n"


def test_size(box: Sandbox) -> None:
    """A sandbox has two processors, 2 GB of memory and 10 GB of disk, as documented, inside and in /metrics."""
    assert box.shell("nproc") == "2\n"
    memory = int(re.search(r"MemTotal: +(\d+) kB", box.shell("cat /proc/meminfo"))[1]) * 1024
    disk = int(box.shell("df --output=size -B1 /home/user").split()[1])
    assert 1.9e9 < memory < 2.3e9
    assert 9.5e9 < disk < 10.8e9
    metrics = box.get("/metrics").json()
    assert metrics["cpu_count"] == 2
    assert metrics["mem_total"] == memory
    assert metrics["disk_total"] == pytest.approx(disk, rel=0.01)
    assert 0 < metrics["mem_used"] < memory
    assert 0 <= metrics["disk_used"] < disk
    model = box.get("").json()
    assert (model["cpuCount"], model["memoryMB"], model["diskSizeMB"]) == (2, 2048, 10240)


def test_disk_takes_gigabytes(box: Sandbox) -> None:
    """The disk takes a sparse file of 9 GB, and a written one of 64 MB."""
    script = "truncate -s 9G big && head -c 64M /dev/zero > real && stat -c %s big real && rm big real"
    assert box.shell(script).split() == [str(9 << 30), str(64 << 20)]


def test_devices(box: Sandbox) -> None:
    """The usual parts of a Linux are there: /dev/fd, /dev/shm, pseudo terminals, /tmp and localhost."""
    script = (
        "set -e; cat <(echo fd); echo x > /dev/shm/x; echo x > /tmp/x; script -qc 'tty' /dev/null | grep -c /dev/pts;"
        "python3 -c \"import socket; print(socket.getaddrinfo('localhost', 80)[0][4][0])\"; hostname"
    )
    assert box.shell(script).split() == ["fd", "1", "127.0.0.1", box.id]


def test_alias(server: Server) -> None:
    """E2B's name of the template gives the same template."""
    assert server.get("/templates/aliases/code-interpreter-v1").json()["templateID"] == "code_interpreter"


def test_base_template(server: Server) -> None:
    """`base` has Python, pip, curl and git, a kernel, and no scientific stack."""
    with server.sandbox("base") as sandbox:
        script = "set -e; python3 --version; pip --version; curl --version | head -1; git --version"
        lines = sandbox.shell(script).splitlines()
        assert [line.split()[0] for line in lines] == ["Python", "pip", "curl", "git"]
        assert lines[0].startswith("Python 3.11.")
        assert sandbox.value("1 + 1") == 2
        assert sandbox.run("python3", "-c", "import pandas")["exitCode"] == 1
        assert sandbox.execute("import numpy")["error"]["name"] == "ModuleNotFoundError"
        assert sandbox.get("/envs").json()["E2B_TEMPLATE_ID"] == "base"
