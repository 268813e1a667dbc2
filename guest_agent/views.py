"""What widgets look like as text, for those who show no widgets.

A widget changes after it was displayed: a progress bar begins at 0 %. Jupyter's clients follow by messages between the
widget and its view. Clients of REST and saved notebooks have only the text that was displayed first. So that text is
displayed again, as an update, when the cell has ended and the widget has another one.
"""

from typing import Any
from uuid import uuid4

VIEW = "application/vnd.jupyter.widget-view+json"


class Views:
    """The widgets that the running cell has displayed.

    `connect` it to a shell once. It then follows what passes the shell's formatter and its display publisher.
    """

    def __init__(self) -> None:
        self._formatted: dict[str, Any] = {}
        self._displayed: dict[str, tuple[Any, dict[str, Any]]] = {}

    def connect(self, shell: Any) -> None:
        self._format = shell.display_formatter.format
        self._publish = shell.display_pub.publish
        shell.display_formatter.format = self._formatting
        shell.display_pub.register_hook(self._displaying)
        shell.events.register("post_execute", self._cell_ended)

    def _formatting(self, thing: Any, *args: Any, **options: Any) -> Any:
        data, metadata = self._format(thing, *args, **options)
        if VIEW in data:
            self._formatted[data[VIEW]["model_id"]] = thing
        return data, metadata

    def _displaying(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give a widget's display an id, by which it can be updated."""
        content = message["content"]
        if message["header"]["msg_type"] == "display_data" and VIEW in content["data"]:
            thing = self._formatted.get(content["data"][VIEW]["model_id"])
            content["transient"].setdefault("display_id", uuid4().hex)
            if thing is not None:
                self._displayed[content["transient"]["display_id"]] = (thing, content)
        return message

    def _cell_ended(self) -> None:
        displayed, self._displayed = self._displayed, {}
        for thing, content in displayed.values():
            text = self._format(thing)[0].get("text/plain")
            if text not in (None, content["data"].get("text/plain")):
                data = {**content["data"], "text/plain": text}
                self._publish(data, content["metadata"], transient=content["transient"], update=True)
        self._formatted.clear()
