"""Compare rules of expert balancing: SMEBU, sign, none, and SMEBU without its clamp or without its momentum.

python tools/experiments/balancing_rules.py --out runs/balancing_rules
python tools/experiments/balancing_rules.py --quick --out runs/balancing_rules-quick
python tools/experiments/balancing_rules.py --draw tools/experiments/results/balancing_rules.json

The report's claim: a sign step has a fixed size, so the biases of the experts keep oscillating about balance and never
settle; SMEBU's step goes to 0 as the load becomes even, and its momentum damps the noise. An update that is linear in
the violation, without tanh, balances fast and breaks later.

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (domains.py); rows of 128 tokens, 32 rows a step, packed by RSDB.
- Model: Trinity with 3 layers, the first dense, the others with 128 experts of width 8, of which 8 are active: 0.63
  million parameters. The smoke recipe without sequence loss, so that the biases alone balance. 300 steps: warm-up over
  20, a constant learning rate until step 200, then linear to 0. The rate of the balancing rule is constant throughout.
- Even load is 256 tokens an expert and step; drawing tokens at random alone gives a standard deviation of 6 %.
- Arms: `smebu` (eq. 23-28, κ 2, β 0.5); `sign` (eq. 19-22); `none`; `no_clamp`, Δ = λ·κ·v in place of λ·tanh(κ·v);
  `no_momentum`, β = 0. The last two take SMEBU's λ.
- Tuning, with seed 0, the same effort for both rules: λ and γ of 0.002, 0.005 and 0.0125; the one with the lowest mean
  MaxVio over the steps 100 to 200 is used for all seeds.
- Measured, three seeds, means over ranges of steps (10-60, early; 150-200, the end of the constant rate; 250-300, the
  end of the decay): MaxVio, mean over the layers; the step of the biases, root mean square over experts and layers of
  b_t − b_(t−1); reversals, the share of experts whose bias moves in the direction opposite to its last move; dead
  experts; and the training loss. At the end: the validation loss.
- The claim holds here if from early to the end of the decay the step of SMEBU falls to half or less. That of sign has a
  fixed size by its definition; what it does is shown by reversals and by MaxVio.

Differences from the report that may matter: 4,096 tokens a step, where Large has about 100 million, so that the noise
of counting, and with it the smallest step of SMEBU, is much larger; two MoE layers; 300 steps.

Finished parts are kept in --out: after an interruption the same command continues with the next part.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from balancing_rules_report import draw, mean_over, outcome, report
from experiment import Done, Experiment, Lab, Part, Record, run_experiment

from trinity.errors import run_main

ARMS = ("smebu", "sign", "none", "no_clamp", "no_momentum")
TUNED = ("smebu", "sign")
CURVES = ("loss", "max_violation_mean", "step", "reversals", "dead_experts")


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary, every: of the tokenizer; every `every`-th module of the text is used.
    steps, decay_start: optimizer steps, and the step at which the learning rate begins to fall.
    rates: of the rules, tried with seed 0.
    early, constant, decayed: ranges of steps over which is averaged; tuned: that by which a rate is chosen.
    kappa, beta: of SMEBU.
    settings: words that change the recipe.
    """

    vocabulary: int = 1024
    every: int = 1
    steps: int = 300
    decay_start: int = 200
    rates: tuple[float, ...] = (0.002, 0.005, 0.0125)
    early: tuple[int, int] = (10, 60)
    constant: tuple[int, int] = (150, 200)
    decayed: tuple[int, int] = (250, 300)
    tuned: tuple[int, int] = (100, 200)
    kappa: float = 2.0
    beta: float = 0.5
    settings: tuple[str, ...] = (
        "model.layers=3", "model.experts=128", "model.active_experts=8", "model.expert_width=8",
        "batch.sequences=32", "batch.microbatch=32",
    )  # fmt: skip


def quick() -> Size:
    """The toy size."""
    from small_run import QUICK_MODEL

    ranges = {"early": (1, 3), "constant": (2, 4), "decayed": (4, 6), "tuned": (1, 4)}
    return Size(512, 24, steps=6, decay_start=4, rates=(0.01, 0.02), settings=tuple(QUICK_MODEL), **ranges)


def parts(size: Size, seed: int) -> dict[str, Part]:
    """Tuning, with seed 0; then all arms."""
    named: dict[str, Part] = {}
    if seed == 0:
        for arm in TUNED:
            for rate in size.rates:
                named[f"{arm}_{rate:g}"] = Part(size.steps, partial(train_at, arm=arm, rate=rate))
    for arm in ARMS:
        named[arm] = Part(0 if seed == 0 and arm in TUNED else size.steps, partial(train_best, arm=arm))
    return named


