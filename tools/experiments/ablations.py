"""Take away the parts of the recipe that stabilise training, one at a time, at the usual rate and at three times it.

python tools/experiments/ablations.py --out runs/ablations
python tools/experiments/ablations.py --quick --out runs/ablations-quick
python tools/experiments/ablations.py --draw tools/experiments/results/ablations.json

The claim: norms before and after each sublayer, with gains of 1/√L after it, QK-norm and gated attention keep training
stable. The report has no loss spike in three runs with all of them; the sequence loss and the z-loss were among the six
changes, made together, that ended Large's instability. It takes none of them away alone.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (domains.py); rows of 128 tokens, 16 rows a step, packed by RSDB.
- Model: Trinity with 6 layers, the first dense, the others with 8 experts of which 2 are active, width 48: 0.33 million
  parameters. The smoke recipe: 200 steps, warm-up over 20, linear to 0 over the last 30 %.
- Rates: the recipe's (Muon 0.02, AdamW 0.006), with which the whole recipe is stable, and three times both.
- Arms: `full`; `no_sequence_loss` (α = 0); `no_z_loss` (coefficient 0); `no_depth_scale` (the gains after a sublayer
  begin at 1); `no_post_norm` (no norm after a sublayer: x + M(norm(x))); `no_gate` (the gate is 1); `no_qk_norm` (RoPE
  on queries and keys as they are projected).
- Nothing is tuned anew for an arm: the question is what the recipe loses.
- Measured, three seeds: validation loss at the end, and its difference to `full` with the same seed; after the first
  50 steps the largest gradient norm before clipping, alone and over the median norm, the largest attention logit
  (sampled every 10 steps) and the largest logit of the head; MaxVio, mean over the last 50 steps; spikes of loss or
  gradient norm, by the rule of health.spike with a window of 64 steps, begun after the first 50; steps that were not
  finite.
- A part helps the loss here if the loss without it is higher for every seed, and by 0.005 nats or more. It helps
  stability if without it any run spikes or is not finite where none of `full` does, or if a logit, or the largest
  gradient norm over the median, is more than twice that of `full` (medians over seeds).
- Changed after the results were seen: a spike at a step at which other runs of the same seed have one, too, is of the
  batch, and does not count against the part.

Differences from the report that may matter: instabilities of Large came after trillions of tokens, and the report's
model has 60 layers; here a run has 0.4 million tokens and 6 layers. What does not matter here may matter there; the
coefficients of sequence loss and z-loss are so small that 200 steps may not show them.

Finished parts are kept in --out: after an interruption the same command continues with the next part.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ablations_report import draw, outcome, report
from experiment import Done, Experiment, Lab, Part, Record, run_experiment

from trinity.errors import run_main

CURVES = {"loss": "loss", "grad_norm": "grad_norm", "max_head_logit": "max_head_logit"}
"""Name in the record → metric of a step."""


class Arm(NamedTuple):
    """What an arm takes away: words of the config, or the name of a function of variants.py."""

    settings: tuple[str, ...] = ()
    variant: str | None = None


ARMS = {
    "full": Arm(),
    "no_sequence_loss": Arm(("balancing.sequence_loss=0",)),
    "no_z_loss": Arm(("loss.z=0",)),
    "no_depth_scale": Arm(variant="no_depth_scale"),
    "no_post_norm": Arm(variant="no_post_norm"),
    "no_gate": Arm(variant="no_gate"),
    "no_qk_norm": Arm(variant="no_qk_norm"),
}


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary, every: of the tokenizer; every `every`-th module of the text is used.
    steps: optimizer steps of a run. ignored: first steps whose gradient norms and logits do not count.
    balanced: last steps over which MaxVio is averaged. probe_every: steps between samples of attention logits.
    rates: multiples of the recipe's rates. muon, adamw: these.
    settings: words that change the recipe.
    """

    vocabulary: int = 1024
    every: int = 1
    steps: int = 200
    ignored: int = 50
    balanced: int = 50
    probe_every: int = 10
    rates: tuple[float, ...] = (1.0, 3.0)
    muon: float = 2e-2
    adamw: float = 6e-3
    settings: tuple[str, ...] = (
        "model.layers=6", "model.width=48", "model.head_dim=12", "model.dense_width=144", "model.expert_width=24",
    )  # fmt: skip


def quick() -> Size:
    """The toy size."""
    from small_run import QUICK_MODEL

    return Size(512, 24, steps=4, ignored=1, balanced=2, probe_every=2, settings=tuple(QUICK_MODEL))


def part_name(arm: str, rate: float) -> str:
    """Of an arm at a multiple of the recipe's rates."""
    return f"{arm}_{rate:g}x"


def parts(size: Size, _seed: int) -> dict[str, Part]:
    """Every arm at every rate."""
    return {
        part_name(arm, rate): Part(size.steps, partial(train_arm, arm=arm, rate=rate))
        for rate in size.rates
        for arm in ARMS
    }


def train_arm(lab: Lab, _done: Done, arm: str, rate: float) -> Record:
    """Train an arm.

    Returns:
        "arm", "rate"; "validation" loss at the end; "curves" of CURVES; "attention_logits", sampled; "max_violation";
        "not_finite", steps that were skipped for it.
    """
    import variants
    from small_run import rounded, small_config, small_run

    size = lab.size
    rates = [f"optim.muon.lr={rate * size.muon}", f"optim.adamw.lr={rate * size.adamw}"]
    config = small_config(lab.texts, lab.seed, size.steps, list(size.settings), rates, list(ARMS[arm].settings))
    name = ARMS[arm].variant
    variant: Callable[[Any], None] | None = None if name is None else variants.VARIANTS[name]
    curves: dict[str, list[float]] = {curve: [] for curve in CURVES}
    logits, violations, not_finite = [], [], 0
    with small_run(config, variant=variant) as run:
        for step in range(1, size.steps + 1):
            result = run.step()
            for curve, metric in CURVES.items():
                curves[curve].append(result.metrics[metric])
            violations.append(result.metrics["max_violation_mean"])
            not_finite += result.skip_reason is not None
            if step % size.probe_every == 0:
                logits.append(run.largest_attention_logit())
            lab.after_step()
        last = violations[-size.balanced :]
        return {
            "arm": arm, "rate": rate, "validation": run.validation_loss(), "not_finite": not_finite,
            "max_violation": sum(last) / len(last), "attention_logits": rounded(logits),
            "curves": {curve: rounded(values) for curve, values in curves.items()},
        }  # fmt: skip


def experiment() -> Experiment:
    """The experiment."""
    assert __doc__ is not None
    return Experiment(
        name="ablations",
        design=__doc__,
        claim="Sandwich norms with depth-scaled gains, QK-norm, the attention gate, the z-loss and the sequence loss "
        "keep training stable.",
        full=Size(),
        quick=quick(),
        parts=parts,
        report=report,
        outcome=outcome,
        draw=draw,
    )


def main() -> int | None:
    """The command."""
    return run_experiment(experiment())


if __name__ == "__main__":
    run_main(main)
