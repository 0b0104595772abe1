"""Merge models by coefficients that are learned on text (DAM, arXiv 2410.08371), one for each input feature.

DAM.yaml lists the models and a text for each; recipes/dam/dam.yaml is a commented example. The merged model learns to
give on each text the logits of the text's own model. OUT_DIR becomes a Hugging Face folder with the coefficients beside
the weights. A run that was interrupted continues when the same command is given again. Under torchrun the models are
sharded over all processes (parallel: in DAM.yaml).

Example: python tools/dam.py recipes/dam/dam.yaml out/dam --dry-run
         python tools/dam.py recipes/dam/dam.yaml out/dam
         torchrun --standalone --nproc-per-node 8 tools/dam.py recipes/dam/dam.yaml out/dam
"""

import argparse

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split

from trinity.command_line import HelpFormatter, local_path
from trinity.dam.config import read_config
from trinity.dam.run import adaptive_merge, prepare
from trinity.errors import run_main


def main() -> int:
    """Learn and merge, or check alone."""
    options = parse()
    config = read_config(options.config)
    if options.dry_run:
        prepared = prepare(config, options.out_dir, options.overwrite)
        texts = ", ".join(str(config.models[number].text) for number in config.texts)
        print(
            f"{prepared.plan.summary(1)}\ntexts:    {texts}\nsteps:    {config.steps} of {config.sequences} rows a text"
        )
        return 0
    return adaptive_merge(config, options.out_dir, options.overwrite, progress=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    summary, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("config", type=local_path, metavar="DAM.yaml", help="models, texts and settings")
    parser.add_argument("out_dir", type=local_path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--dry-run", action="store_true", help="check models and texts, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge or export in OUT_DIR")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
