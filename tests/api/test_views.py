"""Widgets as text: what a REST client gets of a progress bar is its last state, not its first."""

import pytest

from tests.fakes import Service

WIDGET = """
from IPython.display import display
class Bar:
    def __init__(self):
        self.done = 0
    def _repr_mimebundle_(self, **options):
        view = {"version_major": 2, "version_minor": 0, "model_id": f"model-{id(self)}"}
        return {"text/plain": f"{self.done}%", "application/vnd.jupyter.widget-view+json": view}
bar, other = Bar(), Bar()
"""


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("display(bar)\nbar.done = 100", ["100%"]),
        ("display(bar)", ["0%"]),
        ("display(bar)\ndisplay(other)\nother.done = 50\ndisplay('text')", ["0%", "50%", "'text'"]),
        ("display(bar)\nbar.done = 30\ndisplay(bar)\nbar.done = 60", ["60%", "60%"]),
        ("display(bar, display_id='mine')\nbar.done = 5", ["5%"]),
        ("display(bar)\nbar.done = 7\nraise ValueError", ["7%"]),
        ("bar.done = 9\nbar", ["9%"]),
    ],
)
async def test_a_widgets_text_is_its_last(real: Service, real_box: str, code: str, texts: list[str]) -> None:
    """An answer has the text of each display as it was when the cell ended, and the view that was displayed."""
    cell = await real.execute(real_box, WIDGET + code)
    assert [result["data"]["text/plain"] for result in cell["results"]] == texts
    views = ["application/vnd.jupyter.widget-view+json" in result["data"] for result in cell["results"]]
    assert views == [text.endswith("%") for text in texts]
    later = await real.execute(real_box, "bar.done = 1")
    assert later["results"] == []
