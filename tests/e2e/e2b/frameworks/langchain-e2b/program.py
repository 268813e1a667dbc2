"""LangChain's deepagents in a sandbox of E2B's, with a model that says what it was told: python program.py.

E2B_* are set.
"""

from typing import Any

from deepagents import create_deep_agent
from e2b import Sandbox
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_e2b import E2BSandbox


class Scripted(GenericFakeChatModel):
    """Says one message after the other, whatever tools there are."""

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self


def use(name: str, **args: str) -> AIMessage:
    return AIMessage(content="", tool_calls=[{"name": name, "args": args, "id": name}])


with Sandbox.create(timeout=60) as box:
    home = box.commands.run("pwd").stdout.strip()
    model = Scripted(
        messages=iter(
            [
                use("write_file", file_path=f"{home}/poem.txt", content="roses\nviolets\n"),
                use("execute", command="wc -l < poem.txt; exit 3"),
                use("read_file", file_path=f"{home}/poem.txt"),
                AIMessage(content="two lines"),
            ]
        )
    )
    agent = create_deep_agent(model=model, backend=E2BSandbox(sandbox=box, workdir=home))
    said = agent.invoke({"messages": [("user", "Write a poem and count its lines.")]})["messages"]
    told = [each.content for each in said if isinstance(each, ToolMessage)]
    assert box.files.read(f"{home}/poem.txt") == "roses\nviolets\n"
    assert "poem.txt" in told[0], told
    assert told[1].startswith("2\n"), told
    assert "exit code 3" in told[1], told
    assert "violets" in told[2], told
    assert said[-1].content == "two lines"
