"""What the Random Sequential Document Buffer does to the loss, BatchHet and the gradient norm of a small model.

python tools/experiments/rsdb.py --out runs/rsdb
python tools/experiments/rsdb.py --quick --out runs/rsdb-quick

The report's claim: documents that are read one after the other make a batch uneven, because neighbouring rows, and so
whole microbatches, come from the same few documents. RSDB cut BatchHet by 46 % in a small experiment, with a kurtosis
of the gradient norm of 14.6 against 187; in the run of Large BatchHet was 4.23 times, and the variance of the loss from
step to step 2.4 times lower.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (see domains.py), cut into documents of log-normal length with a median
  of about 500 tokens and σ = 1.2; a row has 128 tokens. Half of the tokens lie in documents of 15 rows or more.
- A step has 16 rows in 4 microbatches of 4. In the report each of a GPU's 4 workers reads its own documents, and with
  torch's DataLoader one worker makes a whole batch: so 4 streams stand for 4 workers, and a microbatch is 4 rows of
  one stream. Where a document is long, a stream stays with it for some steps.
- RSDB has the same 4 streams, the same documents in the same order, and buffers of 64 to 128 documents each.
- A third arm reads one document after the other in 48 streams, this project's default: 16 streams make a step, and a
  microbatch is 4 rows of 4 streams. It shows what many streams do by themselves.
- The model, its first weights, the recipe and the number of tokens are equal; a seed decides the first weights and the
  order of documents. The rate is constant after 20 steps. 600 steps read two fifths of the text: nothing is repeated.
- BatchHet (eq. 40): the largest loss of a step's 4 microbatches minus their mean.
- Measured over the last half of the steps: the mean of BatchHet; the variance of the loss about its trend, a parabola;
  half of the variance of its differences from step to step; the kurtosis (fourth standardised moment) of the gradient
  norm before clipping. At the end: the loss on modules that were held out of every domain.

What differs from the report and can matter: a step has 4 microbatches where Large has thousands, so the mean over a
batch smooths less; 300 steps cannot show a kurtosis above 300; the model has 1.4 million parameters.

A run that is finished is kept in --out: the same command goes on with the next one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.json_files import number, read_json

STEPS, QUICK_STEPS = 600, 8
STOPPED = 130
PLACES = ("data.train", "data.validation", "data.tokenizer")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (%(default)s)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run ({STEPS}; with --quick {QUICK_STEPS})")
    parser.add_argument("--out", type=local_path, default=Path("runs/rsdb"), help="folder for all of it (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a toy: to see that it works")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = QUICK_STEPS if arguments.quick else STEPS
    return arguments


def main() -> int | None:
    """Make the corpus, train what is not trained yet, write rsdb.json and rsdb.svg, print the table."""
    arguments = parse()
    from rsdb_report import FEWEST_STEPS, draw, table, write_results

    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    if arguments.steps < FEWEST_STEPS:
        raise UserError(f"--steps {arguments.steps} is too few to measure anything; use {FEWEST_STEPS} or more")
    try:
        about, runs = experiment(arguments.out, arguments.seeds, arguments.steps, arguments.quick)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return STOPPED
    write_results(arguments.out / "rsdb.json", about, runs)
    print(table(runs))
    draw(arguments.out / "rsdb.svg", runs)
    return None


def experiment(out: Path, seeds: int, steps: int, quick: bool) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """All runs, those of an earlier call included; returns what they are about, and arm → runs by seed.

    Raises:
        UserError: `out` holds something of other settings, or another process writes there.
    """
    from domains import describe, make_corpus
    from rsdb_arms import ARMS, QUICK, SETTINGS, arm_config

    from trinity.io.local import file_lock

    out.mkdir(parents=True, exist_ok=True)
    words = QUICK if quick else []
    try:
        with file_lock(out, patience=1):
            vocabulary = 512 if quick else SETTINGS["model"]["vocab_size"]
            corpus = make_corpus(out / f"corpus-{vocabulary}", vocabulary, every=24 if quick else 1)
            keys = [(arm, seed) for seed in range(seeds) for arm in ARMS]
            configs = {key: arm_config(ARMS[key[0]], corpus, key[1], steps, words) for key in keys}
            found = train_all(out / "runs", configs)
    except BlockingIOError:
        raise UserError(f"--out {out} is being written by another process; wait for it, or end it") from None
    row = next(iter(configs.values())).data.sequence_length
    about = {"steps": steps, "seeds": seeds, "settings": SETTINGS, "quick": words, "corpus": describe(corpus, row)}
    return about, {arm: [found[arm, seed] for seed in range(seeds)] for arm in ARMS}


def train_all(folder: Path, configs: dict[tuple[str, int], Any]) -> dict[tuple[str, int], dict]:
    """Train each (arm, seed) of which the folder has no result; returns all results.

    Raises:
        UserError: a result there is one of other settings.
    """
    from rsdb_arms import train_arm

    from trinity.io.json_files import write_json
    from trinity.terminal import Progress

    folder.mkdir(exist_ok=True)
    places = {(arm, seed): folder / f"{arm}-{seed}.json" for arm, seed in configs}
    found = {key: _with_numbers(read_json(place)) for key, place in places.items()}
    for key, run in found.items():
        if run is not None and run["settings"] != settings_of(configs[key]):
            raise UserError(f"{places[key]} is a run of other settings; give another --out, or remove {folder}")
    total = sum(config.run.steps for config in configs.values())
    done = sum(configs[key].run.steps for key, run in found.items() if run)
    with Progress("training", total, "step") as bar:
        bar.skip_to(done)
        for key, config in configs.items():
            if found[key] is None:
                found[key] = {"settings": settings_of(config)} | train_arm(config, bar.update)
                write_json(places[key], found[key], indent=None)
    return found


def _with_numbers(run: dict | None) -> dict | None:
    """A result as it was before it went into JSON: NaN where a number was not finite."""
    if run is None:
        return None
    curves = {name: [number(value) for value in values] for name, values in run["curves"].items()}
    return run | {"curves": curves, "validation": {name: number(value) for name, value in run["validation"].items()}}


def settings_of(config: Any) -> dict[str, Any]:
    """What a run is a function of, as JSON gives it back: every setting but where files lie."""
    from trinity.config.load import flatten
    from trinity.io.json_files import to_json

    values = {key: value for key, value in flatten(config).items() if key not in PLACES}
    return json.loads(to_json(values))


if __name__ == "__main__":
    run_main(main)
