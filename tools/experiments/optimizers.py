"""Compare Muon with AdamW on the hidden matrices: tokens and CPU time to the same loss, both rates tuned.

python tools/experiments/optimizers.py --out runs/optimizers
python tools/experiments/optimizers.py --quick --out runs/optimizers-quick
python tools/experiments/optimizers.py --draw tools/experiments/results/optimizers.json

The claim: Muon is more sample-efficient than AdamW. The report trains all hidden matrices with it and gives no figure.
Moonlight (arXiv 2502.16982) finds that Muon needs about 52 % of AdamW's training FLOPs. The goal set here
before the first run: at least 1.3 times fewer tokens.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (domains.py); rows of 128 tokens, 16 rows a step, packed by RSDB.
- Model: Trinity with 0.4 million parameters: 4 layers, the first dense, the others with 8 experts of which 2 are
  active; the smoke recipe. Warm-up over 20 steps, constant, linear to 0 over the last 30 % of the steps.
- Arm `muon`: Muon on the hidden matrices and the router; AdamW, at a rate of 6e-3, on embedding, head and gains.
- Arm `adamw`: AdamW (betas 0.9 and 0.95) on the hidden matrices and the router too, with a rate of its own.
- Arm `one_rate`: AdamW with one rate for everything, the usual way.
- Tuning, with seed 0, the same effort for each arm: 400 steps at four rates, a factor of 2 apart, of what the arm is
  named for; where the best is the lowest or the highest, one more beyond it, up to two times. The better one of the two
  AdamW arms is compared. So AdamW gets twice the effort of Muon.
- Measured, three seeds: the validation loss (mean over the domains) after 400 steps of each arm at its best rate; and
  of Muon after 25, 40, 50, 60 and 75 % of the steps, each a run of its own whose schedule ends there.
- The result: the number of tokens at which Muon has the loss that AdamW ends with, interpolated between these runs in
  the logarithm of the tokens; and the CPU seconds of a step, on one thread, medians of 20 steps of both optimizers in
  turns. (The turns were added while the first seeds were trained: seconds of whole runs depended
  on what else the machine did.)

Differences from the report that may matter: 0.8 million tokens, two for each parameter; 2,048 tokens a step, where both
optimizers have noisy gradients; and a model so small that Newton-Schulz takes a larger share of a step.

Finished parts are kept in --out: after an interruption the same command continues with the next part.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from experiment import Done, Experiment, Lab, Part, Record, run_experiment
from optimizers_report import draw, final, outcome, report, tuning

from trinity.errors import run_main

TIMED_STEPS = 20


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary, every: of the tokenizer; every `every`-th module of the text is used.
    steps: optimizer steps of a whole run.
    rates: arm → the rates that are tried first, in rising order.
    beyond: how often one more is tried beyond the lowest or the highest.
    shares: of the steps, for the shorter runs of Muon.
    settings: words that change the recipe.
    """

    vocabulary: int = 1024
    every: int = 1
    steps: int = 400
    rates: dict[str, list[float]] = {
        "muon": [5e-3, 1e-2, 2e-2, 4e-2],
        "adamw": [1.5e-3, 3e-3, 6e-3, 1.2e-2],
        "one_rate": [1.5e-3, 3e-3, 6e-3, 1.2e-2],
    }
    beyond: int = 2
    shares: tuple[float, ...] = (0.25, 0.4, 0.5, 0.6, 0.75)
    settings: tuple[str, ...] = ()


def quick() -> Size:
    """The toy size."""
    from small_run import QUICK_MODEL

    rates = {"muon": [1e-2, 2e-2], "adamw": [1e-3, 2e-3], "one_rate": [1e-3, 2e-3]}
    return Size(512, 24, steps=4, rates=rates, beyond=1, shares=(0.5, 0.75), settings=tuple(QUICK_MODEL))


def parts(size: Size, seed: int) -> dict[str, Part]:
    """Tuning, with seed 0; then the arms at their best rates, and Muon's shorter runs."""
    named: dict[str, Part] = {}
    if seed == 0:
        for arm, rates in size.rates.items():
            for rate in rates:
                named[f"{arm}_{rate:g}"] = Part(size.steps, partial(train_at, arm=arm, rate=rate))
            for number in range(size.beyond):
                named[f"{arm}_beyond_{number}"] = Part(0, partial(train_beyond, arm=arm, number=number))
    for arm in ("muon", "adamw"):
        named[arm] = Part(0 if seed == 0 else size.steps, partial(train_best, arm=arm, share=1.0))
    for share in size.shares:
        named[f"muon_{share:.0%}"] = Part(round(share * size.steps), partial(train_best, arm="muon", share=share))
    named["step_times"] = Part(2 * TIMED_STEPS, step_times)
    return named


