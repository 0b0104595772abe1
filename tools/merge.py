"""Merge models into a Hugging Face folder: averages, task vectors, TIES, DARE and more, as a recipe says.

A recipe is mergekit's YAML and more; recipes/ has commented examples, docs/merge.md a walk from two checkpoints to a
merged one. Models are Hugging Face folders, run directories (the newest checkpoint) or RUN_DIR@step. A merge that was
interrupted continues when the same command is given again.

--report makes an HTML page of what differs by layer and part, and with --validation of loss and balance of all models.
--recalibrate moves the expert biases of the merged model until its experts are balanced on a text.

--serve takes no recipe: it serves a page, for this machine alone, on which models, method and parameters are chosen,
checked and merged.

Example: python tools/merge.py recipes/ties.yaml out/merged --dry-run
         python tools/merge.py recipes/ties.yaml out/merged --workers 4
         python tools/merge.py merge.yaml out/merged --report merge.html --validation code=code.jsonl prose=prose.jsonl
         python tools/merge.py merge.yaml out/merged --recalibrate code.jsonl prose.jsonl
         python tools/merge.py --serve
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split

from trinity.command_line import HelpFormatter, check_one_process, local_path
from trinity.errors import UserError, run_main
from trinity.interop.output_folder import SHARD_BYTES, check_replaceable
from trinity.io.local import resolve_path
from trinity.merging.experts import unrelated_models
from trinity.merging.merge_models import Merger, merge
from trinity.merging.plan import Plan, make_plan
from trinity.merging.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from trinity.reporting.after_merge import AfterMerge


def main() -> None:
    """Merge, or say what a merge would do."""
    options = parse()
    check_one_process("tools/merge.py")
    if options.serve:
        serve_page(options)
    if options.recipe is None or options.out_dir is None:
        raise UserError("RECIPE.yaml or OUT_DIR is missing; give both, or --serve alone")
    if options.dry_run:
        print(dry_run(options))
        return
    recipe = read_recipe(options.recipe)
    if measures(options):
        print("\n".join(merge_and_measure(recipe, options)))
        return
    merged = merge(
        recipe,
        options.out_dir,
        workers=options.workers,
        max_shard_bytes=options.shard_bytes,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"the merged model is in {options.out_dir}\n{merged}")


def dry_run(options: argparse.Namespace) -> str:
    """Check everything and write nothing; returns what the merge will do."""
    recipe = read_recipe(options.recipe)
    directory = resolve_path(options.out_dir)
    if options.no_merge:
        from trinity.reporting.after_merge import check_merged

        check_merged(directory, recipe, bool(options.recalibrate))
    else:
        check_replaceable(directory, options.overwrite)
    plan = make_plan(recipe)
    Merger(plan, directory, options.workers, options.shard_bytes)  # checks the other options
    notes = unrelated_models(plan) + (check_measuring(plan, options) if measures(options) else [])
    return "\n".join([plan.summary(options.workers), *(f"note:     {note}" for note in notes)])


def serve_page(options: argparse.Namespace) -> NoReturn:
    """Serve the page until Ctrl-C."""
    from trinity.reporting.merge_server.server import serve

    if options.recipe is not None:
        raise UserError(f"--serve takes no recipe, and {options.recipe} is given; paste the recipe into the page")
    serve(__file__, lambda words: dry_run(parse(words)), options.port)


def measures(options: argparse.Namespace) -> bool:
    """Whether anything but a merge is wanted."""
    wanted = (options.report, options.validation, options.recalibrate, options.recalibrate_routers, options.no_merge)
    return any(wanted)


# the next three import data and models, for which a plain merge does not wait
def after_merge(options: argparse.Namespace) -> "AfterMerge":
    """What follows the merge."""
    from trinity.merging.validation import RowSettings
    from trinity.reporting.after_merge import AfterMerge, named_texts

    return AfterMerge(
        options.report,
        named_texts("--validation", options.validation),
        options.recalibrate,
        options.recalibrate_routers,
        options.balancing,
        RowSettings(options.window, options.rows, options.document_mask, options.batch_tokens, options.device),
    )


def check_measuring(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Check report and recalibration; returns remarks."""
    from trinity.reporting.after_merge import check_after_merge

    return check_after_merge(plan, options.out_dir, after_merge(options))


def merge_and_measure(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    """Merge, recalibrate and report; returns lines for the user."""
    from trinity.reporting.after_merge import merge_and_measure

    return merge_and_measure(
        recipe,
        options.out_dir,
        after_merge(options),
        workers=options.workers,
        max_shard_bytes=options.shard_bytes,
        overwrite=options.overwrite,
        merged=options.no_merge,
        progress=True,
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or other words: then a wrong value raises ArgumentError."""
    summary, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=example, formatter_class=HelpFormatter, exit_on_error=words is None
    )
    parser.add_argument("recipe", type=local_path, nargs="?", metavar="RECIPE.yaml", help="what to merge, and how")
    parser.add_argument("out_dir", type=local_path, nargs="?", metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and print plan, bytes and memory")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads; the result does not depend on it")
    parser.add_argument(
        "--shard-bytes",
        type=whole_number,
        default=SHARD_BYTES,
        metavar="N",
        help="most bytes of a file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge or export in OUT_DIR")
    _add_measuring(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--serve", action="store_true", help="serve a page on 127.0.0.1 to choose, check, merge and see the report"
    )
    group.add_argument("--port", type=int, default=8765, help="of the page; 0 for any free one")
    return parser.parse_args(words)


def whole_number(text: str) -> int:
    """A whole number that may be written as 5e9."""
    try:
        return int(float(text))
    except OverflowError:
        raise ValueError(text) from None


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options of what follows the merge."""
    group = parser.add_argument_group("report and recalibration")
    group.add_argument("--report", type=local_path, metavar="FILE.html", help="page about models and result to write")
    group.add_argument(
        "--validation",
        nargs="+",
        default=[],
        metavar="NAME=TEXT",
        help="--report: evaluate every model on these token shards or text files",
    )
    group.add_argument(
        "--recalibrate",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="move the expert biases until the experts are balanced on these token shards or text files",
    )
    group.add_argument(
        "--recalibrate-routers",
        action="store_true",
        help="also fit the routers: each text is given as MODEL=TEXT, with the model whose scores it shall get",
    )
    group.add_argument(
        "--balancing", choices=("smebu", "sign"), help="rule that moves the biases (by default the run's, or smebu)"
    )
    group.add_argument("--no-merge", action="store_true", help="OUT_DIR was merged by this recipe: only measure it")
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens of a packed row (default: 2048, or the model's number of positions if that is smaller)",
    )
    group.add_argument("--rows", type=int, help="most rows of a text (by default all, and 32 to recalibrate)")
    group.add_argument("--document-mask", action="store_true", help="no attention between documents of a row")
    group.add_argument("--batch-tokens", type=int, default=8192, help="most tokens in a forward pass")
    group.add_argument("--device", default="cpu", help="cpu or cuda, for forward passes")


if __name__ == "__main__":
    run_main(main)
