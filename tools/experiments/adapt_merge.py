"""Merging in the comparison of adaptations: merges back into the base, merges of the domains' models, searches, DAM."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapt_texts import DOMAINS, GENERAL, MANUAL, NAMES, TRAIN, UNICODE
from adapt_train import measure, search_texts, shards
from experiment import Lab

from trinity.dam.config import read_config
from trinity.dam.model import PARTS as LEARNED
from trinity.dam.run import adaptive_merge
from trinity.merging.load_model import load_model
from trinity.merging.memory_merge import MemoryMerge
from trinity.merging.open_source import open_source
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe
from trinity.merging.search.run_search import Search
from trinity.merging.search.search_file import PARTS, merge_back, read_search

Record = dict[str, Any]

HALF = {"weight": 0.5}
RECIPES: dict[str, Callable[[str, str, str], Record]] = {
    "soup": lambda base, manual, unicode: _recipe("linear", None, [manual, unicode], {"weight": 1.0}),
    "soup_base": lambda base, manual, unicode: _recipe("linear", None, [manual, unicode, base], {"weight": 1.0}),
    "slerp": lambda base, manual, unicode: _recipe("slerp", manual, [unicode], {}, {"t": 0.5}),
    "task_arithmetic": lambda base, manual, unicode: _recipe(
        "task_arithmetic", base, [manual, unicode], {"weight": 1.0}
    ),
    "ties": lambda base, manual, unicode: _recipe("ties", base, [manual, unicode], {"weight": 1.0, "density": 0.5}),
    "dare_ties": lambda base, manual, unicode: _recipe(
        "dare_ties", base, [manual, unicode], HALF | {"density": 0.5}, {"rescale": "density"}
    ),
}
"""Merges of the domains' models without data: name → recipe of (base, manual, unicode)."""


def _recipe(method: str, base: str | None, models: list[str], each: Record, whole: Record | None = None) -> Record:
    return {
        "merge_method": method,
        **({} if base is None else {"base_model": base}),
        "models": [{"model": model, "parameters": dict(each)} for model in models],
        "parameters": whole or {},
        "out_dtype": "float32",
    }


def merged(lab: Lab, content: Record) -> Record:
    """Merge in memory and measure."""
    plan = make_plan(read_recipe(content))
    memory = MemoryMerge(plan)
    memory.merge(plan.jobs)
    return {"losses": measure(memory.model, lab)}


def without_data(lab: Lab, name: str) -> Record:
    """A merge of the domains' models by one of RECIPES; random masks are drawn by the seed."""
    return merged(lab, RECIPES[name](lab.path("base"), *map(lab.path, DOMAINS)) | {"seed": lab.seed})


def back_mean(lab: Lab, continued: str) -> Record:
    """The mean of the base and a continued model."""
    return merged(lab, _recipe("linear", None, [lab.path("base"), lab.path(continued)], HALF))


def back_ties(lab: Lab, continued: str) -> Record:
    """TIES of a continued model with its base: the larger half of its changes."""
    return merged(lab, _recipe("ties", lab.path("base"), [lab.path(continued)], {"weight": 1.0, "density": 0.5}))


def back_search(lab: Lab, domain: str, continued: str, by_part: bool) -> Record:
    """base + α·(continued − base), with α searched on text of the domain and general text."""
    size = lab.size
    trials = size.part_trials if by_part else size.line_trials
    texts = search_texts(lab, (domain, GENERAL))
    content = merge_back(lab.path("base"), lab.path(continued), texts, {}, by_part=by_part, trials=trials)
    return searched(lab, content)


def cma_es(lab: Lab) -> Record:
    """Task arithmetic of both domains' models, with a weight for each model and part, by CMA-ES on all search texts."""
    content = RECIPES["task_arithmetic"](lab.path("base"), *map(lab.path, DOMAINS))
    for model in content["models"]:
        model["parameters"] = dict(HALF)
    content["search"] = {
        "vary": [{"parameter": "weight", "between": [0.0, 1.0], "parts": list(PARTS)}],
        "objectives": [{"name": name, "text": text} for name, text in search_texts(lab, NAMES).items()],
        "budget": {"trials": lab.size.trials},
    }
    return searched(lab, content)


def searched(lab: Lab, content: Record) -> Record:
    """Minimise the sum of the losses per byte; returns the best merge's losses and values, and the trials."""
    folder = Path(lab.path("search"))
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call, whose seconds are lost
    search = content["search"]
    for objective in search["objectives"]:
        objective["metric"] = "bits_per_byte"
    search |= {"seed": lab.seed, "evaluation": {"window": lab.size.row, "rows": lab.size.search_rows}}
    found = Search(read_search(content | {"out_dtype": "float32"}), folder).run()
    values = {
        variable.name.replace(f"{lab.folder}/", ""): value
        for variable, value in zip(found.variables, found.best.values)
    }
    record = {"losses": measure_folder(lab, folder / "model"), "trials": len(found.trials), "values": values}
    shutil.rmtree(folder)
    return record


def dam(lab: Lab, with_base: bool) -> Record:
    """Learn the coefficients of the domains' models, and of the base, on text that they were trained on."""
    size, folder = lab.size, Path(lab.path("dam"))
    for left in (folder, folder.with_name(f".{folder.name}.dam")):
        shutil.rmtree(left, ignore_errors=True)
    sources = {MANUAL: MANUAL, UNICODE: UNICODE} | ({GENERAL: "base"} if with_base else {})
    models = [{"model": lab.path(name), "text": shards(lab, text, TRAIN)} for text, name in sources.items()]
    config = read_config({
        "models": models, "learn": list(LEARNED), "rows": size.dam_rows, "window": size.row,
        "sequences": size.dam_sequences, "microbatch": size.dam_sequences, "seed": lab.seed, "threads": 1,
        "save_every": size.dam_rows, "out_dtype": "float32",
    })  # fmt: skip
    if adaptive_merge(config, folder):
        raise KeyboardInterrupt
    record = {"losses": measure_folder(lab, folder), "trials": config.steps}
    shutil.rmtree(folder)
    return record


def measure_folder(lab: Lab, folder: Path) -> dict[str, float]:
    """The test losses of a folder."""
    return measure(load_model(open_source(str(folder))), lab)