def train_best(lab: Lab, done: Done, arm: str) -> Record:
    """Train an arm at the rate with the lowest MaxVio; the variants of SMEBU have SMEBU's rate."""
    if arm == "none":
        return train_at(lab, done, arm, 0.0)
    rule = arm if arm in TUNED else "smebu"
    tried = [done[0, f"{rule}_{rate:g}"] for rate in lab.size.rates]
    best = min(tried, key=lambda run: mean_over(run["curves"]["max_violation_mean"], lab.size.tuned))
    if lab.seed == 0 and arm == rule:  # that run exists
        return {key: best[key] for key in ("rate", "validation", "curves")}
    return train_at(lab, done, arm, best["rate"])


def train_at(lab: Lab, _done: Done, arm: str, rate: float) -> Record:
    """Train with a rule of balancing.

    Returns:
        "rate"; "validation" loss at the end; "curves": name → one value for each step, for each of CURVES.
    """
    from small_run import rounded, small_config, small_run

    size = lab.size
    schedule = [f"optim.schedule.decay_start_steps={size.decay_start}", "balancing.sequence_loss=0",
                "balancing.kind=none"]  # fmt: skip
    config = small_config(lab.texts, lab.seed, size.steps, list(size.settings), schedule)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    with small_run(config) as run:
        biases = Biases(run.model, rule(arm, rate, size))
        for _ in range(size.steps):
            result = run.step()
            measured = result.metrics | biases.update(None if result.skip_reason else result.counts_ME)
            for name, values in curves.items():
                values.append(measured[name])
            lab.after_step()
        validation = run.validation_loss()
    return {
        "rate": rate, "validation": validation, "curves": {name: rounded(values) for name, values in curves.items()}
    }  # fmt: skip


def rule(arm: str, rate: float, size: Size) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The update of an arm: (bias [M, E], momentum [M, E], counts [M, E]) → the next bias and momentum."""
    from trinity.balancing import sign_update, smebu_update

    if arm == "none":
        return lambda bias, momentum, counts: (bias, momentum)
    if arm == "sign":
        return lambda bias, momentum, counts: (sign_update(bias, counts, rate), momentum)
    if arm == "no_clamp":
        return lambda bias, momentum, counts: linear_update(bias, momentum, counts, rate * size.kappa, size.beta)
    beta = 0.0 if arm == "no_momentum" else size.beta
    return lambda bias, momentum, counts: smebu_update(bias, momentum, counts, rate, size.kappa, beta)


def linear_update(bias: Any, momentum: Any, counts: Any, slope: float, beta: float) -> tuple[Any, Any]:
    """SMEBU without tanh: Δ = slope·v, with v = (n̄−n)/n̄, whose mean is 0; m = β·m + (1−β)·Δ; b += m.

    Args:
        bias, momentum: [..., E].
        counts: [..., E], tokens of each expert, not all 0.
    """
    mean = counts.double().mean(dim=-1, keepdim=True)
    step = (slope * (mean - counts) / mean).to(bias.dtype)
    momentum = beta * momentum + (1 - beta) * step
    return bias + momentum, momentum


class Biases:
    """The expert biases of a model, moved by a rule after each step; the config's own rule is `none`."""

    def __init__(self, model: Any, rule: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
        import torch

        from trinity.models.trinity import moe_layers

        self._layers, self._rule = moe_layers(model), rule
        self._momentum = torch.stack([layer.expert_momentum for layer in self._layers])
        self._last = torch.zeros_like(self._momentum)

    def update(self, counts_ME: Any) -> dict[str, float]:
        """Move the biases, unless the step was skipped; returns the "step" and the share of "reversals"."""
        import torch

        if counts_ME is None:
            return {"step": 0.0, "reversals": 0.0}

        with torch.no_grad():
            before = torch.stack([layer.expert_bias for layer in self._layers])
            after, self._momentum = self._rule(before, self._momentum, counts_ME)
            for layer, bias_E, momentum_E in zip(self._layers, after, self._momentum):
                layer.expert_bias.copy_(bias_E)
                layer.expert_momentum.copy_(momentum_E)
            step, last, self._last = after - before, self._last, after - before
        return {
            "step": math.sqrt(step.double().square().mean().item()),
            "reversals": statistics.fmean((step * last < 0).flatten().tolist()),
        }


def experiment() -> Experiment:
    """The experiment."""
    assert __doc__ is not None
    return Experiment(
        name="balancing_rules",
        design=__doc__,
        claim="With the sign rule the expert biases keep oscillating; with SMEBU they settle.",
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
