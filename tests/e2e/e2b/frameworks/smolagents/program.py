"""smolagents' agent with E2B's executor and a model that says what it was told: python program.py. E2B_* are set."""

from typing import Any

from smolagents import ChatMessage, CodeAgent, Model


class Scripted(Model):
    """Says one text after the other."""

    def __init__(self, *texts: str) -> None:
        super().__init__(model_id="scripted")
        self.texts = list(texts)
        self.heard: list[str] = []

    def generate(self, messages: list[Any], **_: Any) -> ChatMessage:
        self.heard.append(str(messages[-1].content))
        return ChatMessage(role="assistant", content=self.texts.pop(0))


def block(code: str) -> str:
    return f"Thought: next.\n<code>\n{code}\n</code>"


model = Scripted(
    block("import os\nnumbers = [n * n for n in range(5)]\nprint('sum', sum(numbers), os.environ['E2B_SANDBOX'])"),
    block("1 / 0"),
    block("final_answer({'numbers': numbers, 'largest': max(numbers)})"),
)
with CodeAgent(tools=[], model=model, executor_type="e2b", verbosity_level=0) as agent:
    answer = agent.run("Square the numbers below 5.")
    box = agent.python_executor.sandbox
assert answer == {"numbers": [0, 1, 4, 9, 16], "largest": 16}, answer
assert "sum 30 true" in model.heard[1], model.heard[1]
assert "ZeroDivisionError" in model.heard[2], model.heard[2]
assert not box.is_running()
