"""The figures of a preflight, and who stands out: by one far below the median, or by another version of something.

    gemm   n × n matrix products (bf16 on a GPU, fp32 on a CPU), 2n³ operations each, in TFLOP/s
    copy   a tensor copied within the device's memory; bytes read + bytes written, in GB/s
    node   all-reduce among the ranks of a node
    pair   all-reduce among the ranks of two neighbouring nodes, all pairs at once, each node with both its neighbours;
           the better of the two counts, so that a slow node shows and the two beside it do not
    all    all-reduce among all ranks

Of an all-reduce of S bytes among n ranks that takes t seconds, the algorithm bandwidth is S/t, and the bus bandwidth is
S/t · 2(n-1)/n: what every rank must at least send, and receive, however clever the algorithm. Only the second compares
with the speed of a link, and between groups of different sizes. 1 GB is 10⁹ bytes.

Pure functions of the ranks' reports, which `preflight.py` makes.
"""

import statistics
from collections import defaultdict
from typing import Any, NamedTuple

OF_A_RANK = {"gemm": "TFLOP/s", "copy": "GB/s"}
"""Figures that each rank has of its own, with their unit."""
OF_A_NODE = {"node_bus": "GB/s", "pair_bus": "GB/s"}
"""Figures that the ranks of a node share: bus bandwidths."""
MUST_AGREE = ("python", "torch", "triton", "cuda", "nccl", "driver", "device")

Report = dict[str, Any]
"""What one rank found: its place (rank, node, local_rank, host), what must agree, and its figures (None: no link)."""


class Outlier(NamedTuple):
    """A rank (or, local_rank None, a node) that is slow: its figure's name and value, and the median of all."""

    host: str
    local_rank: int | None
    figure: str
    value: float
    median: float


def find_outliers(reports: list[Report], threshold: float) -> list[Outlier]:
    """Who is more than `threshold`, a fraction, below the median of a figure; the slowest first in each figure."""
    odd = []
    for figure in (*OF_A_RANK, *OF_A_NODE):
        by_rank = figure in OF_A_RANK
        measured = [r for r in reports if r[figure] is not None and (by_rank or r["local_rank"] == 0)]
        if not measured:
            continue
        median = statistics.median(report[figure] for report in measured)
        slow = [report for report in measured if report[figure] < (1 - threshold) * median]
        for report in sorted(slow, key=lambda report: report[figure]):
            local_rank = report["local_rank"] if by_rank else None
            odd.append(Outlier(report["host"], local_rank, figure, report[figure], median))
    return odd


def mismatches(reports: list[Report]) -> list[str]:
    """A sentence for each fact that is not the same on all ranks, naming those that differ from most."""
    sentences = []
    for fact in MUST_AGREE:
        ranks = defaultdict(list)
        for report in reports:
            ranks[report[fact]].append(f"{report['host']} local rank {report['local_rank']}")
        usual = max(ranks, key=lambda value: len(ranks[value]))
        for value in ranks:
            if value != usual:
                others = ", ".join(ranks[value])
                sentences.append(f"{fact} is {value} on {others}; {usual} on {len(ranks[usual])} ranks")
    return sentences


def table(reports: list[Report]) -> str:
    """A line a rank; then the all-reduce among all."""
    lines = [f"{'host':<24} {'rank':>5} {'local':>5} {'gemm':>9} {'copy':>9} {'node':>9} {'pair':>9}"]
    lines.append(f"{'':<24} {'':>5} {'':>5} {'TFLOP/s':>9} {'GB/s':>9} {'bus GB/s':>9} {'bus GB/s':>9}")
    for report in reports:
        cells = " ".join(f"{_shown(report[figure]):>9}" for figure in (*OF_A_RANK, *OF_A_NODE))
        lines.append(f"{report['host']:<24} {report['rank']:>5} {report['local_rank']:>5} {cells}")
    first = reports[0]
    if first["all_bus"] is not None:
        bandwidths = f"{_shown(first['all_algorithm'])} GB/s algorithm, {_shown(first['all_bus'])} GB/s bus"
        lines.append(f"all-reduce among all {len(reports)} ranks: {bandwidths} bandwidth")
    return "\n".join(lines)


def sentence(odd: Outlier) -> str:
    """Who is slow, by how much."""
    who = odd.host if odd.local_rank is None else f"{odd.host} local rank {odd.local_rank}"
    unit = (OF_A_RANK | OF_A_NODE)[odd.figure]
    less = 1 - odd.value / odd.median
    return f"slow: {who}: {odd.figure} {_shown(odd.value)} {unit}, {less:.0%} below the median {_shown(odd.median)}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
