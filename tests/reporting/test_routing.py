"""Charts of router.jsonl: values read back from the figures."""

from pathlib import Path

import numpy as np

from tests.reporting.page_reader import Page, array
from tests.reporting.run_files import (
    DENSE,
    EXPERTS,
    LAYERS,
    STEPS,
    entries,
)
from trinity.reporting import write_report


def test_routers_by_layer(run: Path) -> None:
    """Loads as multiples of an even share (float32), the slider's entries, heat maps and curves by layer."""
    page = Page(write_report([run]))
    load = page.figures["Load of each expert"]["data"]
    assert [trace["name"] for trace in load] == [f"step {entry['step']}" for entry in entries()]
    assert [trace["visible"] for trace in load] == [False] * (len(entries()) - 1) + [True]
    for trace, entry in zip(load, entries()):
        assert array(trace["z"]) == (np.array(entry["load"]) * EXPERTS).astype(np.float32).tolist()
    slider = page.figures["Load of each expert"]["layout"]["sliders"][0]["steps"]
    assert [step["args"][0]["visible"].index(True) for step in slider] == list(range(len(entries())))
    heat = page.figures["MaxVio by layer"]["data"][0]
    assert array(heat["z"]) == np.array([entry["max_violation"] for entry in entries()]).T.tolist()
    assert array(heat["x"]) == [0, *(entry["tokens"] for entry in entries())]
    for one in (heat, *load, page.figures[f"Expert bias after step {STEPS}"]["data"][0]):
        assert array(one["y"]) == [DENSE, DENSE + 1, DENSE + 2]
    paths = page.curves("Expert bias by layer: largest − smallest")
    for layer in range(LAYERS):
        assert paths[f"layer {DENSE + layer}"][1] == [entry["bias_range"][layer] for entry in entries()]
    bias = page.figures[f"Expert bias after step {STEPS}"]["data"][0]
    assert array(bias["z"]) == np.array(entries()[-1]["bias"], np.float32).tolist()
