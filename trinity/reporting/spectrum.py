"""Heat maps of Spectrum's scores: modules by layer, for each of the two scores."""

import math
from html import escape
from typing import Any

import plotly.graph_objects as go

from trinity.reporting.curves import RenderedChart
from trinity.reporting.page import Section, render_page

_TITLES = {"mp": "Signal above the edge of noise", "spectrum": "Score of Spectrum's script"}
AXES = "columns: layers; rows: modules, of experts the median of a stack; colour: the score's logarithm to base 10"


def spectrum_page(title: str, results: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        results: "modules", each with module, type, layer, shape, matrices, mp, spectrum, rank, and whether it is
            trained; "memory", lines of text; "units", those that train.
    """
    modules = [module for module in results["modules"] if module["layer"] is not None]
    charts = [_heatmap(kind, modules) for kind in _TITLES]
    trained = [unit["name"] for unit in results["units"] if unit["trained"]]
    chosen = f"<p>{len(trained)} of {len(results['units'])} units train:</p><pre>{escape(chr(10).join(trained))}</pre>"
    memory = f"<pre>{escape(chr(10).join(results['memory']))}</pre>" if results["memory"] else ""
    page = [Section("Scores by layer and module", charts), Section("What trains", html=chosen)]
    return render_page(title, page + ([Section("Memory", html=memory)] if memory else []))


def _heatmap(kind: str, modules: list[dict[str, Any]]) -> RenderedChart:
    # a gain has no spectrum of noise
    shown = [module for module in modules if kind == "spectrum" or len(module["shape"]) == 2]
    types = list(dict.fromkeys(module["type"] for module in shown))
    layers = sorted({module["layer"] for module in shown})
    cell = {(module["type"], module["layer"]): module for module in shown}
    grid = [[cell.get((kind_of, layer)) for layer in layers] for kind_of in types]
    heatmap = go.Heatmap(
        z=[[_log(module, kind) for module in row] for row in grid],
        x=[str(layer) for layer in layers], y=types, xgap=2, ygap=2, colorscale="Viridis",
        text=[["●" if module and module["trained"] else "" for module in row] for row in grid], texttemplate="%{text}",
        customdata=[[_hover(module) for module in row] for row in grid],
        hovertemplate="layer %{x}, %{y}<br>%{customdata}<extra></extra>", hoverongaps=False,
    )  # fmt: skip
    layout = {
        "xaxis": {"type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "margin": {"l": 190},
        "height": max(300, 26 * len(types) + 120),
    }
    return RenderedChart(
        _TITLES[kind],
        AXES,
        go.Figure(heatmap, layout),
        "A dot: the module trains. Empty: a score of 0, or no such module in the layer.",
    )


def _log(module: dict[str, Any] | None, kind: str) -> float | None:
    """The logarithm of the score; None, an empty cell, without one, for 0 and for infinity."""
    value = module[kind] if module else None
    return math.log10(value) if value and math.isfinite(value) else None


def _hover(module: dict[str, Any] | None) -> str:
    if module is None:
        return ""
    shape = " × ".join(map(str, module["shape"]))
    of = f"{module['matrices']} of {shape}" if module["matrices"] > 1 else shape
    return f"{of}, rank {module['rank']}, mp {module['mp']:.3g}, spectrum {module['spectrum']:.3g}"
