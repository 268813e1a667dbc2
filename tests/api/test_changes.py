"""What a cell changed: told with its end, without running anybody's code, and believed only as far as it is bounded."""

import asyncio
import json
from typing import Any

import pytest

from tests.api.clients import agent, channels
from tests.fakes import Service

NOTHING: dict[str, Any] = {"added": [], "changed": [], "removed": [], "omitted": 0}


def told(cell: dict[str, Any]) -> dict[str, Any]:
    return dict(cell["changes"]["variables"])


def names(variables: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in variables]


async def changed(real: Service, box: str, code: str) -> tuple[list[str], list[str], list[str]]:
    """The names that a cell added, changed and removed."""
    report = told(await real.execute(box, code))
    assert report["omitted"] == 0
    return names(report["added"]), names(report["changed"]), report["removed"]


async def test_variables_of_every_kind(real: Service, real_box: str) -> None:
    """Names, types, lengths. What a cell only reads, what is hidden, and what stays the same is not told."""
    code = "import json\nclass Own: pass\nnumber, text, rows, own, _hidden = 7, 'abc', [1, 2], Own(), 5\nNone"
    assert told(await real.execute(real_box, code))["added"] == [
        {"name": "json", "type": "module", "module": "builtins"},
        {"name": "Own", "type": "type", "module": "builtins"},
        {"name": "number", "type": "int", "module": "builtins"},
        {"name": "text", "type": "str", "module": "builtins", "length": 3},
        {"name": "rows", "type": "list", "module": "builtins", "length": 2},
        {"name": "own", "type": "Own", "module": "__main__"},
    ]
    assert told(await real.execute(real_box, "rows\nnumber = number\n_other = 6")) == NOTHING
    assert await changed(real, real_box, "rows.append(3)\nown = Own()") == ([], ["rows", "own"], [])
    assert await changed(real, real_box, "number = 'now a text'") == ([], ["number"], [])
    assert await changed(real, real_box, "new, text = 1, 'abd'\ndel rows, json") == (
        ["new"],
        ["text"],
        ["json", "rows"],
    )
    assert await changed(real, real_box, "del new\nnew = 1.5\n1 / 0") == ([], ["new"], [])  # the error comes after
    assert await changed(real, real_box, "%reset -f") == ([], [], ["Own", "number", "text", "own", "new"])


async def test_values_that_end_while_the_cell_runs(real: Service, real_box: str) -> None:
    """Another object at the address of the one before is a change, and the one before is not kept alive."""
    await real.execute(
        real_box, "class Own:\n    def __del__(self): ended.append(1)\nended, own, number = [], Own(), 1.5"
    )
    cell = await real.execute(real_box, "for n in range(3): own = Own(); number += 1.0\nlen(ended)")
    assert cell["results"][0]["data"]["text/plain"] == "3"
    assert set(names(told(cell)["changed"])) >= {"own", "number", "ended"}
    cell = await real.execute(real_box, "at = id(own)\nown = None\nown = Own()\nat == id(own)")
    assert "own" in names(told(cell)["changed"]), cell["results"]


HOSTILE = """
calls = []
def called(*_, **__):
    calls.append(1)
    raise RuntimeError('nobody may call this')
watched = ('__repr__ __str__ __eq__ __ne__ __len__ __hash__ __bool__ __getattr__ __getattribute__ __iter__ __format__ '
           '__getitem__ __instancecheck__ __index__ __sizeof__').split()
Meta = type('Meta', (type,), {name: called for name in watched} | {
    '__name__': property(called), '__module__': property(called), '__class__': property(called)})
Hostile = type.__call__(Meta, 'Hostile', (), {name: called for name in watched} | {
    '__class__': property(called), 'shape': property(called)})
Rows = type.__call__(Meta, 'Rows', (list,), {name: called for name in watched})
hostile, rows = object.__new__(Hostile), list.__new__(Rows)
"""