def step_times(lab: Lab, done: Done) -> Record:
    """Time training steps of both optimizers in turns, so that the machine's load is the same for each.

    Returns:
        "step_times": arm → median CPU seconds of a step; the first is left out.
    """
    from small_run import SmallRun, small_config

    from trinity.parallel import mesh

    adamw = done[lab.seed, "adamw"]
    config = small_config(lab.texts, lab.seed, 1 + TIMED_STEPS, list(lab.size.settings))
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        makers = {"muon": {}, "adamw": {"optimizers": adamw_optimizers(adamw["arm"], adamw["rate"])}}
        runs = {arm: SmallRun(config, ranks, **words) for arm, words in makers.items()}
        seconds: dict[str, list[float]] = {arm: [] for arm in runs}
        for _ in range(1 + TIMED_STEPS):
            for arm, run in runs.items():
                before = run.seconds
                run.step()
                seconds[arm].append(run.seconds - before)
    finally:
        mesh.stop()
    return {"step_times": {arm: statistics.median(of_arm[1:]) for arm, of_arm in seconds.items()}}


def train_at(lab: Lab, _done: Done, arm: str, rate: float, share: float = 1.0) -> Record:
    """Train an arm with a rate for a share of the steps.

    Returns:
        "arm", "rate", "steps"; "tokens" read; "validation" loss at the end; "step_seconds", CPU seconds of its training
        steps; "loss", each step's.
    """
    from small_run import rounded, small_config, small_run

    steps = round(share * lab.size.steps)
    config = small_config(
        lab.texts, lab.seed, steps, list(lab.size.settings), [f"optim.muon.lr={rate}"] if arm == "muon" else []
    )
    with small_run(config, **({} if arm == "muon" else {"optimizers": adamw_optimizers(arm, rate)})) as run:
        losses = []
        for _ in range(steps):
            losses.append(run.step().metrics["loss"])
            lab.after_step()
        tokens = steps * config.batch.sequences * config.data.sequence_length
        return {
            "arm": arm, "rate": rate, "steps": steps, "tokens": tokens, "validation": run.validation_loss(),
            "step_seconds": run.seconds, "loss": rounded(losses),
        }  # fmt: skip


def train_beyond(lab: Lab, done: Done, arm: str, number: int) -> Record:
    """Train once more beyond the tried rates if the best is at their end; else return a record without a run."""
    tried = [run["rate"] for run in tuning(done.values(), arm)]
    best = best_run(done, arm)["rate"]
    if best not in (tried[0], tried[-1]):
        return {}
    return train_at(lab, done, arm, best / 2 if best == tried[0] else best * 2)


def best_run(done: Done, arm: str) -> Record:
    """The run with seed 0 that has the lowest validation loss; one that diverged has none."""
    runs = tuning(done.values(), arm)
    return min(runs, key=final)


def train_best(lab: Lab, done: Done, arm: str, share: float) -> Record:
    """Train the optimizer `arm` at its best rate. `adamw` is the better one of the two AdamW arms."""
    best = best_run(done, arm)
    if arm == "adamw":
        best = min(best, best_run(done, "one_rate"), key=final)
    if lab.seed == 0 and share == 1.0:  # that run exists
        return {key: value for key, value in best.items() if key not in ("seed", "part", "seconds")}
    return train_at(lab, done, best["arm"], best["rate"], share)


def adamw_optimizers(arm: str, rate: float) -> Callable[[Any, Any], Any]:
    """Makes AdamW for all parameters: `rate` is that of the hidden matrices, or in the arm `one_rate` of everything."""
    import torch

    from trinity.models.param_roles import parameter_roles
    from trinity.optim.build import Optimizers
    from trinity.optim.muon import Muon

    class AdamWAlone(Optimizers):
        """Each group of AdamW has a peak of its own."""

        def set_rates(self, scale: float) -> None:
            for group in self.adamw.param_groups:
                group["lr"] = scale * group["peak"]

    def make(config: Any, model: Any) -> Optimizers:
        settings = config.optim.adamw
        other = rate if arm == "one_rate" else settings.lr
        roles = parameter_roles(model)
        kinds = {"matrix": rate, "experts": rate, "router": rate, "embedding": other, "head": other, "gain": other}
        groups = [
            {"params": [role.parameter for role in roles if role.kind == kind], "peak": peak,
             "weight_decay": 0.0 if kind == "gain" else settings.weight_decay}
            for kind, peak in kinds.items()
        ]  # fmt: skip
        adamw = torch.optim.AdamW(groups, lr=rate, betas=settings.betas, eps=settings.eps, fused=True)
        return AdamWAlone(Muon([], lr=0.0), adamw, [], roles, 0.0, rate)

    return make


def experiment() -> Experiment:
    """The experiment."""
    assert __doc__ is not None
    return Experiment(
        name="optimizers",
        design=__doc__,
        claim="Muon is more sample-efficient than AdamW.",
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
