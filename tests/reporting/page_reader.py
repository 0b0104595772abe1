"""Read a report page back: its tags, text, tables and figures."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np


class Page(HTMLParser):
    """A parsed report: tags, text, table rows and figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text_parts: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: dict[str, str] = {}
        self._open = ("", {})
        self.source = path.read_text(encoding="ascii")
        self.feed(self.source)
        self.close()
        self.figures = {figure["title"]: figure for figure in json.loads(self.scripts["figures"])}
        self.text = " ".join(" ".join(self.text_parts).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._open = (tag, dict(attrs))
        self.tags.append(self._open)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open
        if tag == "script":
            self.scripts[attributes.get("id", "")] = data
            return
        self.text_parts.append(data)
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    def curves(self, title: str) -> dict[str, tuple[list, list]]:
        """(x, y) of each curve of a figure, by its name in the legend."""
        return {trace["meta"]: (array(trace["x"]), array(trace["y"])) for trace in self.figures[title]["data"]}

    def row(self, name: str) -> list[str]:
        """The cells beside a row header in the first table that has it."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


def array(value: list | dict) -> list:
    """Numbers of plotly's JSON: a list, or base64 with its dtype."""
    if isinstance(value, list):
        return value
    flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    shape = [int(size) for size in value.get("shape", "").split(",") if size]
    return (flat.reshape(shape) if shape else flat).tolist()
