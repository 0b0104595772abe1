"""Results of the comparison of adaptations: tables and a plot, from the results file alone."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import cost
from plots import COLOURS, markdown_table, median_and_range, save_plot, with_minus

Results = dict[str, Any]
GENERAL, DOMAINS = "general", ("manual", "unicode")
NAMES = (GENERAL, *DOMAINS)

BACK = {"mean": "mean of both", "ties": "TIES", "alpha": "α searched", "parts": "α by part searched"}
CONTINUED = {
    "_no_replay": "no replay",
    **{f"_no_replay_back_{key}": f"no replay, back: {title}" for key, title in BACK.items()},
    "": "replay",
    **{f"_back_{key}": f"replay, back: {title}" for key, title in BACK.items()},
}
"""End of a part's name after the domain → its title."""
MODULES = {
    "": "all",
    **{
        f"_{how}{share}": f"{title}, {share} %"
        for share in (50, 25)
        for how, title in {"mp": "mp", "script": "Spectrum's script", "random": "random"}.items()
    },
}
MERGES = {
    "base": "base", "manual": "the model of manual", "unicode": "the model of unicode", "merge_soup": "mean",
    "merge_soup_base": "mean with the base", "merge_slerp": "SLERP", "merge_task_arithmetic": "task arithmetic",
    "merge_ties": "TIES", "merge_dare_ties": "DARE-TIES", "merge_cma_es": "CMA-ES by part", "merge_dam": "DAM",
    "merge_dam_base": "DAM with the base",
}  # fmt: skip


def values(results: Results, part: str, measure: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """A measure of one part: a value for each seed."""
    return [measure(record) for record in results["parts"] if record["part"] == part]


def losses_of(results: Results, part: str, domain: str) -> list[float]:
    """The loss of one part on a domain, for each seed."""
    return values(results, part, lambda record: record["losses"][domain])


def changes(results: Results, part: str, domain: str) -> list[float]:
    """The loss of a domain minus the base's, for each seed."""
    before, after = (losses_of(results, each, domain) for each in ("base", part))
    return [b - a for a, b in zip(before, after, strict=True)]


CLAIMS = {
    "continue, then merge back (SEC, arXiv 2406.14971)": "continued pretraining with 5 % of general text learns the "
    "domain, and TIES with the model that it started from restores general abilities",
    "Spectrum (2406.06623)": "to train the 25 or 50 % of the modules with the largest signal-to-noise ratio is as good "
    "as to train all, with less memory and time: 30 to 42 % more efficient with about half of the weights frozen",
    "DAM (2410.08371)": "learned coefficients are as good as evolutionary search at less cost; a mean competes where "
    "models are similar",
}
"""Method → what its paper claims."""


def report(results: Results) -> str:
    """The claims and three tables in Markdown; each figure is the median over seeds, with its range."""
    size = results["settings"]["size"]
    return "\n\n".join([
        "Losses are nats per byte, changes are from the base's loss.",
        markdown_table(["", "its paper's claim"], map(list, CLAIMS.items())),
        f"**Continued on a domain**, {size['steps']} steps, {100 * size['replay']:g} % replay, and merged back:",
        continued_table(results),
        "**Some modules trained**, with replay:",
        modules_table(results),
        "**Both domains' models merged**, those continued with replay:",
        merges_table(results),
    ])  # fmt: skip


def continued_table(results: Results) -> str:
    """A row for each way to continue; the change of the domain's and of the general loss, and what a merge took."""
    head = ["", *(f"{domain}, {of}" for domain in DOMAINS for of in ("domain", "general")), "trials", "CPU s"]
    rows = []
    for end, title in CONTINUED.items():
        row = [title]
        for domain in DOMAINS:
            row += [median_and_range(changes(results, f"{domain}{end}", of), "+.3f") for of in (domain, "general")]
        row += [f"{number:.0f}" for number in costs(results, [f"{domain}{end}" for domain in DOMAINS])]
        rows.append(row)
    return markdown_table(head, rows)


def modules_table(results: Results) -> str:
    """A row for each choice of modules; sizes are the median over seeds and domains, as they hardly vary."""
    domains = [f"{domain}, {of}" for domain in DOMAINS for of in ("domain", "general")]
    rows = []
    for end, title in MODULES.items():
        records = [record for record in results["parts"] if record["part"] in [f"{domain}{end}" for domain in DOMAINS]]
        sizes = [
            100 * statistics.median(record["trained"] / record["parameters"] for record in records),
            statistics.median(record["gradient_bytes"] for record in records) / 1e3,
            statistics.median(record["optimizer_bytes"] for record in records) / 1e3,
        ]
        seconds = values(results, "step_times", lambda record: record["step_seconds"])
        milliseconds = [1e3 * of_choice[end.removeprefix("_") or "all"] for of_choice in seconds]
        row = [title, *(f"{number:,.0f}" for number in sizes), median_and_range(milliseconds, ".0f")]
        for domain in DOMAINS:
            row += [median_and_range(changes(results, f"{domain}{end}", of), "+.3f") for of in (domain, "general")]
        rows.append(row)
    return markdown_table(["", "trained, %", "gradients, kB", "optimizer, kB", "CPU ms a step", *domains], rows)


def merges_table(results: Results) -> str:
    """A row for each merge; the loss of each domain, the sum, and what it took."""
    rows = []
    for part, title in MERGES.items():
        losses = [losses_of(results, part, name) for name in NAMES]
        rows.append(
            [title, *(median_and_range(each, ".3f") for each in losses), median_and_range(sums(results, part), ".3f")]
            + ([f"{number:.0f}" for number in costs(results, [part])] if part.startswith("merge_") else ["", ""])
        )
    return markdown_table(["", *NAMES, "sum", "trials or steps", "CPU s"], rows)


def sums(results: Results, part: str) -> list[float]:
    """The sum of the three losses, for each seed."""
    return values(results, part, lambda record: sum(record["losses"].values()))


def costs(results: Results, parts: list[str]) -> list[float]:
    """Median over seeds and parts of the trials (0 without any) and of the CPU seconds."""
    records = [record for record in results["parts"] if record["part"] in parts]
    return [statistics.median(record.get(name, 0) for record in records) for name in ("trials", "seconds")]


def draw(path: Path, results: Results) -> None:
    """Plot as SVG: for each domain what was learned over what was forgotten; and the sums of the merges.

    Points are medians over seeds, thin dots seeds.
    """

    def paint(figure: Any) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1.0))
        for column, domain in enumerate(DOMAINS):
            panel = figure.add_subplot(grid[0, column])
            _draw_domain(panel, results, domain)
            panel.set_title(f"{domain}: change of the loss, nats per byte", loc="left", fontsize=12)
        handles = panel.get_legend_handles_labels()
        _draw_sums(figure.add_subplot(grid[1, :]), results)
        figure.legend(*handles, loc="outside upper left", frameon=False, ncols=3)

    save_plot(path, (10.0, 9.0), paint)


