"""From run directories to one HTML file that needs no network: sections, figures as JSON, plotly.js packed into it.

plotly.js stands in the file once, gzipped (5 MB become 2); the browser unpacks it. Figures are drawn when they come
near the window, so that a phone does not draw thirty at once. Text from files never becomes markup: it is escaped in
HTML and in figures, and no "<" stands in the JSON.
"""

import base64
import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trinity.errors import UserError
from trinity.io.json_files import to_json
from trinity.io.local import make_folder, write_atomically
from trinity.reporting import tables
from trinity.reporting.run_log import RunLog, read_run
from trinity.reporting.template import PAGE, SCRIPT, STYLE, fill

if TYPE_CHECKING:  # plotly may not be installed
    from trinity.reporting.curves import Drawn

MARKER = "<!-- a report of trinity runs -->"
"""In the first line: only such a file may be overwritten."""


@dataclass
class Section:
    """A heading with what stands below it.

    Attributes:
        pictures: drawn charts.
        html: a table, already escaped.
        missing: what had no data.
        zero: what was 0 in every step.
    """

    title: str
    pictures: list = field(default_factory=list)
    html: str = ""
    missing: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)


def write_report(directories: list[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several drawn over each other.

    Args:
        directories: run directories; the runs may still be going.
        out: the HTML file; by default report.html in the first directory. An older report there is replaced.
    Returns:
        the file.
    Raises:
        UserError: not a run directory, no step yet, a directory named twice, `out` is something else than a report,
            or plotly is not installed.
    """
    out = out or directories[0] / "report.html"
    _check_out(out)
    doubled = [str(path) for path, times in Counter(path.resolve() for path in directories).items() if times > 1]
    if doubled:
        raise UserError(f"{doubled[0]} is given twice; name each run directory once")
    page = report_page([read_run(path) for path in directories])
    make_folder(out.parent)
    write_atomically(out, page)
    return out


def report_page(runs: list[RunLog]) -> str:
    """The whole HTML text.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('the report needs plotly; install it: pip install "trinity-moe[report]"') from None
    _distinguish(runs)
    figures: list[dict] = []
    shown = sections(runs)
    marks = _anchors([section.title for section in shown])
    body = _contents(shown, marks) + "".join(
        _section_html(section, mark, figures) for section, mark in zip(shown, marks)
    )
    parts = {
        "MARKER": MARKER,
        "TITLE": _ascii(escape(", ".join(run.name for run in runs))),
        "WHEN": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "STYLE": STYLE,
        "BODY": _ascii(body),
        "FIGURES": to_json(figures).replace("<", "\\u003c"),
        "PLOTLY": _packed(get_plotlyjs()),
        "SCRIPT": SCRIPT,
    }
    return fill(PAGE, parts)


def sections(runs: list[RunLog]) -> list[Section]:
    """Everything the runs have data for, in the order of the page."""
    from trinity.reporting import curves
    from trinity.reporting.routing import router_pictures

    def charts(title: str, some: list) -> Section:
        return _drawn(title, curves.pictures(some, runs))

    found = [
        Section("Summary", html=tables.summary(runs)),
        charts("Loss", curves.LOSS),
        charts("Optimizer", curves.OPTIMIZER),
        charts("Speed and memory", curves.SPEED),
        charts("Batches and data", curves.BATCHES),
        charts("Routing", curves.ROUTING),
    ]
    for run in runs:
        title = "Routers by layer" if len(runs) == 1 else f"Routers by layer: {run.name}"
        found.append(_drawn(title, router_pictures(run)))
    if any(run.samples for run in runs):
        found.append(Section("Samples", html=tables.samples(runs)))
    for title, html, file in (
        ("Events and restarts", tables.events(runs), "events.jsonl"),
        ("Settings", tables.settings(runs), "config.yaml"),
    ):
        found.append(Section(title, html=html, missing=[] if html else [file]))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if notes:
        found.append(Section("What could not be read", html="".join(f"<p>{escape(note)}.</p>" for note in notes)))
    return found


def _drawn(title: str, drawn: "Drawn") -> Section:
    return Section(title, drawn.pictures, missing=drawn.missing, zero=drawn.zero)


def _anchors(titles: list[str]) -> list[str]:
    """A name for each section that links can end with: its title's letters, and a number where two are alike."""
    found: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def _contents(shown: list[Section], marks: list[str]) -> str:
    links = (f"<a href=#{mark}>{escape(section.title)}</a>" for section, mark in zip(shown, marks))
    return f"<nav>{''.join(links)}</nav>"


def _section_html(section: Section, mark: str, figures: list[dict]) -> str:
    """A section's HTML; its figures are added to the page's list, and each has its place by number."""
    parts = [f"<section id={mark}><h2>{escape(section.title)}</h2>", section.html]
    for picture in section.pictures:
        spec = json.loads(picture.figure.to_json(engine="json"))  # numbers as base64, exactly
        spec["layout"].pop("template", None)
        head = f"<h3>{escape(picture.title)}</h3><p class=note>{escape(picture.axes)}</p>"
        note = f"<p class=note>{escape(picture.note)}</p>" if picture.note else ""
        parts.append(f"{head}<div class=figure data-figure={len(figures)}></div><div class=legend></div>{note}")
        figures.append({"title": picture.title, **spec})
    if section.missing:
        parts.append(f"<p class=note>Left out, no data: {escape(', '.join(section.missing))}.</p>")
    if section.zero:
        parts.append(f"<p class=note>Left out, always 0: {escape(', '.join(section.zero))}.</p>")
    return "".join(parts) + "</section>"


@lru_cache(maxsize=1)
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _ascii(html: str) -> str:
    """The same to a browser, and no encoding can harm it, half a character of a broken file included."""
    return html.encode("ascii", "xmlcharrefreplace").decode()


def _distinguish(runs: list[RunLog]) -> None:
    """Runs of one name are told apart by their folders."""
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = f"{run.name} ({run.path})"


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name an HTML file")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out} must end in .html")
    if out.exists():
        with open(out, "rb") as file:
            ours = MARKER.encode() in file.read(200)
        if not ours:
            raise UserError(f"{out} is there and is not a report; give another --out")
