"""E2B's builder of templates, as people use it: python templates.py URL [real]. `real` runs what needs a machine.

Each line that it prints names methods that have worked.
"""

import asyncio
import os
import sys
from pathlib import Path
from tempfile import mkdtemp
from zipfile import ZipFile

URL, IS_REAL = sys.argv[1], "real" in sys.argv
os.environ |= {"E2B_API_URL": URL, "E2B_SANDBOX_URL": URL}

from e2b import AsyncTemplate, BuildException, Sandbox, Template, default_build_logger, wait_for_port  # noqa: E402

FOLDER = Path(mkdtemp())
(FOLDER / "app").mkdir()
(FOLDER / "app" / "main.py").write_text("import greeting\nprint(greeting.TEXT)\n")
(FOLDER / "app" / "greeting.py").write_text("TEXT = 'hello'\n")
(FOLDER / "notes.txt").write_text("notes")
WHEEL = "polite-1-py3-none-any.whl"
with ZipFile(FOLDER / WHEEL, "w") as wheel:
    wheel.writestr("polite.py", "PLEASE = 'please'\n")
    wheel.writestr("polite-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: polite\nVersion: 1\n")
    wheel.writestr("polite-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("polite-1.dist-info/RECORD", "")


def shown(*methods: str) -> None:
    print(" ".join(methods), flush=True)


def steps() -> None:
    """Files, variables, a folder, a user and commands; logs; a name with a tag."""
    said: list[str] = []
    template = (
        Template(file_context_path=FOLDER)
        .from_template("base")
        .set_envs({"WORD": "written"})
        .copy("app", "/srv/app")
        .copy_items([{"src": "notes.txt", "dest": "/srv/app/"}])
        .run_cmd("echo $WORD")
        .set_workdir("/srv/app")
        .set_user("root")
    )
    info = Template.build(template, "app:v1", tags=["stable"], on_build_logs=lambda entry: said.append(entry.message))
    assert "written" in said, said
    assert info.tags == ["v1", "stable"]
    status = Template.get_build_status(info)
    assert status.status == "ready"
    shown("build", "get_build_status", "from_template", "set_envs", "copy", "copy_items", "run_cmd", "set_workdir",
          "set_user")  # fmt: skip
    assert Template.exists("app")
    assert not Template.exists("other")
    assert Template.alias_exists("app")
    shown("exists", "alias_exists")
    with Sandbox.create("app:stable") as box:
        assert box.files.read("/srv/app/main.py").startswith("import greeting")
        assert box.files.read("/srv/app/notes.txt") == "notes"
        assert box.get_info().template_id == info.template_id
    tag = Template.assign_tags("app:v1", ["v2", "v3"])
    assert (tag.build_id, sorted(tag.tags)) == (info.build_id, ["v2", "v3"])
    Template.remove_tags("app", ["v2"])
    assert {each.tag for each in Template.get_tags("app")} == {"v1", "stable", "v3"}
    shown("assign_tags", "remove_tags", "get_tags")


def again() -> None:
    """The same steps once more are taken from the build before, unless the cache is skipped."""
    said: list[str] = []
    template = Template().from_base_image().run_cmd("touch /tmp/a")
    Template.build(template, "again")
    Template.build(template, "again", on_build_logs=lambda entry: said.append(entry.message))
    assert any("earlier build" in line for line in said), said
    said.clear()
    Template.build(template, "again", skip_cache=True, on_build_logs=lambda entry: said.append(entry.message))
    assert not any("earlier build" in line for line in said), said
    shown("from_base_image", "skip_cache")


def failures() -> None:
    """A step that fails is told with its line, and so is an image that can't be had."""
    try:
        Template.build(Template().from_debian_image("bookworm").run_cmd("exit 3"), "fails")
    except BuildException as error:
        assert "exit status 3" in str(error), error
        assert error.__traceback__ is not None
    else:
        raise AssertionError("it did not fail")
    try:
        Template.build(Template().from_ubuntu_image().run_cmd("true"), "fails")
    except BuildException as error:
        assert "python:3.11" in str(error) or "can't be built" in str(error), error
    else:
        raise AssertionError("it did not fail")
    shown("from_debian_image")


async def background() -> None:
    """The async builder, and a build that nobody waits for."""
    template = AsyncTemplate().from_python_image("3.11").set_ready_cmd("exit 0")
    info = await AsyncTemplate.build_in_background(template, "later")
    while (await AsyncTemplate.get_build_status(info)).status in ("building", "waiting"):
        await asyncio.sleep(0.1)
    assert await AsyncTemplate.exists("later")
    shown("build_in_background", "from_python_image", "set_ready_cmd")


def real() -> None:
    """What needs a machine: packages, users' rights, a server that runs in every sandbox from its first moment."""
    template = (
        Template(file_context_path=FOLDER)
        .from_python_image("3.11")
        .copy("app/*.py", "/srv/app/", user="user", mode=0o755)
        .make_dir("/srv/app/deep/er")
        .make_symlink("/srv/app/main.py", "/srv/app/link.py")
        .run_cmd("python -c 'import sys; print(sys.version)' > /srv/app/version")
        .copy(WHEEL, "/srv/")
        .pip_install(f"--no-index /srv/{WHEEL}")
        .run_cmd("id -un > /root/who", user="root")
        .rename("/srv/app/deep", "/srv/app/renamed")
        .remove("/srv/app/renamed/er", recursive=True)
        .set_workdir("/srv/app")
        .set_start_cmd("python -m http.server 8000", wait_for_port(8000))
    )
    info = Template.build(template, "served", on_build_logs=default_build_logger())
    with Sandbox.create("served") as box:
        ran = box.commands.run("python link.py && id -un && pwd && python -c 'import polite' && ls -ld main.py renamed")
        lines = ran.stdout.splitlines()
        assert lines[:3] == ["hello", "user", "/srv/app"], ran
        assert lines[3].startswith("-rwxr-xr-x 1 user user"), ran
        assert box.commands.run("curl -s http://127.0.0.1:8000/greeting.py").stdout == "TEXT = 'hello'\n"
        assert box.commands.run("cat /root/who", user="root").stdout == "root\n"
        assert [each.args[-1] for each in box.commands.list()] == ["python -m http.server 8000"]
        # What E2B's SDK does with snapshots, forks and pauses on a machine.
        box.files.write("/home/user/kept", "1")
        kept = box.create_snapshot()
        (fork,) = box.fork()
        box.files.write("/home/user/kept", "2")
        with Sandbox.create(kept.snapshot_id) as copy:
            assert copy.files.read("/home/user/kept") == "1"
        assert fork.files.read("/home/user/kept") == "1"
        fork.kill()
        pid = box.commands.run("sleep 600", background=True).pid
        box.pause()
        assert not box.is_running()
        box.connect()
        assert box.files.read("/home/user/kept") == "2"
        assert pid in [each.pid for each in box.commands.list()]
        assert box.commands.run("curl -s http://127.0.0.1:8000/greeting.py").stdout == "TEXT = 'hello'\n"
        assert any(each.snapshot_id == kept.snapshot_id for each in Sandbox.list_snapshots().next_items())
        assert Sandbox.delete_snapshot(kept.snapshot_id)
    assert info.name == "served"


if IS_REAL:
    real()
else:
    steps()
    again()
    failures()
    asyncio.run(background())
sys.stdout.flush()
os._exit(0)  # the SDK's HTTP client now and then aborts while the interpreter ends
