"""Which arguments and variables a fork of a warm interpreter can stand for."""

import pytest

from guest_agent.startup import Program, names_variables, program

ENV = {"LANG": "C.UTF-8"}


def asked(*argv: str, terminal: bool = False, **env: str) -> Program | None:
    return program(["python3", *argv], {**ENV, **env}, terminal=terminal)


@pytest.mark.parametrize(
    ("argv", "kind", "what", "shown"),
    [
        (["-c", "pass"], "command", "pass", ["-c"]),
        (["-cpass", "-c", "x"], "command", "pass", ["-c", "-c", "x"]),
        (["-c", ""], "command", "", ["-c"]),
        (["-uBc", "pass"], "command", "pass", ["-c"]),
        (["-u", "-B", "-m", "json.tool", "-u"], "module", "json.tool", ["-m", "-u"]),
        (["-mjson"], "module", "json", ["-m"]),
        (["a.py", "-c"], "script", "a.py", ["a.py", "-c"]),
        (["-u", "./a b.py"], "script", "./a b.py", ["./a b.py"]),
        ([], "stdin", "", [""]),
        (["-"], "stdin", "", ["-"]),
        (["-", "x", "-u"], "stdin", "", ["-", "x", "-u"]),
    ],
)
def test_what_runs(argv: list[str], kind: str, what: str, shown: list[str]) -> None:
    """The program and its arguments are found as the interpreter finds them."""
    found = asked(*argv)
    assert found is not None
    assert (found.kind, found.what, found.argv) == (kind, what, shown)


@pytest.mark.parametrize(
    "argv",
    [
        "-c",
        "-m",
        "-V",
        "-h",
        "-i -c pass",
        "-ic pass",
        "-I -c pass",
        "-E a.py",
        "-s a.py",
        "-S a.py",
        "-O a.py",
        "-W error a.py",
        "-X utf8 a.py",
        "-v a.py",
        "-x a.py",
        "--version",
        "--help",
        "-uI a.py",
        "-q",
        "-b a.py",
        "-P a.py",
    ],
)
def test_what_a_fork_can_not_be(argv: str) -> None:
    """Options that change how an interpreter starts need one that starts."""
    assert asked(*argv.split()) is None


def test_flags() -> None:
    """Two options can be taken on, and so can the variables that stand for them."""
    found = [asked("-c", "pass"), asked("-u", "-c", "pass"), asked("-c", "pass", PYTHONUNBUFFERED="1")]
    assert [each and each.unbuffered for each in found] == [False, True, True]
    found = [asked("-c", "pass"), asked("-B", "-c", "pass"), asked("-c", "pass", PYTHONDONTWRITEBYTECODE="1")]
    assert [each and each.no_bytecode for each in found] == [False, True, True]


@pytest.mark.parametrize("name", ["python", "python3", "python3.11", "/opt/venv/bin/python3"])
def test_names(name: str) -> None:
    """An interpreter is asked for by its name or its path."""
    assert program([name, "-c", "pass"], ENV, terminal=False) is not None


@pytest.mark.parametrize("name", ["python2", "python3.12", "pypy3", "ipython3", "bash", "python3/", ""])
def test_other_programs(name: str) -> None:
    """Other names are other programs."""
    assert program([name, "-c", "pass"], ENV, terminal=False) is None


@pytest.mark.parametrize(
    "env",
    [
        {"CELLVM_INSTANT_PYTHON": "0"},
        {"PYTHONHASHSEED": "0"},
        {"PYTHONHOME": "/"},
        {"PYTHONSTARTUP": "a"},
        {"PYTHONINSPECT": "1"},
        {"PYTHONUTF8": "1"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONNODEBUGRANGES": "1"},
        {"LC_ALL": "C"},
        {"LC_CTYPE": "de_DE.UTF-8"},
        {"LANG": ""},
        {"LANG": "POSIX"},
        {"A": "b\x00c"},
    ],
)
def test_environments_that_a_fork_can_not_take_on(env: dict[str, str]) -> None:
    """What only a start reads needs a start, and the switch turns forks off."""
    assert asked("-c", "pass", **env) is None


@pytest.mark.parametrize(
    "env",
    [
        {"CELLVM_INSTANT_PYTHON": "1"},
        {"PYTHONPATH": "lib"},
        {"TZ": "Asia/Tokyo"},
        {"LC_ALL": "en_US.UTF-8"},
        {"PYTHONBREAKPOINT": "0"},
        {"DATABASE_URL": "x"},
    ],
)
def test_environments_that_a_fork_takes_on(env: dict[str, str]) -> None:
    """What is read again, or later, is no hindrance."""
    assert asked("-c", "pass", **env) is not None


def test_terminals() -> None:
    """At a terminal there is a prompt, unless the arguments name a program."""
    assert asked(terminal=True) is None
    assert asked("-", terminal=True) is None
    assert asked("-c", "pass", terminal=True) is not None


def test_variables_in_a_program() -> None:
    """A program that names a variable may set it before an import that reads it."""
    text = "import os\nos.environ['OMP_NUM_THREADS'] = '1'; os.putenv('MINE', HOME)"
    assert names_variables(text, {"HOME", "OTHER"}) == {"OMP_NUM_THREADS", "HOME"}
    assert names_variables("import pandas as pd\npd.NA, 'ABC'", {"HOME"}) == set()
