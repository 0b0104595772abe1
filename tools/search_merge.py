"""Search the parameters of a merge: merge in memory, evaluate, and try better values, until the budget is spent.

SEARCH.yaml is a merge recipe with one more key, `search`: what varies (weights, density, lambda, t, by parts of the
model and blocks of layers), the objectives (losses on texts, tasks of lm-eval) and the budget; recipes/search/ has a
commented example. OUT_DIR gets history, page, best recipe and best model. An interrupted search continues with the same
trials when the same command is given again, and a finished one with a larger budget.

--merge-back BASE CONTINUED searches how much of a continued training to keep: base + α (continued - base) with the α
that minimises the losses on texts of the old and the new domain.

Example: python tools/search_merge.py recipes/search/two_domains.yaml out/search --dry-run
         python tools/search_merge.py recipes/search/two_domains.yaml out/search
         python tools/search_merge.py --merge-back out/base runs/continued out/back --validation old=a.jsonl new=b.jsonl
"""

import argparse
import math
from pathlib import Path
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split

from trinity.command_line import HelpFormatter, check_device, check_one_process, local_path
from trinity.errors import UserError, run_main
from trinity.io.local import write_atomically
from trinity.merging.search.result import BEST, FRONT, MODEL, Found
from trinity.merging.search.run_search import Search
from trinity.merging.search.search_file import SearchFile, merge_back, read_search
from trinity.reporting.after_merge import named_texts
from trinity.reporting.page import plotly_script

PAGE = "report.html"
TRIALS = 24
"""Default trials of a merge back with one α: the line search converges in about 20. Not from the report."""
TRIALS_BY_PART = 80
"""The same with four α: ten generations of CMA-ES."""
_EVALUATION = ("window", "rows", "batch_tokens", "document_mask")


def main() -> None:
    """Search, or say what the search would do."""
    options = parse()
    check_one_process("tools/search_merge.py")
    file, folder = search_file(options)
    check_device(options.device)
    plotly_script()
    search = Search(file, folder, device=options.device, workers=options.workers)
    if options.dry_run:
        print(search.summary())
        return
    found = search.run(progress=True)
    from trinity.reporting.search_report import search_page  # imports plotly, which may be missing

    write_atomically(folder / PAGE, search_page(found, folder))
    print(result(found, folder))


def search_file(options: argparse.Namespace) -> tuple[SearchFile, Path]:
    """The search and its folder."""
    if options.merge_back is None:
        names = ("validation", "weights", "by_part", "trials", *_EVALUATION)
        extra = [name for name in names if given(options, name)]
        if extra:
            raise UserError(f"--{extra[0].replace('_', '-')} is for --merge-back; write it into the search file")
        if len(options.paths) != 2:
            raise UserError("give SEARCH.yaml OUT_DIR, or --merge-back BASE CONTINUED OUT_DIR")
        return read_search(options.paths[0]), options.paths[1]
    *before, out = options.merge_back
    if options.paths:
        raise UserError(f"--merge-back BASE CONTINUED OUT_DIR takes no search file; leave out {options.paths[0]}")
    if not options.validation:
        raise UserError("--merge-back needs texts of the old and the new domain; give --validation old=TEXT new=TEXT")
    if before[0] == before[1]:
        raise UserError(f"--merge-back names {before[0]} twice; give the model before the training, and after it")
    for name in ("trials", "window", "rows", "batch_tokens"):
        if given(options, name) and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    trials = options.trials if options.trials is not None else TRIALS_BY_PART if options.by_part else TRIALS
    evaluation: dict[str, Any] = {name: getattr(options, name) for name in _EVALUATION if given(options, name)}
    content = merge_back(
        *before,
        named_texts("--validation", options.validation),
        {name: _weight(name, text) for name, text in named_texts("--weights", options.weights).items()},
        by_part=options.by_part,
        trials=trials,
        evaluation=evaluation,
    )
    return read_search(content), local_path(out)


def given(options: argparse.Namespace, name: str) -> bool:
    """Whether an option was given."""
    value = getattr(options, name)
    return value is not None and value is not False and value != []


def result(found: Found, folder: Path) -> str:
    """The outcome for people: a row for each model and the best merge, then where things are."""
    columns = [each.name for each in found.objectives]
    rows = [("", *columns)]
    named = {**found.models, "start (trial 0)": found.trials[0].objectives}
    named[f"best (trial {found.best.number})"] = found.best.objectives
    for label, values in named.items():
        rows.append((label, *(f"{values[name]:.6g}" if name in values else "-" for name in columns)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{v.name} = {value:g}" for v, value in zip(found.variables, found.best.values)]
    if len(found.counted) > 1:
        lines.append(f"trials on the Pareto front: {len(found.front)}, with their recipes in {folder / FRONT}")
    return "\n".join([
        *lines,
        *better_model(found),
        f"{len(found.trials)} trials in {found.seconds:.0f} s, {found.new} of them now: {found.stopped}",
        f"the best recipe is {folder / BEST}, the page {folder / PAGE}",
        f"the merged model is in {folder / MODEL}",
    ])  # fmt: skip


def better_model(found: Found) -> list[str]:
    """A line where a model alone has a lower cost than the best merge, by more than the rounding of its weights."""
    costs = {
        label: math.fsum(each.weight * each.cost(values[each.name]) for each in found.counted)
        for label, values in found.models.items()
        if all(math.isfinite(values.get(each.name, math.nan)) for each in found.counted)
    }
    label = min(costs, key=costs.__getitem__, default=None)
    if label is None or costs[label] >= found.best.cost - 1e-3 * abs(found.best.cost):
        return []
    return [
        f"note: {label} alone has a lower cost ({costs[label]:.5g}) than the best merge ({found.best.cost:.5g}); a "
        "larger budget may find a better one"
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument(
        "paths", type=local_path, nargs="*", metavar="SEARCH.yaml OUT_DIR", help="what to search; folder to make"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, and print variables and memory")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="threads that merge; no result depends on it"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for forward passes")
    group = parser.add_argument_group("merge back")
    group.add_argument(
        "--merge-back",
        nargs=3,
        metavar=("BASE", "CONTINUED", "OUT_DIR"),
        help="search between a model and its continued training; the search file is kept in OUT_DIR",
    )
    group.add_argument(
        "--validation", nargs="+", default=[], metavar="NAME=TEXT", help="texts or token shards whose losses count"
    )
    group.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=W", help="weight of each loss in the sum (by default 1)"
    )
    group.add_argument(
        "--by-part", action="store_true", help="an α for each of attention, experts, router and rest, by CMA-ES"
    )
    group.add_argument("--trials", type=int, help=f"most trials (by default {TRIALS}, or {TRIALS_BY_PART} --by-part)")
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens of a packed row (default: 2048, or the model's number of positions if that is smaller)",
    )
    group.add_argument("--rows", type=int, help="most rows of a text (by default all)")
    group.add_argument("--document-mask", action="store_true", help="no attention between documents of a row")
    group.add_argument("--batch-tokens", type=int, help="most tokens in a forward pass (by default 8192)")
    return parser.parse_args()


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"--weights {name}={text} is no number; write --weights {name}=1") from None
    if not 0 <= weight < math.inf:
        raise UserError(f"--weights {name}={text} must be at least 0; write --weights {name}=1")
    return weight


if __name__ == "__main__":
    run_main(main)
