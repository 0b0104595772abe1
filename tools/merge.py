"""Merge models into a Hugging Face folder: averages, task vectors, TIES, DARE and more, as a recipe says.

A recipe is mergekit's YAML and more; recipes/ has commented examples, docs/merge.md a walk from two checkpoints to a
merged one. Models are Hugging Face folders, run directories (the newest checkpoint) or RUN_DIR@step. A merge that was
interrupted continues when the same command is given again.

Example: python tools/merge.py recipes/ties.yaml out/merged --dry-run
         python tools/merge.py recipes/ties.yaml out/merged --workers 4
"""

import argparse
from pathlib import Path

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import run_main
from trinity.interop.output_folder import SHARD_BYTES, check_replaceable
from trinity.merging.experts import unrelated_models
from trinity.merging.merge_models import merge
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe


def main() -> None:
    """Merge, or say what a merge would do."""
    options = parse()
    recipe = read_recipe(options.recipe)
    if options.dry_run:
        check_replaceable(Path(options.out_dir).resolve(), options.overwrite)
        plan = make_plan(recipe)
        print("\n".join([plan.summary(options.workers), *(f"note:     {note}" for note in unrelated_models(plan))]))
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


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("recipe", type=local_path, metavar="RECIPE.yaml", help="what to merge, and how")
    parser.add_argument("out_dir", type=local_path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and print plan, bytes and memory")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads; the result does not depend on it")
    parser.add_argument(
        "--shard-bytes",
        type=lambda text: int(float(text)),
        default=SHARD_BYTES,
        metavar="N",
        help="most bytes of a file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge or export in OUT_DIR")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
