"""Write the report of run directories as one HTML file that needs no network.

The file holds the sections as HTML, the figures as JSON, and plotly.js once, gzipped (5 MB become 2); the browser
unpacks it. A figure is drawn when it comes near the window, so that a phone does not draw thirty at once. Text from
files is escaped in HTML and in figures, and the JSON has no "<".
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
from trinity.io.local import make_folder, resolve_path, write_atomically
from trinity.reporting import tables
from trinity.reporting.run_log import RunLog, read_run
from trinity.reporting.template import PAGE, SCRIPT, STYLE, fill

if TYPE_CHECKING:  # plotly may not be installed
    from trinity.reporting.curves import RenderedSection

MARKER = "<!-- a report of trinity runs -->"
"""Marks the first line of a report; only a file with it may be overwritten."""


@dataclass
class Section:
    """A heading and its content.

    Attributes:
        charts: rendered charts.
        html: a table, already escaped.
        missing: titles without data.
        zero: titles whose values were 0 in every step.
    """

    title: str
    charts: list = field(default_factory=list)
    html: str = ""
    missing: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)


def write_report(directories: list[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several runs in the same charts.

    Args:
        directories: run directories; the runs may still be running.
        out: the HTML file; default: report.html in the first directory. An older report there is replaced.
    Returns:
        the file.
    Raises:
        UserError: not a run directory, no step yet, a directory given twice, `out` is a file but no report, or plotly
            is not installed.
    """
    out = out or directories[0] / "report.html"
    check_out(out)
    repeated = [str(path) for path, times in Counter(map(resolve_path, directories)).items() if times > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is given twice; name each run directory once")
    page = report_page([read_run(path) for path in directories])
    make_folder(out.parent)
    write_atomically(out, page)
    return out


def report_page(runs: list[RunLog]) -> str:
    """The report as HTML.

    Raises:
        UserError: plotly is not installed.
    """
    plotly_script()
    _make_names_unique(runs)
    return render_page(", ".join(run.name for run in runs), sections(runs))


def plotly_script() -> str:
    """plotly.js.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('the report needs plotly; install it: pip install "trinity-moe[report]"') from None
    return get_plotlyjs()


def render_page(title: str, page_sections: list[Section]) -> str:
    """A page as HTML, with plotly.js in it.

    Args:
        title: not escaped yet.
    """
    figures: list[dict] = []
    anchors = _anchors([section.title for section in page_sections])
    body = _contents(page_sections, anchors) + "".join(
        _section_html(section, anchor, figures) for section, anchor in zip(page_sections, anchors)
    )
    parts = {
        "MARKER": MARKER,
        "TITLE": _ascii(escape(title)),
        "WHEN": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "STYLE": STYLE,
        "BODY": _ascii(body),
        "FIGURES": to_json(figures).replace("<", "\\u003c"),
        "PLOTLY": _gzip_base64(plotly_script()),
        "SCRIPT": SCRIPT,
    }
    return fill(PAGE, parts)


def sections(runs: list[RunLog]) -> list[Section]:
    """The report's sections, in the order of the page."""
    from trinity.reporting import curves
    from trinity.reporting.needles import render_needle_charts
    from trinity.reporting.routing import render_router_charts

    def charts(title: str, specs: list) -> Section:
        return _section(title, curves.render_charts(specs, runs))

    page_sections = [
        Section("Summary", html=tables.summary(runs)),
        charts("Loss", curves.LOSS),
        charts("Optimizer", curves.OPTIMIZER),
        charts("Speed and memory", curves.SPEED),
        charts("Batches and data", curves.BATCHES),
        charts("Routing", curves.ROUTING),
    ]
    for run in runs:
        title = "Routers by layer" if len(runs) == 1 else f"Routers by layer: {run.name}"
        page_sections.append(_section(title, render_router_charts(run)))
    if any(run.needles for run in runs):
        page_sections.append(charts("Needles", curves.NEEDLES))
    for run in runs:
        if run.needles:
            title = "Needles by depth" if len(runs) == 1 else f"Needles by depth: {run.name}"
            page_sections.append(_section(title, render_needle_charts(run)))
    if any(run.samples for run in runs):
        page_sections.append(Section("Samples", html=tables.samples(runs)))
    for title, html, file in (
        ("Events and restarts", tables.events(runs), "events.jsonl"),
        ("Settings", tables.settings(runs), "config.yaml"),
    ):
        page_sections.append(Section(title, html=html, missing=[] if html else [file]))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if notes:
        page_sections.append(
            Section("What could not be read", html="".join(f"<p>{escape(note)}.</p>" for note in notes))
        )
    return page_sections


def _section(title: str, rendered: "RenderedSection") -> Section:
    return Section(title, rendered.charts, missing=rendered.missing, zero=rendered.zero)


def _anchors(titles: list[str]) -> list[str]:
    """An HTML id for each section: its title's letters and digits, with a number added where two are equal."""
    anchors: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        anchors.append(name if name not in anchors else f"{name}-{len(anchors)}")
    return anchors


def _contents(page_sections: list[Section], anchors: list[str]) -> str:
    links = (f"<a href=#{anchor}>{escape(section.title)}</a>" for section, anchor in zip(page_sections, anchors))
    return f"<nav>{''.join(links)}</nav>"


def _section_html(section: Section, anchor: str, figures: list[dict]) -> str:
    """A section's HTML. Appends its figures to `figures`; the HTML refers to each by its index."""
    parts = [f"<section id={anchor}><h2>{escape(section.title)}</h2>", section.html]
    for chart in section.charts:
        spec = json.loads(chart.figure.to_json(engine="json"))  # numbers as base64, exactly
        spec["layout"].pop("template", None)
        head = f"<h3>{escape(chart.title)}</h3><p class=note>{escape(chart.axes)}</p>"
        note = f"<p class=note>{escape(chart.note)}</p>" if chart.note else ""
        height = spec["layout"].get("height")  # of a figure that needs more than the page's own
        style = f' style="height: {height}px"' if height else ""
        parts.append(f"{head}<div class=figure data-figure={len(figures)}{style}></div><div class=legend></div>{note}")
        figures.append({"title": chart.title, **spec})
    if section.missing:
        parts.append(f"<p class=note>Left out, no data: {escape(', '.join(section.missing))}.</p>")
    if section.zero:
        parts.append(f"<p class=note>Left out, always 0: {escape(', '.join(section.zero))}.</p>")
    return "".join(parts) + "</section>"


@lru_cache(maxsize=1)
def _gzip_base64(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _ascii(html: str) -> str:
    """HTML in ASCII with character references: independent of encodings, also for lone surrogates of a broken file."""
    return html.encode("ascii", "xmlcharrefreplace").decode()


def _make_names_unique(runs: list[RunLog]) -> None:
    """Add the folder to the name of runs that share a name."""
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = f"{run.name} ({run.path})"


def check_out(out: Path, option: str = "--out") -> None:
    """Refuse a file that is no HTML file, or that exists and is not a report; `option` gives it, for messages."""
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder; name an HTML file")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"{option} {out} must end in .html")
    if out.exists():
        with open(out, "rb") as file:
            is_report = MARKER.encode() in file.read(200)
        if not is_report:
            raise UserError(f"{out} exists and is not a report; give another {option}")
