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
from experiment import Experiment, Record

from trinity.io.json_files import read_json

RESULTS = Path(__file__).parent / "results"
AGREES, CONTRADICTS = "agrees with the claim", "contradicts the claim"


class Shown(NamedTuple):
    """An experiment on the page.

    name: of its results file. title: heading of its section.
    claim, published: what the report or a paper claims, and its figure.
    report, conclude: results → tables in Markdown, and what came out.
    plot: path of its SVG from docs/.
    command: repeats it.
    """

    name: str
    title: str
    claim: str
    published: str
    report: Callable[[Record], str]
    conclude: Callable[[Record], str]
    plot: str
    command: str

    def results(self) -> Record:
        """The recorded results."""
        return read_json(RESULTS / f"{self.name}.json")

    def tables(self) -> str:
        """Tables of the recorded results."""
        return self.report(self.results())

    def outcome(self) -> str:
        """What came out, in sentences."""
        return self.conclude(self.results())

    def verdict(self) -> str:
        """What came out, in words of the summary."""
        text = self.outcome()
        agrees, contradicts = AGREES in text, CONTRADICTS in text
        if agrees and not contradicts and f"{AGREES} in" not in text:
            return "agrees"
        if contradicts and not agrees:
            return "contradicts"
        if "no clear difference" in text:
            return "no clear difference"
        return "in part" if agrees else "see there"


def _shown(experiment: Experiment, title: str, published: str) -> Shown:
    name = experiment.name
    return Shown(
        name, title, experiment.claim, published, experiment.report, experiment.outcome,
        f"../tools/experiments/results/{name}.svg", f"python tools/experiments/{name}.py",
    )  # fmt: skip


EXPERIMENTS = (
    _shown(
        optimizers.experiment(), "Muon and AdamW",
        "The report gives no figure; Moonlight (arXiv 2502.16982): 52 % of AdamW's training FLOPs to its loss.",
    ),
    _shown(
        balancing_rules.experiment(), "Rules of expert balancing",
        "The report gives no figure for the steps; SMEBU was one of six changes after which Large trained stably.",
    ),
    _shown(
        ablations.experiment(), "Parts of the recipe taken away",
        "No loss spike in three runs with all of them; the report takes none away alone.",
    ),
    _shown(
        averaging.experiment(), "Averages of checkpoints in place of decay",
        "WSM (arXiv 2507.17634), with AdamW: better than a decay. Not published with Muon and experts.",
    ),
    Shown(
        "rsdb", "Random Sequential Document Buffer",
        "Packing from a buffer of open documents makes batches less heterogeneous, loss and gradient norm steadier.",
        "BatchHet −46 % and kurtosis of the gradient norm 14.6 against 187 in a small experiment; in the run of Large "
        "BatchHet 4.23 times and step-to-step variance of the loss 2.4 times lower.",
        lambda results: rsdb_report.table(rsdb_report.runs_by_arm(results)), rsdb_report.outcome,
        "../trinity/data/stream/rsdb.svg", "python tools/experiments/rsdb.py",
    ),
    Shown(
        "context_extension", "Context extension",
        "A short training on longer rows, in which the global layers alone see more, extends the context to more than "
        "the length of these rows.",
        "Multi-key needle, Large trained at 256k: 0.994 at 256k, 0.976 at 512k, 0.42 at 1M tokens.",
        context_report.table, context_report.outcome,
        "../trinity/evaluation/context_extension.svg", "python tools/experiments/context_extension.py",
    ),
    _shown(
        adapt.experiment(), "Ways to adapt a model",
        "SEC (arXiv 2406.14971): TIES with the start restores general abilities. Spectrum (2406.06623): 30 to 42 % "
        "more efficient with half of the weights frozen. DAM (2410.08371): as good as evolutionary search.",
    ),
    _shown(scaling.experiment(), "A scaling law of the smoke recipe", "The report gives no law."),
    _shown(
        scaling.experiment()._replace(
            name=scaling.FIFTH, report=scaling_report.fifth_report, outcome=scaling_report.fifth_outcome
        ),
        "The fifth size, predicted and trained", "The report gives no law.",
    )._replace(command="python tools/experiments/scaling.py --fifth tools/experiments/results/scaling.json"),
)  # fmt: skip