AS_GOOD = 0.1
"""A share of what training everything learns: a difference of at most this much counts as equally good."""


def outcome(results: Results) -> str:
    """What came out of each claim."""
    text = f"{_merging_back(results)} {_some_modules(results)} {_learned_merges(results)} ({cost(results)})"
    return with_minus(text)


def _middle(results: Results, part: str, of: str) -> float:
    return statistics.median(changes(results, part, of))


def _verdict(*held: bool) -> str:
    """In words, from whether each part of a claim holds."""
    if all(held):
        return "agrees with the claim"
    return "agrees in part with the claim" if any(held) else "contradicts the claim"


def _merging_back(results: Results) -> str:
    sentences, verdicts = [], []
    for domain in DOMAINS:
        clauses = []
        for title, end in (("without replay", "_no_replay"), ("with replay", "")):
            part = f"{domain}{end}"
            learned, forgotten = _middle(results, part, domain), _middle(results, part, GENERAL)
            kept, left = _middle(results, f"{part}_back_ties", domain), _middle(results, f"{part}_back_ties", GENERAL)
            clauses.append(
                f"{title} its own loss changes by {learned:+.3f} and the general one by {forgotten:+.3f}, after "
                f"TIES by {kept:+.3f} and {left:+.3f}"
            )
            if end:
                verdicts.append(kept < 0 and left < max(forgotten / 2, 0.0))
        sentences.append(f"Continued on {domain}, {'; '.join(clauses)} nats per byte.")
    return f"{' '.join(sentences)} Without replay this {_verdict(*verdicts)} of SEC."


