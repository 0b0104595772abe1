"""The experiments that the page of results shows, in its order."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ablations
import adapt
import averaging
import balancing_rules
import context_report
import optimizers
import rsdb_report
import scaling
import scaling_report
from experiment import Experiment, Record, whole_results

from trinity.io.json_files import read_json

RESULTS = Path(__file__).parent / "results"
VERDICTS = {
    "agrees with the claim": "agrees",
    "agrees in part with the claim": "in part",
    "contradicts the claim": "contradicts",
}
"""Phrase of an outcome → word of the summary."""


class Shown(NamedTuple):
    """An experiment on the page.

    name: of its results file. title: heading of its section.
    claim, published: what the report or a paper claims, and its figure.
    setup: model, data and arms in short; the docstring of the command has the whole design.
    rule: when the result counts as agreeing with the claim.
    report, conclude: results → tables in Markdown, and what came out.
    plot: path of its SVG from docs/.
    command: repeats it.
    """

    name: str
    title: str
    claim: str
    published: str
    setup: str
    rule: str
    report: Callable[[Record], str]
    conclude: Callable[[Record], str]
    plot: str
    command: str

    def results(self) -> Record:
        """The recorded results."""
        return read_json(self.path(), "restore it")

    def path(self) -> Path:
        """Of the results file."""
        return RESULTS / f"{self.name}.json"

    def tables(self) -> str:
        """Tables of the recorded results."""
        with whole_results(self.name, self.path()):
            return self.report(self.results())

    def outcome(self) -> str:
        """What came out, in sentences."""
        with whole_results(self.name, self.path()):
            return self.conclude(self.results())

    def verdict(self) -> str:
        """What came out, in words of the summary."""
        text = self.outcome()
        found = [word for phrase, word in VERDICTS.items() if phrase in text]
        if len(found) == 1:
            return found[0]
        if found:
            return "in part"
        return "no clear difference" if "no clear difference" in text else "see there"


def _shown(experiment: Experiment, title: str, published: str, setup: str, rule: str) -> Shown:
    name = experiment.name
    return Shown(
        name, title, experiment.claim, published, setup, rule, experiment.report, experiment.outcome,
        f"../tools/experiments/results/{name}.svg", f"python tools/experiments/{name}.py",
    )  # fmt: skip


AFTER = " The rule was written after the results were known."

EXPERIMENTS = (
    _shown(
        optimizers.experiment(), "Muon and AdamW",
        "The report gives no figure; Moonlight (arXiv 2502.16982): 52 % of AdamW's training FLOPs to its loss.",
        "0.4 million parameters, 8 experts of which 2 are active; 400 steps of 2,048 tokens. Muon's arm keeps AdamW "
        "at 0.006 for embedding, head and gains. Rates were tuned with seed 0: one of Muon, and of AdamW either one "
        "of the hidden matrices or one of everything; the better of these two AdamW arms is compared.",
        "Muon needs fewer tokens to AdamW's final loss in every seed; the goal is 1.3 times fewer (median).",
    ),
    _shown(
        balancing_rules.experiment(), "Rules of expert balancing",
        "The report gives no figure for the steps; SMEBU was one of six changes after which Large trained stably.",
        "0.6 million parameters, 128 experts of which 8 are active, no sequence loss; 300 steps of 4,096 tokens, the "
        "learning rate constant to step 200, then linear to 0; that of the balancing rule is constant.",
        "from the early steps to the end of the decay SMEBU's step falls to half or less.",
    ),
    _shown(
        ablations.experiment(), "Parts of the recipe taken away",
        "No loss spike in three runs with all of them; the report takes none away alone.",
        "0.33 million parameters, 6 layers, 8 experts of which 2 are active; 200 steps of 2,048 tokens, at the "
        "recipe's rates and at three times these. All runs of a seed read the same batches.",
        "a part helps the loss if the loss without it is higher by 0.005 nats or more in every seed; it helps "
        "stability if without it a run spikes or is not finite, or if a logit, or the largest gradient norm over the "
        "median, is more than twice that of the whole recipe. A spike that several runs of a seed have at one step is"
        " of the batch and does not count (added after the results were known).",
    ),
    _shown(
        averaging.experiment(), "Averages of checkpoints in place of decay",
        "WSM (arXiv 2507.17634), with AdamW: better than a decay. Not published with Muon and experts.",
        "0.4 million parameters, 8 experts of which 2 are active; 600 steps of 2,048 tokens at a constant rate, a "
        "checkpoint every 10 steps. A decay continues this run from 85, 70 or 50 % of the steps to the same end.",
        "the best of six averages is at least as good as the best of six decays, by the median.",
    ),
    Shown(
        "rsdb", "Random Sequential Document Buffer",
        "Packing from a buffer of open documents makes batches less heterogeneous, loss and gradient norm steadier.",
        "BatchHet −46 % and kurtosis of the gradient norm 14.6 against 187 in a small experiment; in the run of Large"
        " BatchHet 4.23 times and step-to-step variance of the loss 2.4 times lower.",
        "1.4 million parameters; 600 steps of 16 rows of 128 tokens, in 4 microbatches. A stream reads one document "
        "after the other; with RSDB each of 4 streams packs rows from 64 to 128 open documents. Measured over the "
        "last 300 steps.",
        "BatchHet, the loss's variance from step to step (the report's measure) and the kurtosis are all below 0.9 "
        "of those of sequential packing." + AFTER,
        lambda results: rsdb_report.table(rsdb_report.runs_by_arm(results)), rsdb_report.outcome,
        "../trinity/data/stream/rsdb.svg", "python tools/experiments/rsdb.py",
    ),
    Shown(
        "context_extension", "Context extension",
        "A short training on longer rows extends the context to more than the length of these rows.",
        "Multi-key needle, Large trained at 256k: 0.994 at 256k, 0.976 at 512k, 0.42 at 1M tokens.",
        "a dense model of 4 layers, two of them local (window 32) and two global without positions, learns to find "
        "the value of a key among pairs in noise: 900 steps of 32 rows of 128 tokens, then 120 steps at 512 (13 % "
        "more tokens), or as many tokens at 128 for control. Score: share of rows where the right one of 16 values "
        "has the largest logit (chance 0.06). Whether the global layers cause the effect was not tested.",
        "at twice the longer rows the score is 0.95 or more, and higher than before and than in the control." + AFTER,
        context_report.table, context_report.outcome,
        "../trinity/evaluation/context_extension.svg", "python tools/experiments/context_extension.py",
    ),
    _shown(
        adapt.experiment(), "Ways to adapt a model",
        "SEC (arXiv 2406.14971): 5 % replay, and TIES with the start, restore general abilities. Spectrum "
        "(2406.06623): half of the modules, chosen by their signal-to-noise ratio, are as good as all, 30 to 42 % "
        "more efficiently. DAM (2410.08371): as good as evolutionary search at less cost; a mean competes where "
        "models are similar.",
        "0.76 million parameters, trained on `general` text (modules of Python's standard library), continued for 80 "
        "steps on `manual` (the language reference, a near domain) or on `unicode` (the character database, a far "
        "one), without replay or with 12.5 % of general text (`replay`); merged back with the start (`back`), "
        "with one weight α of the change or one for each part of the model; `mp` and `Spectrum's script` are two "
        "scores of modules.",
        "TIES: of what was forgotten half or less is left. Modules: half of them learn at least 90 % of what all "
        "learn, and more than random ones. DAM: a sum of losses no higher than the search's, at less cost. These "
        "rules were added after the run had begun, the comparison with random modules after the results were known.",
    ),
    _shown(
        scaling.experiment(), "A scaling law of the smoke recipe", "The report gives no law.",
        "four widths of a model of 4 layers with 8 experts, 2 active; 15 tokens for each active parameter. Brackets "
        "of a prediction hold the medians of three runs nine times of ten.",
        "see the next section.",
    ),
    _shown(
        scaling.experiment()._replace(
            name=scaling.FIFTH, report=scaling_report.fifth_report, outcome=scaling_report.fifth_outcome
        ),
        "The fifth size, predicted and trained", "The report gives no law.",
        "the same recipe at 1.6 times the parameters of the largest of the four, trained after the prediction was "
        "committed.",
        "the median of three runs lies in the predicted range.",
    )._replace(command="python tools/experiments/scaling.py --fifth tools/experiments/results/scaling.json"),
)  # fmt: skip
