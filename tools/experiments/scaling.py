"""Fit a scaling law to four sizes of the smoke recipe, predict the loss of a fifth, and train it.

python tools/experiments/scaling.py --out runs/scaling
python tools/experiments/scaling.py --fifth tools/experiments/results/scaling.json --out runs/scaling_fifth
python tools/experiments/scaling.py --quick --out runs/scaling-quick
python tools/experiments/scaling.py --draw tools/experiments/results/scaling.json
python tools/experiments/scaling.py --fifth runs/scaling/scaling.json --draw runs/scaling_fifth/scaling_fifth.json

The claim: with equal tokens per parameter, the loss of one recipe falls with the size as E + A·N^-α (Kaplan et al.,
arXiv 2001.08361; Hoffmann et al., 2203.15556), so small runs predict a larger one. The report gives no law.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (domains.py); rows of 128 tokens, 16 rows a step, packed by RSDB from
  one stream with 32 to 64 open documents, so that no run reads a token twice: with more streams, some end before
  others and begin again.
- Sizes: Trinity of 4 layers, the first dense, the others with 8 experts of which 2 are active. Widths 32, 40, 48 and
  56, then 72; a head has a quarter of the width, a dense layer three times, an expert half of it.
- N: active parameters without embedding and head. Every run reads 15 tokens for each of them.
- The smoke recipe for all, with the same learning rates (Muon's rule, eq. 41, is meant to make them transfer): warm-up
  over 20 steps, linear to 0 over the last 30 %. Nothing is tuned for a size.
- Measured, three seeds: validation loss.
- The fit: E, A and α by least squares on the 12 losses of the first four sizes (α on a grid of 0.01 to 1.5, E not below
  0). The prediction: the law at the fifth size; and a range that a median of three runs should hit nine times of ten:
  2,000 fits to as many draws of three seeds for each size, with replacement, each plus the median of three deviations
  drawn from those of all runs from the mean of their size, times √(3/2), because a mean of three takes part of the
  deviation.
- The fifth size is trained after the prediction is committed. `--fifth FILE` trains it; FILE is the results file with
  the prediction. The claim holds here if the median of its three losses lies in that range.

Differences from the papers that may matter: parameters range over a factor of 5 and not of hundreds, so E and α cannot
be told apart well; the largest run reads three quarters of the text; batch and warm-up are the same for every size.

Finished parts are kept in --out: after an interruption the same command continues with the next part.
"""

from functools import partial
from typing import Any, NamedTuple

from experiment import (
    Done,
    Experiment,
    Lab,
    Part,
    Record,
    command_line,
    describe_corpus,
    read_results,
    run_experiment,
    whole_results,
)
from scaling_report import draw, fifth_outcome, fifth_report, outcome, predict, report

from trinity.command_line import local_path
from trinity.errors import UserError, run_main

ROW, ROWS = 128, 16
NAME, FIFTH = "scaling", "scaling_fifth"


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary, every: of the tokenizer; every `every`-th module of the text is used.
    widths: of the models. tokens: for each active parameter.
    prediction: what the run is compared with; empty in the run of the first four sizes.
    settings: words that change the recipe.
    """

    vocabulary: int = 1024
    every: int = 1
    widths: tuple[int, ...] = (32, 40, 48, 56)
    tokens: float = 15
    prediction: dict[str, Any] = {}
    settings: tuple[str, ...] = ("data.streams=1", "data.rsdb_size=32")


FULL_FIFTH = 72
QUICK_SETTINGS = ("data.streams=1", "data.rsdb_size=4", "evaluation.sequences=1", "optim.schedule.warmup_steps=1")
QUICK = Size(512, 24, widths=(8, 16, 24, 32), tokens=0.2, settings=QUICK_SETTINGS)
QUICK_FIFTH = 40


def parts(size: Size, _seed: int) -> dict[str, Part]:
    """A run of each width."""
    return {f"width_{width}": Part(steps_of(width, size.tokens), partial(train, width=width)) for width in size.widths}


def shape_of(width: int) -> dict[str, int]:
    """The sizes of the model that depend on its width."""
    return {"width": width, "head_dim": width // 4, "dense_width": 3 * width, "expert_width": width // 2}


def active_parameters(width: int) -> int:
    """N: parameters that a token uses, without embedding and head."""
    from small_run import SMOKE_RECIPE

    from trinity.config.model import ModelConfig
    from trinity.models.flops import parameter_counts

    counts = parameter_counts(ModelConfig(**SMOKE_RECIPE["model"] | shape_of(width)))
    return counts["active"] - counts["embedding"] - counts["head"]


def steps_of(width: int, tokens: float) -> int:
    """Optimizer steps of a run."""
    return max(4, round(tokens * active_parameters(width) / (ROW * ROWS)))


def train(lab: Lab, _done: Done, width: int) -> Record:
    """Train a size.

    Returns:
        "width"; "active", N; "parameters", all; "tokens" read; "validation" loss at the end; "loss" and "grad_norm".
    """
    from small_run import rounded, small_config, small_run

    steps = steps_of(width, lab.size.tokens)
    config = small_config(lab.texts, lab.seed, steps, list(lab.size.settings), {"model": shape_of(width)})
    losses, norms = [], []
    with small_run(config) as run:
        for _ in range(steps):
            metrics = run.step().metrics
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
            lab.after_step()
        return {
            "width": width, "active": active_parameters(width), "tokens": steps * ROW * ROWS,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "validation": run.validation_loss(), "loss": rounded(losses), "grad_norm": rounded(norms),
        }  # fmt: skip


def experiment() -> Experiment:
    """The first four sizes."""
    assert __doc__ is not None
    return Experiment(
        name=NAME,
        design=__doc__,
        claim="Small runs predict the loss of a larger one.",
        full=Size(),
        quick=QUICK,
        parts=parts,
        report=report,
        outcome=outcome,
        draw=draw,
    )


def fifth_experiment(results: Record) -> Experiment:
    """The fifth size, compared with what the results of the first four predict, on the same text."""

    def describe(texts: Any) -> Record:
        description = describe_corpus(texts)
        if description != results["settings"]["texts"]:
            raise UserError(
                "the file of --fifth was measured on other text (another Python's standard library, or with --quick "
                "and this without); run the first four sizes here, with or without --quick as here, and give that file"
            )
        return description

    full, quick = (
        size._replace(widths=(width,), prediction=predict(results, active_parameters(width)))
        for size, width in ((Size(), FULL_FIFTH), (QUICK, QUICK_FIFTH))
    )
    return experiment()._replace(
        name=FIFTH, full=full, quick=quick, report=fifth_report, outcome=fifth_outcome, describe_texts=describe,
        draw=partial(draw, first=results),
    )  # fmt: skip


def main() -> int | None:
    """Run the first four sizes; with --fifth FILE, the fifth."""
    assert __doc__ is not None
    parser = command_line(NAME, __doc__)
    parser.add_argument(
        "--fifth", type=local_path, metavar="FILE", help="train the fifth size; FILE is scaling.json of the first four"
    )
    arguments = parser.parse_args()
    if arguments.fifth is None:
        return run_experiment(experiment(), arguments)
    with whole_results(NAME, arguments.fifth):
        fifth = fifth_experiment(read_results(NAME, arguments.fifth))
    return run_experiment(fifth, arguments)


if __name__ == "__main__":
    run_main(main)