async def test_nobodys_code_runs(real: Service, real_box: str) -> None:
    """Classes and metaclasses that raise, and count, whatever they are asked for."""
    await real.execute(real_box, HOSTILE)
    before = int((await real.execute(real_box, "len(calls)"))["results"][0]["data"]["text/plain"])
    report = told(await real.execute(real_box, "hostile, more = object.__new__(Hostile), list.__new__(Rows)\ndel rows"))
    assert (names(report["added"]), names(report["changed"]), report["removed"]) == (["more"], ["hostile"], ["rows"])
    assert [each["type"] for each in report["added"] + report["changed"]] == ["Rows", "Hostile"]
    assert int((await real.execute(real_box, "len(calls)"))["results"][0]["data"]["text/plain"]) == before


LIBRARY = """
import sys, types
class DataFrame:
    shape = (3, 2)
class Derived(DataFrame): pass
sys.modules['polars'] = types.ModuleType('polars')
sys.modules['polars'].DataFrame = DataFrame
"""
"""The part of polars that is asked for. tests/guest/test_template.py has the libraries themselves."""


async def test_a_type_without_a_module(real: Service, real_box: str) -> None:
    """Its variable is told, and the cell ends."""
    cell = await real.execute(real_box, "made = {}\nexec(\"kind = type('B', (), {})\", made)\nodd = made['kind']()")
    found = {each["name"]: each for each in cell["changes"]["variables"]["added"]}
    assert found["odd"] == {"name": "odd", "type": "B", "module": ""}


async def test_shapes(real: Service, real_box: str) -> None:
    """A library's own types have a shape, and another shape is a change. Types that are made of them have none."""
    await real.execute(real_box, LIBRARY)
    report = told(await real.execute(real_box, "frame, derived = DataFrame(), Derived()"))
    assert [each.get("shape") for each in report["added"]] == [[3, 2], None]
    report = told(await real.execute(real_box, "frame.shape = 4, 2"))
    assert [(each["name"], each["shape"]) for each in report["changed"]] == [("frame", [4, 2])]
    await real.execute(real_box, "frame.shape = 'of a version that is not known'")
    report = told(await real.execute(real_box, "del sys.modules['polars']\nother = frame"))
    assert report["added"] == [{"name": "other", "type": "DataFrame", "module": "__main__"}]


async def test_many_variables(real: Service, real_box: str) -> None:
    """A report tells 50 names and counts the others. A namespace of more than 5,000 is not looked at."""
    await real.execute(real_box, "%reset -f")
    report = told(await real.execute(real_box, "for n in range(80): globals()[f'v{n}'] = n\nglobals()['x' * 101] = 1"))
    assert (len(report["added"]), report["omitted"]) == (50, 32)
    report = told(await real.execute(real_box, "%reset -f"))
    assert (len(report["removed"]), report["omitted"]) == (50, 32)
    cell = await real.execute(real_box, "globals().update({f'v{n}': n for n in range(5001)})")
    assert cell["changes"] is None
    assert (await real.execute(real_box, "%reset -f"))["changes"] is None


