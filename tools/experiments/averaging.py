"""Compare averages of checkpoints with decay of the learning rate, at equal tokens, with Muon and experts.

python tools/experiments/averaging.py --out runs/averaging
python tools/experiments/averaging.py --quick --out runs/averaging-quick
python tools/experiments/averaging.py --draw tools/experiments/results/averaging.json

The claim: WSM (arXiv 2507.17634) replaces the decay by a weighted average of the checkpoints of a run at a constant
rate, and finds it better than the decay, with AdamW. With Muon, and with experts whose biases are averaged too, nothing
is published. The report decays (linear to 0 for Nano and Mini).

The design, fixed before the first run:
- Text: Python's standard library as 14 domains (domains.py); rows of 128 tokens, 16 rows a step, packed by RSDB.
- Model: Trinity with 0.4 million parameters: 4 layers, the first dense, the others with 8 experts of which 2 are
  active; the smoke recipe with a warm-up over 20 steps.
- One run of 600 steps at a constant rate, with a checkpoint every 10 steps. All arms end at step 600.
- Arm `decayed`: the same run continued from its state at 85, 70 or 50 % of the steps, with a decay to 0 at step 600,
  linear or cosine.
- Arm `averaged`: the average of the constant run's checkpoints of the last 15, 30 or 50 % of the steps, with the
  weights that stand for a linear decay (all equal) or a 1-sqrt decay (trinity.optim.decay_weights); weights, gains and
  expert biases alike. It costs no training. So both arms have three lengths and two shapes.
- Also measured: the constant run itself at step 600; and averages of 5 checkpoints over each length, evenly spaced,
  with equal weights, because a run may not keep more.
- Measured, three seeds: validation loss. The best of six settings of one arm, by the median over the seeds, is compared
  with the best of six of the other.
- The claim holds here if the best average is at least as good as the best decay.

Differences from the papers that may matter: 1.2 million tokens; a decay that begins before the loss has flattened has
more to gain from large steps; WSM was measured on models of billions after trillions of tokens.

Finished parts are kept in --out: after an interruption the same command continues with the next part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from averaging_report import draw, outcome, report
from experiment import Done, Experiment, Lab, Part, Record, run_experiment

from trinity.errors import run_main


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary, every: of the tokenizer; every `every`-th module of the text is used.
    steps: optimizer steps of each arm. save_every: steps between the checkpoints.
    shares: lengths of decays and averages, of the steps.
    decays, averages: their shapes.
    few: the number of checkpoints of the small averages.
    settings: words that change the recipe.
    """

    vocabulary: int = 1024
    every: int = 1
    steps: int = 600
    save_every: int = 10
    shares: tuple[float, ...] = (0.15, 0.3, 0.5)
    decays: tuple[str, ...] = ("linear", "cosine")
    averages: tuple[str, ...] = ("linear", "1-sqrt")
    few: int = 5
    settings: tuple[str, ...] = ()


def quick() -> Size:
    """The toy size."""
    from small_run import QUICK_MODEL

    return Size(512, 24, steps=20, save_every=1, shares=(0.25, 0.5), few=3, settings=tuple(QUICK_MODEL))


def parts(size: Size, _seed: int) -> dict[str, Part]:
    """One part: all arms of a seed continue the same run."""
    decayed = sum(round(share * size.steps) for share in size.shares) * len(size.decays)
    return {"losses": Part(size.steps + decayed, make)}


def make(lab: Lab, _done: Done) -> Record:
    """Train the constant run and its decayed branches, and average its checkpoints.

    Returns:
        "constant": validation loss; "decayed", "averaged", "few": shape → length → validation loss; "loss", "grad_norm"
        of each step of the constant run; "branches": shape → length → the loss of each step.
    """
    from small_run import rounded, small_config, small_run

    size = lab.size
    begins = {share: size.steps - round(share * size.steps) for share in size.shares}
    constant = small_config(lab.texts, lab.seed, size.steps, list(size.settings), ["optim.schedule.decay=none"])
    states: dict[int, Any] = {}
    forks: dict[int, Any] = {}
    losses, norms = [], []
    with small_run(constant) as run:
        for step in range(1, size.steps + 1):
            metrics = run.step().metrics
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
            if step in begins.values():
                forks[step] = run.save()
            if step % size.save_every == 0 and step >= min(begins.values()):
                states[step] = run.state()
            lab.after_step()
        record: Record = {"constant": run.validation_loss(), "loss": rounded(losses), "grad_norm": rounded(norms)}
        for name, few in (("averaged", None), ("few", size.few)):
            record[name] = {
                shape: {f"{share:g}": average(run, states, begin, shape, few) for share, begin in begins.items()}
                for shape in (size.averages if few is None else ["equal"])
            }
        record |= {"decayed": {}, "branches": {}}
        for shape in size.decays:
            record["decayed"][shape], record["branches"][shape] = {}, {}
            for share, begin in begins.items():
                run.restore(forks[begin])
                of_schedule = [f"optim.schedule.decay={shape}", f"optim.schedule.decay_start_steps={begin}"]
                run.config = small_config(lab.texts, lab.seed, size.steps, list(size.settings), of_schedule)
                branch = []
                for _ in range(size.steps - begin):
                    branch.append(run.step().metrics["loss"])
                    lab.after_step()
                record["decayed"][shape][f"{share:g}"] = run.validation_loss()
                record["branches"][shape][f"{share:g}"] = rounded(branch)
    return record


def average(run: Any, states: dict[int, Any], begin: int, shape: str, few: int | None) -> float:
    """The validation loss of a weighted average of the checkpoints from a step on; it is left in the model.

    Args:
        run: a SmallRun.
        states: step → weights and biases.
        begin: step of the first checkpoint.
        shape: of the decay that the weights stand for.
        few: average this many, evenly spaced, the last among them; None: all.
    """
    from trinity.optim.decay_weights import decay_weights

    steps = [step for step in states if step >= begin]
    if few is not None:
        steps = evenly_spaced(steps, few)
    run.load(weighted_sum([states[step] for step in steps], decay_weights(steps, shape)))
    return run.validation_loss()


def evenly_spaced(steps: Sequence[int], number: int) -> list[int]:
    """`number` of the steps, from the first to the last, as evenly as possible; all if there are not more."""
    if len(steps) <= number:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (number - 1))] for place in range(number)]


def weighted_sum(states: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Σ w_i·state_i by tensor, summed in float64."""
    return {
        name: sum(weight * state[name].double() for weight, state in zip(weights, states)).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def experiment() -> Experiment:
    """The experiment."""
    assert __doc__ is not None
    return Experiment(
        name="averaging",
        design=__doc__,
        claim="A weighted average of the checkpoints of a run at a constant rate is as good as a decay of the rate.",
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
