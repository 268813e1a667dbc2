"""Imports point one way. The tests read them from the source, so that nothing has to be loaded."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USERS_OF_THE_WIRE = {
    "guest.link",
    "guest.files",
    "guest.commands",
    "kernel.kernel",
    "sandbox.pool",
    "images.build",
    "api.ports",
    "api.rest",
    "api.e2b.envd",
    "api.e2b.filesystem",
    "sandbox.sandbox",
    "__main__",
}
"""The only modules of the gateway that may import guest_agent.wire."""
OURS = {"guest_agent", "kernel_gateway", "cellvm_lab"}


def modules() -> dict[str, Path]:
    found = {}
    for package in (ROOT / "guest_agent", ROOT / "kernel_gateway", ROOT / "lab" / "cellvm_lab"):
        for path in package.rglob("*.py"):
            name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """All imports of a module as full names. `from a import b` counts as a.b if a.b is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def outside(name: str) -> set[str]:
    """Top-level names that are neither ours nor the standard library's."""
    tops = {each.split(".")[0] for each in imports(name)}
    return tops - set(sys.stdlib_module_names) - OURS


def ours(name: str) -> set[str]:
    return {each for each in imports(name) if each.split(".")[0] in OURS}


def below(prefix: str) -> list[str]:
    return sorted(name for name in MODULES if name == prefix or name.startswith(prefix + "."))


def test_the_reader_of_imports_reads() -> None:
    """Known imports are seen."""
    assert "guest_agent.wire" in ours("kernel_gateway.guest.link")
    assert "kernel_gateway.kernel.message" in ours("kernel_gateway.kernel.events")
    assert outside("kernel_gateway.api.base") == {"msgspec", "tornado"}


def test_the_wire_stands_alone() -> None:
    """The protocol needs the standard library and msgspec, nothing of ours."""
    assert ours("guest_agent.wire") == set()
    assert outside("guest_agent.wire") == {"msgspec"}


@pytest.mark.parametrize("name", below("guest_agent"))
def test_the_agent_never_imports_the_gateway(name: str) -> None:
    """The guest's code comes without the gateway."""
    assert not {each for each in imports(name) if each.startswith("kernel_gateway")}


@pytest.mark.parametrize(
    "name",
    [
        "kernel_gateway.errors",
        "kernel_gateway.outcome",
        "kernel_gateway.held",
        "kernel_gateway.rate",
        "kernel_gateway.sandbox.lifecycle",
        "kernel_gateway.sandbox.key",
        *(f"kernel_gateway.kernel.{each}" for each in ("message", "layout", "changes", "events", "shape", "state")),
    ],
)
def test_the_core_is_pure(name: str) -> None:
    """Errors, lifecycle and kernel messages import no technology, and each other only downwards."""
    assert outside(name) <= {"msgspec"}
    messages = {"kernel_gateway.kernel.message"}
    allowed = {
        "kernel_gateway.outcome": {"kernel_gateway.errors"},
        "kernel_gateway.held": {"kernel_gateway.errors"},
        "kernel_gateway.rate": {"kernel_gateway.errors"},
        "kernel_gateway.sandbox.lifecycle": {"kernel_gateway.errors"},
        "kernel_gateway.sandbox.key": {"kernel_gateway.errors"},
        "kernel_gateway.kernel.changes": messages,
        "kernel_gateway.kernel.events": messages | {"kernel_gateway.kernel.changes", "kernel_gateway.outcome"},
        "kernel_gateway.kernel.shape": {"kernel_gateway.kernel.events"},
        "kernel_gateway.kernel.layout": messages,
    }
    assert ours(name) <= allowed.get(name, set())
    assert not imports(name) & {"asyncio", "socket", "subprocess", "os", "time"}


@pytest.mark.parametrize("name", ["kernel_gateway.network.policy", "kernel_gateway.network.rules"])
def test_policies_and_rules_are_pure(name: str) -> None:
    """Policies and rules do no I/O: text and values in, text and values out."""
    assert outside(name) == set()
    allowed = {"kernel_gateway.network.rules": {"kernel_gateway.network.policy", "kernel_gateway.drivers"}}
    assert ours(name) <= allowed.get(name, {"kernel_gateway.errors"})
    assert not imports(name) & {"asyncio", "socket", "subprocess", "os", "time"}


def test_a_hello_is_read_without_io() -> None:
    """Reading a hello is bytes in, a name out."""
    assert ours("kernel_gateway.network.hello") == set()
    assert outside("kernel_gateway.network.hello") == {"h11"}
    assert not imports("kernel_gateway.network.hello") & {"asyncio", "socket", "ssl", "os", "time"}


def test_resolver_and_gate_know_no_namespaces() -> None:
    """Resolver and gate are given sockets, and judge by policies."""
    allowed = {"kernel_gateway.network.hello", "kernel_gateway.network.policy"}
    for name in ("kernel_gateway.network.resolver", "kernel_gateway.network.gate"):
        assert ours(name) == allowed
        assert not imports(name) & {"os", "subprocess"}
    assert {name for name in MODULES if "dns" in outside(name)} == {"kernel_gateway.network.resolver"}


@pytest.mark.parametrize("name", below("kernel_gateway.network"))
def test_networks_know_nothing_above_them(name: str) -> None:
    """A network knows errors and the protocols of drivers, but no driver, no sandbox and no HTTP."""
    allowed = {"kernel_gateway.errors", "kernel_gateway.drivers", *below("kernel_gateway.network")}
    assert ours(name) <= allowed


