"""Measure whether training on longer rows, which only the global layers can use, extends the context of a small model.

python tools/experiments/context_extension.py --out runs/context_extension
python tools/experiments/context_extension.py --quick --out runs/context_extension-quick
python tools/experiments/context_extension.py --draw tools/experiments/results/context_extension.json

The report's claim: the sliding window and RoPE of the local layers stay, the global layers have no position embedding
(NoPE), and a short phase of long rows extends the context. Large was extended at 256k tokens and finds 97.6 % of the
needles at 512k. Here a model learns to find needles in rows of 128 tokens and is extended at 512.

The design, fixed before the first run:
- Task (see context_task.py): 6 pairs of a key and a value at random places in noise, then 24 questions, each a key and
  its value; the loss is on the answers alone. 32 keys, 16 values, 78 noise tokens.
- Model: Trinity, dense, d 128, 4 layers, 4 heads of 32, window 32, layers 1 and 3 global. Muon and AdamW. The learning
  rate is constant after 20 steps of warm-up, at 0.15 times that of configs/smoke.yaml.
- `base`: 900 steps of 32 rows of 128 tokens. A seed determines its weights and rows.
- `extended`: from base, with its optimizer state: 120 steps of 8 rows of 512 tokens, at 0.3 of the rate.
- `control`: from base, with its optimizer state: 120 steps of 32 rows of 128 tokens, at 0.3 of the rate: the same
  number of tokens at the old length.
- Measured after each arm, at 128 to 4096 tokens with 4 and with 20 pairs: one question at the row's end, in 128 rows;
  the asked pair's rank among the pairs is spread evenly. Score: share of rows in which the answer has the largest
  logit; 1/16 by chance, 1/4 for any value of the row with 4 pairs. And the answer's mean loss in nats, chance ln 16.
  (4096 was added after the first arm of the first seed, which still scored 0.91 at 2048.)
- Added after the results were known: the claim holds here if at 1024 tokens with 20 pairs the score of `extended` is
  0.95 or more, and above those of `base` and `control` (medians over seeds).

Differences from the report that may matter: one synthetic task, no language; 120 steps are 13 % of the base's tokens,
more than a real extension has; the rate is constant.

Finished arms are kept in --out, and base's checkpoint: after an interruption the same command continues with the next
arm. An arm that was interrupted begins anew.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiment import DAMAGED, PACKAGES, command_line, package_versions, run_command

from trinity.errors import UserError, run_main
from trinity.io.json_files import read_json, to_json, write_json

NAME = "context_extension"


def main() -> int | None:
    """Train the missing arms and write the results; print their table, and plot them beside the results' file."""
    assert __doc__ is not None
    arguments = command_line(NAME, __doc__).parse_args()
    return run_command(NAME, arguments, lambda: make_results(arguments), show)


def show(path: Path) -> None:
    """Print the table of a results file, and plot it beside the file.

    Raises:
        UserError: it does not exist, or is not one of this experiment.
    """
    from context_report import draw, table

    results = read_json(path, f"give the {NAME}.json of a finished experiment's --out")
    if results is None:
        raise UserError(f"{path} does not exist; give the JSON file of a finished experiment")
    if "asked_pairs" not in results.get("settings", {}):
        raise UserError(f"{path} is not a results file of the experiment {NAME}; give the {NAME}.json of its --out")
    print(table(results))
    draw(path.with_suffix(".svg"), results)


def make_results(arguments: argparse.Namespace) -> None:
    """Train and measure all arms, except those finished by an earlier call, and write OUT/context_extension.json.

    It holds "versions", "settings", and "runs": a list of {"arm", "seed", "loss", "scores"}, by seed.

    Raises:
        UserError: --out has results of other settings.
    """
    from context_arms import ARMS, FULL, QUICK, steps_of, train_arm

    from trinity.terminal import Progress

    out, seeds = arguments.out, arguments.seeds
    size = QUICK if arguments.quick else FULL
    settings = json.loads(to_json(size._asdict()))
    runs: list[dict[str, Any]] = []
    with Progress("training", seeds * sum(steps_of(size).values()), "step") as bar:
        for seed in range(seeds):
            for arm in ARMS:
                path = out / "runs" / f"{arm}-{seed}.json"
                run = read_json(path, DAMAGED)
                if run is None:
                    run = {"settings": settings} | train_arm(arm, seed, size, out / "checkpoints", bar.update)
                    path.parent.mkdir(exist_ok=True)
                    write_json(path, run, indent=None)
                elif run.get("settings") != settings:
                    raise UserError(f"{path} is a run of other settings; give another --out, or remove {path.parent}")
                else:
                    bar.skip_to(bar.n + steps_of(size)[arm])
                runs.append({"arm": arm, "seed": seed, "loss": run["loss"], "scores": run["scores"]})
    versions = package_versions(PACKAGES)
    write_json(out / f"{NAME}.json", {"versions": versions, "settings": settings, "runs": runs})


if __name__ == "__main__":
    run_main(main)