def _some_modules(results: Results) -> str:
    seconds = values(results, "step_times", lambda record: record["step_seconds"])
    saved = [1 - of["mp50"] / of["all"] for of in seconds]
    sentences, verdicts = [], []
    for domain in DOMAINS:
        learned = {end: -_middle(results, f"{domain}{end}", domain) for end in ("", "_mp50", "_script50", "_random50")}
        shares = {end: value / learned[""] for end, value in learned.items()}
        verdicts += [shares["_mp50"] >= 1 - AS_GOOD, shares["_mp50"] > shares["_random50"]]
        sentences.append(
            f"Of what training all modules learns on {domain}, half of them learn {shares['_mp50']:.1%} chosen by mp, "
            f"{shares['_script50']:.1%} by Spectrum's script and {shares['_random50']:.1%} at random."
        )
    return (
        f"{' '.join(sentences)} This {_verdict(*verdicts)} of Spectrum. A step takes "
        f"{median_and_range([100 * share for share in saved], '.0f')} % less CPU time."
    )


def _learned_merges(results: Results) -> str:
    titles = {"merge_soup": "the mean", "merge_ties": "TIES", "merge_cma_es": "CMA-ES", "merge_dam": "DAM"}
    middle = {part: statistics.median(sums(results, part)) for part in MERGES}
    seconds = {part: costs(results, [part])[1] for part in ("merge_cma_es", "merge_dam")}
    figures = ", ".join(f"{title} {middle[part]:.3f}" for part, title in titles.items())
    verdicts = [middle["merge_dam"] <= middle["merge_cma_es"], seconds["merge_dam"] < seconds["merge_cma_es"]]
    single = min(middle[domain] for domain in DOMAINS)
    competes = "no worse" if middle["merge_soup"] <= single else "worse"
    return (
        f"Sum of the three losses of the merged models, nats per byte: {figures}; DAM takes {seconds['merge_dam']:.0f} "
        f"CPU seconds and CMA-ES {seconds['merge_cma_es']:.0f}: this {_verdict(*verdicts)} of DAM. The mean is "
        f"{competes} than the better of the two models, {single:.3f}."
    )


SERIES = {
    "no replay (large), and merged back": ("o", ["_no_replay", *(f"_no_replay_back_{key}" for key in BACK)]),
    "replay (large), and merged back": ("s", ["", *(f"_back_{key}" for key in BACK)]),
    "50 % (large), 25 % of modules by mp": ("^", ["_mp50", "_mp25"]),
    "… by Spectrum's script": ("v", ["_script50", "_script25"]),
    "… at random": ("X", ["_random50", "_random25"]),
}
"""Points of a domain's panel: title → (marker, ends of the parts' names)."""


LABELS = {
    "mean": ("mean", (5, 3)),
    "ties": ("TIES", (-26, -3)),
    "alpha": ("α", (5, 5)),
    "parts": ("α by part", (5, -9)),
}
"""Way to merge back → its label, and where that stands from the point, in points of the font."""


def _draw_domain(panel: Any, results: Results, domain: str) -> None:
    for colour, (title, (marker, ends)) in zip(COLOURS, SERIES.items()):
        for number, end in enumerate(ends):
            general, own = (changes(results, f"{domain}{end}", of) for of in (GENERAL, domain))
            panel.plot(general, own, marker, color=colour, markersize=3, alpha=0.4)
            middle = statistics.median(general), statistics.median(own)
            label = None if number else title
            panel.plot(*middle, marker, color=colour, markersize=7 if number else 11, label=label)
            if end.rpartition("_back_")[1]:
                name, place = LABELS[end.rpartition("_")[2]]
                panel.annotate(name, middle, xytext=place, textcoords="offset points", fontsize=8)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.locator_params(axis="x", nbins=6)
    panel.set_xlabel("general text: forgotten →; small points: seeds")
    panel.set_ylabel("← learned: the domain's text")


def _draw_sums(panel: Any, results: Results) -> None:
    for row, part in enumerate(MERGES):
        numbers = sums(results, part)
        panel.plot(numbers, [row] * len(numbers), "o", color=COLOURS[0], markersize=4, alpha=0.5)
        panel.plot([statistics.median(numbers)], [row], "|", color=COLOURS[1], markersize=14, markeredgewidth=2)
    panel.set_yticks(range(len(MERGES)), MERGES.values())
    panel.invert_yaxis()
    panel.set_xlabel("sum of the three losses, nats per byte; dots: seeds, bar: median")
    panel.set_title("Merges of both domains' models", loc="left", fontsize=12)