@pytest.mark.parametrize("name", below("kernel_gateway.api"))
def test_the_api_knows_only_policies_of_the_network(name: str) -> None:
    """HTTP reads policies, and the machine's network enforces them."""
    assert ours(name) & set(below("kernel_gateway.network")) <= {"kernel_gateway.network.policy"}


@pytest.mark.parametrize("name", below("kernel_gateway.drivers"))
def test_drivers_know_nothing_above_them(name: str) -> None:
    """A driver knows snapshots and other driver modules, but no sandboxes, no HTTP and no kernel."""
    allowed = ("kernel_gateway.drivers", "kernel_gateway.images.snapshot", "kernel_gateway.images.cache")
    allowed += ("kernel_gateway.private",)
    assert all(each.startswith(allowed) for each in ours(name)), ours(name)


def test_only_the_composition_chooses_drivers() -> None:
    """Sandboxes, guests and kernels know the protocols. Only the host's tools and the composition know a driver."""
    protocols = {"kernel_gateway.drivers"}
    above = set(MODULES) - set(below("kernel_gateway.drivers"))
    found = {name: {each for each in ours(name) if each.startswith("kernel_gateway.drivers")} for name in above}
    host_tools = {"kernel_gateway.host", "kernel_gateway.kvm", "kernel_gateway.images.build"}
    assert {name for name, used in found.items() if used - protocols} == {*host_tools, "kernel_gateway.server"}


@pytest.mark.parametrize("name", below("kernel_gateway.api"))
def test_the_api_knows_no_driver(name: str) -> None:
    """The HTTP layer imports no driver of machines."""
    assert not {each for each in ours(name) if each.startswith("kernel_gateway.drivers")}


def test_only_some_speak_the_wire() -> None:
    """The modules of the gateway that know the protocol are these and no others, and they import nothing else of it."""
    users = {
        name.removeprefix("kernel_gateway."): {each for each in ours(name) if each.startswith("guest_agent")}
        for name in below("kernel_gateway")
    }
    assert {name for name, used in users.items() if used} == USERS_OF_THE_WIRE
    assert all(users[name] == {"guest_agent.wire"} for name in USERS_OF_THE_WIRE)


def test_the_codec_of_connect_is_pure() -> None:
    """Connect's envelopes and errors are bytes in, values out."""
    assert ours("kernel_gateway.api.e2b.connect") == {"kernel_gateway.errors"}
    assert outside("kernel_gateway.api.e2b.connect") == {"msgspec"}
    assert not imports("kernel_gateway.api.e2b.connect") & {"asyncio", "socket", "subprocess", "os", "time"}


def test_guest_files_know_no_dialect() -> None:
    """Files of a guest are below HTTP, so that each dialect can share them."""
    guest = {"kernel_gateway.guest.guest", "kernel_gateway.guest.link", "kernel_gateway.held"}
    assert ours("kernel_gateway.guest.files") == {"guest_agent.wire", "kernel_gateway.errors", *guest}
    assert outside("kernel_gateway.guest.files") == set()


def test_tornado_stays_at_the_edge() -> None:
    """Only the API and the composition root import the web server, and only webhooks its client."""
    users = {name for name in below("kernel_gateway") if "tornado" in outside(name)}
    assert users <= {*below("kernel_gateway.api"), "kernel_gateway.server", "kernel_gateway.webhooks"}


def test_the_journal_knows_only_messages() -> None:
    """The journal knows nothing of kernels, sandboxes and sockets."""
    assert ours("kernel_gateway.kernel.journal") == {"kernel_gateway.kernel.message"}
    assert outside("kernel_gateway.kernel.journal") == {"msgspec"}


def test_commands_know_no_dialect() -> None:
    """Commands are below whatever speaks of them: they know the link, a journal and outcomes, and no HTTP or kernel."""
    allowed = {f"kernel_gateway.{name}" for name in ("errors", "held", "outcome", "guest.link", "kernel.journal")}
    assert ours("kernel_gateway.guest.commands") == {"guest_agent.wire", *allowed}
    assert outside("kernel_gateway.guest.commands") == {"msgspec"}  # for what is stored of them in a pause


def test_what_runs_in_jupyterlab_stands_alone() -> None:
    """JupyterLab's side needs Jupyter's server and nothing of ours; our server needs nothing of Jupyter's."""
    for name in below("cellvm_lab"):
        assert ours(name) <= set(below("cellvm_lab"))
        assert outside(name) <= {"jupyter_server", "nbformat", "tornado", "traitlets"}
    for name in {*below("kernel_gateway"), *below("guest_agent")}:
        assert not ours(name) & set(below("cellvm_lab"))
        assert not outside(name) & {"jupyter_server", "traitlets"}


def test_what_crosses_to_services_is_pure() -> None:
    """Heads of requests and answers are values: no I/O, no web server, only h11."""
    assert outside("kernel_gateway.ports") == {"h11"}
    assert ours("kernel_gateway.ports") == {"kernel_gateway.errors", "kernel_gateway.sandbox.key"}
    assert not imports("kernel_gateway.ports") & {"asyncio", "socket", "subprocess", "os", "time"}


def test_only_the_root_imports_the_root() -> None:
    """Nothing but the command line imports the server."""
    users = {name for name in MODULES if "kernel_gateway.server" in imports(name)}
    assert users == {"kernel_gateway.__main__"}


def test_no_circles() -> None:
    """No module imports itself through others."""
    graph = {name: ours(name) & set(MODULES) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for each in graph[name]:
                visit(each, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(MODULES)
