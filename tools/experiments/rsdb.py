"""Measure the effect of the Random Sequential Document Buffer (RSDB) on loss, BatchHet and gradient norm.

python tools/experiments/rsdb.py --out runs/rsdb
python tools/experiments/rsdb.py --quick --out runs/rsdb-quick
python tools/experiments/rsdb.py --draw tools/experiments/results/rsdb.json

The report's claim: sequential reading of documents makes batches heterogeneous, because neighbouring rows, and so whole
microbatches, come from the same few documents. RSDB reduced BatchHet by 46 % in a small experiment, with a gradient
norm kurtosis of 14.6 against 187. In the run of Large, BatchHet was 4.23 times lower, and the variance of the loss from
step to step 2.4 times lower.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (see domains.py), split into documents of log-normal length with a
  median of about 500 tokens and σ = 1.2; a row has 128 tokens. Half of the tokens are in documents of 15 rows or more.
- A step has 16 rows in 4 microbatches of 4. In the report each of a GPU's 4 workers reads its own documents, and with
  torch's DataLoader one worker makes a whole batch. Here 4 streams represent 4 workers, and a microbatch is 4 rows of
  one stream. A stream reads from a long document for several steps.
- Arm `rsdb`: the same 4 streams, the same documents in the same order, and buffers of 64 to 128 documents each.
- Arm `sequential_48`: sequential reading in 48 streams, this project's default: a step takes rows from 16 streams, and
  a microbatch is 4 rows of 4 streams. It shows the effect of many streams alone.
- Model, initial weights, recipe and number of tokens are equal; the seed determines the initial weights and the order
  of documents. The learning rate is constant after 20 steps. 600 steps read two fifths of the text, without repetition.
- BatchHet (eq. 40): the largest loss of a step's 4 microbatches minus their mean.
- Measured over the last half of the steps: the mean of BatchHet; the variance of the loss about its trend, a parabola;
  half the variance of its differences from step to step; the kurtosis (fourth standardised moment) of the gradient norm
  before clipping. At the end: the loss on modules that are held out of every domain.
- Added after the results were known: the claim holds here if BatchHet, the variance from step to step and the kurtosis
  are all below 0.9 of those of sequential packing, in part if some are.

Differences from the report that may matter: a step has 4 microbatches where Large has thousands, so the mean over a
batch smooths less; 300 steps cannot show a kurtosis above 300; the model has 1.4 million parameters.

Finished runs are kept in --out: after an interruption the same command continues with the next run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiment import DAMAGED, PACKAGES, command_line, package_versions, run_command

from trinity.errors import UserError, run_main
from trinity.io.json_files import number, read_json

NAME = "rsdb"
STEPS, QUICK_STEPS = 600, 8
PATH_KEYS = ("data.train", "data.validation", "data.tokenizer")


def main() -> int | None:
    """Make the corpus, train the missing runs, write rsdb.json and rsdb.svg, print the table."""
    assert __doc__ is not None
    parser = command_line(NAME, __doc__)
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run ({STEPS}; with --quick {QUICK_STEPS})")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = QUICK_STEPS if arguments.quick else STEPS
    from rsdb_report import FEWEST_STEPS

    if arguments.steps < FEWEST_STEPS:
        raise UserError(f"--steps {arguments.steps} is too few to measure anything; use {FEWEST_STEPS} or more")
    return run_command(NAME, arguments, lambda: make_results(arguments), show)


def show(path: Path) -> None:
    """Print the table of a results file, and plot it beside the file.

    Raises:
        UserError: it does not exist, or is not one of this experiment.
    """
    from rsdb_report import draw, runs_by_arm, table

    results = read_json(path, f"give the {NAME}.json of a finished experiment's --out")
    if results is None:
        raise UserError(f"{path} does not exist; give the JSON file of a finished experiment")
    if "corpus" not in results or "runs" not in results:
        raise UserError(f"{path} is not a results file of the experiment {NAME}; give the {NAME}.json of its --out")
    runs = runs_by_arm(results)
    print(table(runs))
    draw(path.with_suffix(".svg"), runs)


def make_results(arguments: argparse.Namespace) -> None:
    """Train all runs, except those finished by an earlier call, and write OUT/rsdb.json.

    Raises:
        UserError: --out has results of other settings.
    """
    from domains import describe, make_corpus
    from rsdb_arms import ARMS, QUICK, SETTINGS, arm_config
    from rsdb_report import write_results

    out, seeds, steps, quick = arguments.out, arguments.seeds, arguments.steps, arguments.quick
    words = QUICK if quick else []
    vocabulary = 512 if quick else SETTINGS["model"]["vocab_size"]
    corpus = make_corpus(out / f"corpus-{vocabulary}", vocabulary, every=24 if quick else 1)
    keys = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    configs = {key: arm_config(ARMS[key[0]], corpus, key[1], steps, words) for key in keys}
    results = train_all(out / "runs", configs)
    row = next(iter(configs.values())).data.sequence_length
    about = {
        "versions": package_versions(PACKAGES), "steps": steps, "seeds": seeds, "settings": SETTINGS, "quick": words,
        "corpus": describe(corpus, row),
    }  # fmt: skip
    write_results(out / f"{NAME}.json", about, {arm: [results[arm, seed] for seed in range(seeds)] for arm in ARMS})


def train_all(folder: Path, configs: dict[tuple[str, int], Any]) -> dict[tuple[str, int], dict]:
    """Train each (arm, seed) without a result in the folder; returns all results.

    Raises:
        UserError: a result in the folder has other settings.
    """
    from rsdb_arms import train_arm

    from trinity.io.json_files import write_json
    from trinity.terminal import Progress

    folder.mkdir(exist_ok=True)
    paths = {(arm, seed): folder / f"{arm}-{seed}.json" for arm, seed in configs}
    results: dict[tuple[str, int], dict] = {}
    for key, path in paths.items():
        run = read_json(path, DAMAGED)
        if run is None:
            continue
        if run.get("settings") != settings_of(configs[key]):
            raise UserError(f"{path} is a run of other settings; give another --out, or remove {folder}")
        results[key] = _restore_nan(run)
    total = sum(config.run.steps for config in configs.values())
    with Progress("training", total, "step") as bar:
        bar.skip_to(sum(configs[key].run.steps for key in results))
        for key, config in configs.items():
            if key not in results:
                results[key] = {"settings": settings_of(config)} | train_arm(config, bar.update)
                write_json(paths[key], results[key], indent=None)
    return results


def _restore_nan(run: dict) -> dict:
    """A result read from JSON, with NaN in place of null."""
    curves = {name: [number(value) for value in values] for name, values in run["curves"].items()}
    return run | {"curves": curves, "validation": {name: number(value) for name, value in run["validation"].items()}}


def settings_of(config: Any) -> dict[str, Any]:
    """All settings that determine a run's result, as JSON values: every setting except paths."""
    from trinity.config.load import flatten
    from trinity.io.json_files import to_json

    values = {key: value for key, value in flatten(config).items() if key not in PATH_KEYS}
    return json.loads(to_json(values))


if __name__ == "__main__":
    run_main(main)
