"""The parts of the comparison of adaptations, each kept in a file of its own."""

import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import adapt_merge
import adapt_train
import torch
from adapt_texts import DOMAINS, Texts, describe
from adapt_train import SCORES, SHARES, Lab, Size

from trinity.errors import UserError
from trinity.io.json_files import read_json, to_json, write_json
from trinity.terminal import Progress

Record = dict[str, Any]
Make = Callable[[Lab, dict[str, Record]], Record]
"""Makes a part; takes the records of the parts before it."""
PACKAGES = ("torch", "numpy", "tokenizers", "cma")


def _parts() -> Iterator[tuple[str, Make]]:
    yield "base", _of(adapt_train.base)
    yield "modules", _of(adapt_train.score_modules)
    yield "step_times", lambda lab, done: adapt_train.step_times(lab, done["modules"]["chosen"])
    for domain in DOMAINS:
        for name in (f"{domain}_no_replay", domain):  # without and with replay
            yield name, _of(adapt_train.continued, domain, name == domain, [], name)
        for how in SCORES:
            for share in SHARES:
                yield f"{domain}_{how}{share}", _of_modules(domain, f"{how}{share}")
        for name in (f"{domain}_no_replay", domain):
            yield f"{name}_back_mean", _of(adapt_merge.back_mean, name)
            yield f"{name}_back_ties", _of(adapt_merge.back_ties, name)
            yield f"{name}_back_alpha", _of(adapt_merge.back_search, domain, name, False)
            yield f"{name}_back_parts", _of(adapt_merge.back_search, domain, name, True)
    for name in adapt_merge.RECIPES:
        yield f"merge_{name}", _of(adapt_merge.without_data, name)
    yield "merge_cma_es", _of(adapt_merge.cma_es)
    yield "merge_dam", _of(adapt_merge.dam, False)
    yield "merge_dam_base", _of(adapt_merge.dam, True)


def _of(function: Callable[..., Record], *words: Any) -> Make:
    return lambda lab, done: function(lab, *words)


def _of_modules(domain: str, chosen: str) -> Make:
    return lambda lab, done: adapt_train.continued(lab, domain, True, done["modules"]["chosen"][chosen])


PARTS: dict[str, Make] = dict(_parts())
"""In the order in which they are made."""


def make_seed(lab: Lab, folder: Path, settings: Record, bar: Progress) -> list[Record]:
    """The records of all parts of a seed: those in the folder, and the missing ones, which are made.

    Raises:
        UserError: a record in the folder has other settings.
    """
    torch.set_num_threads(1)  # of merges, too: the number of threads changes the bits of sums
    folder.mkdir(exist_ok=True)
    lab.folder.mkdir(exist_ok=True)
    done: dict[str, Record] = {}
    for name, make in PARTS.items():
        path = folder / f"{lab.seed}-{name}.json"
        kept = read_json(path)
        if kept is None:
            bar.describe(f"seed {lab.seed}, {name}")
            began = time.process_time()
            record = make(lab, done)
            record = {"seed": lab.seed, "part": name, "seconds": time.process_time() - began} | record
            write_json(path, {"settings": settings, "record": record}, indent=None)
            done[name] = json.loads(to_json(record))
            bar.update()
        elif kept.get("settings") != settings:
            raise UserError(
                f"{path} has other settings, or was made by other versions of Python or packages; give another "
                f"--out, or remove {folder.parent}"
            )
        else:
            done[name] = kept["record"]
            bar.skip_to(bar.n + 1)
    return list(done.values())


def settings_of(size: Size, texts: Texts) -> Record:
    """What all parts of a results file have in common, as JSON values."""
    return json.loads(to_json({"size": size._asdict(), "versions": versions(), "texts": describe(texts)}))


def versions() -> dict[str, str]:
    """The versions of the packages that results may depend on.

    Raises:
        UserError: one is missing.
    """
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise UserError(f"the experiment needs {error.name}; install it (pip install -e '.[search]')") from None