async def test_every_way(real: Service, real_box: str) -> None:
    """REST, its streams, executions, the stream for agents, Jupyter's clients and MCP tell the same."""

    def count(changes: dict[str, Any]) -> list[str]:
        return names(changes["variables"]["added"] + changes["variables"]["changed"])

    path, lines = f"/sandboxes/{real_box}/execute", {"Accept": "application/x-ndjson", "Idempotency-Key": "told"}
    answer = await real.call("POST", path, {"code": "way = [1]"}, headers=lines)
    assert count(json.loads(answer.body.splitlines()[-1])["changes"]) == ["way"]
    answer = await real.call("GET", f"/sandboxes/{real_box}/executions/told")
    assert count(json.loads(answer.body)["result"]["changes"]) == ["way"]
    async with agent(real, real_box) as stream:
        assert count((await stream.run("way = [2, 3]"))[-1]["changes"]) == ["way"]
    async with channels(real, real.sandboxes.get(real.owner, real_box).kernel_id) as jupyter:
        done = await jupyter.run("way = [4, 5, 6]")
        reply = next(each for each in jupyter.messages if each.kind == "execute_reply")
        assert done.reply["status"] == "ok"
        assert count(reply.metadata["cellvm"]["changes"]) == ["way"]
        assert reply.metadata["cellvm"]["seq"] == reply.seq
    call = {"name": "run_code", "arguments": {"sandbox": real_box, "code": "way = []"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    answer = await real.call("POST", "/mcp", body, headers={"MCP-Protocol-Version": "2025-06-18"}, timeout=60)
    assert count(json.loads(answer.body)["result"]["_meta"]["cellvm/execution"]["changes"]) == ["way"]


async def test_restarts_and_pairs(real: Service) -> None:
    """A kernel that ended tells nothing, a fresh one begins anew, and of cells at once each tells its own."""
    box = await real.create()
    await real.execute(box, "old = 1")
    assert (await real.execute(box, "lost = 1\nimport os; os._exit(7)"))["changes"] is None
    assert await changed(real, box, "old = 2") == (["old"], [], [])
    assert (
        await real.call("POST", f"/api/kernels/{real.sandboxes.get(real.owner, box).kernel_id}/restart", {})
    ).code == 200
    assert await changed(real, box, "old = 3") == (["old"], [], [])
    both = await asyncio.gather(*(changed(real, box, f"pair{n} = 1") for n in range(6)))
    assert [added for added, _, _ in both] == [[f"pair{n}"] for n in range(6)]
    await real.call("DELETE", f"/sandboxes/{box}")


VARIABLE = {"name": "x", "type": "int", "module": "builtins"}
BAD: list[Any] = [
    5,
    None,
    {"outcome": "unknown", "seq": 5},
    {"changes": None},
    {"changes": {"variables": {**NOTHING, "added": [VARIABLE] * 51}}},
    {"changes": {"variables": {**NOTHING, "added": [{**VARIABLE, "name": "x" * 101}]}}},
    {"changes": {"variables": {**NOTHING, "added": [{**VARIABLE, "length": -1}]}}},
    {"changes": {"variables": {**NOTHING, "added": [{**VARIABLE, "shape": [1] * 9}]}}},
    {"changes": {"variables": {**NOTHING, "removed": [7]}}},
    {"changes": {"variables": {**NOTHING, "omitted": 2**70}}},
    {"changes": {"variables": NOTHING}, "more": "x" * 70_000},
]


@pytest.mark.parametrize("said", [*(json.dumps({"cellvm": each}).encode() for each in BAD), b'{"cellvm":{', b"7"])
async def test_a_report_that_is_wrong(service: Service, box: str, said: bytes) -> None:
    """It counts as none. The cell is whole, and its reply keeps its number."""
    sandbox = service.sandboxes.get(service.owner, box)
    sandbox.guest.vm.guest.script.reply_metadata = said  # type: ignore[attr-defined]
    cell = await service.execute(box, "1 + 1")
    assert (cell["changes"], cell["outcome"], len(cell["results"])) == (None, "finished", 1)
    async with channels(service, sandbox.kernel_id) as jupyter:
        await jupyter.run("2")
        reply = next(each for each in jupyter.messages if each.kind == "execute_reply")
        assert reply.metadata == {"cellvm": {"seq": reply.seq}}


async def test_a_report_that_says_more(service: Service, box: str) -> None:
    """What has the right form is told. What else the kernel says in our name is not, and the rest of it stays."""
    variables = {**NOTHING, "added": [{**VARIABLE, "length": 3, "more": 1}]}
    said = {"status": "ok", "cellvm": {"outcome": "unknown", "seq": 5, "changes": {"variables": variables, "more": 1}}}
    sandbox = service.sandboxes.get(service.owner, box)
    sandbox.guest.vm.guest.script.reply_metadata = json.dumps(said).encode()  # type: ignore[attr-defined]
    told = {"variables": {**NOTHING, "added": [{**VARIABLE, "length": 3}]}}
    cell = await service.execute(box, "1 + 1")
    assert (cell["changes"], cell["outcome"]) == (told, "finished")
    async with channels(service, sandbox.kernel_id) as jupyter:
        await jupyter.run("2")
        reply = next(each for each in jupyter.messages if each.kind == "execute_reply")
        assert reply.metadata == {"cellvm": {"seq": reply.seq, "changes": told}, "status": "ok"}
