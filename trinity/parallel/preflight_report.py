"""The measurements of a preflight, and outliers: measurements far below the median, and versions that differ.

    gemm   n × n matrix products (bf16 on a GPU, fp32 on a CPU), 2n³ operations each, in TFLOP/s
    copy   a tensor copied within the device's memory; bytes read + bytes written, in GB/s
    node   all-reduce over the ranks of a node
    pair   all-reduce over the ranks of two neighbouring nodes, all pairs at once, each node with both its neighbours;
           the better of the two counts, so that a slow node stands out and its neighbours do not
    all    all-reduce over all ranks

For an all-reduce of S bytes over n ranks that takes t seconds, the algorithm bandwidth is S/t, and the bus bandwidth is
S/t · 2(n-1)/n: the bytes that every rank must send and receive with any algorithm. Only the bus bandwidth can be
compared with the speed of a link, and between groups of different sizes. 1 GB is 10⁹ bytes.

Pure functions of the ranks' reports, which `preflight.py` collects.
"""

import statistics
from collections import defaultdict
from typing import Any, NamedTuple

RANK_FIGURES = {"gemm": "TFLOP/s", "copy": "GB/s"}
"""Measurements of each rank, with their units."""
NODE_FIGURES = {"node_bus": "GB/s", "pair_bus": "GB/s"}
"""Measurements that the ranks of a node share (bus bandwidths), with their units."""
VERSIONS = ("python", "torch", "triton", "cuda", "nccl", "driver", "device")

Report = dict[str, Any]
"""Report of one rank: rank, node, local_rank and host; its VERSIONS; and its measurements (None: no link)."""


class Outlier(NamedTuple):
    """A slow rank, or (local_rank None) a slow node: name and value of the measurement, and the median over all."""

    host: str
    local_rank: int | None
    figure: str
    value: float
    median: float


def find_outliers(reports: list[Report], threshold: float) -> list[Outlier]:
    """Ranks and nodes more than `threshold` (a fraction) below the median of a measurement, slowest first in each."""
    outliers = []
    for figure in (*RANK_FIGURES, *NODE_FIGURES):
        by_rank = figure in RANK_FIGURES
        measured = [r for r in reports if r[figure] is not None and (by_rank or r["local_rank"] == 0)]
        if not measured:
            continue
        median = statistics.median(report[figure] for report in measured)
        slow = [report for report in measured if report[figure] < (1 - threshold) * median]
        for report in sorted(slow, key=lambda report: report[figure]):
            local_rank = report["local_rank"] if by_rank else None
            outliers.append(Outlier(report["host"], local_rank, figure, report[figure], median))
    return outliers


def mismatches(reports: list[Report]) -> list[str]:
    """A sentence for each version that is not the same on all ranks, naming the ranks that differ from most."""
    sentences = []
    for version in VERSIONS:
        ranks = defaultdict(list)
        for report in reports:
            ranks[report[version]].append(f"{report['host']} local rank {report['local_rank']}")
        usual = max(ranks, key=lambda value: len(ranks[value]))
        for value in ranks:
            if value != usual:
                different = ", ".join(ranks[value])
                sentences.append(f"{version} is {value} on {different}; {usual} on {len(ranks[usual])} ranks")
    return sentences


def table(reports: list[Report]) -> str:
    """One line per rank, then the all-reduce over all ranks."""
    lines = [f"{'host':<24} {'rank':>5} {'local':>5} {'gemm':>9} {'copy':>9} {'node':>9} {'pair':>9}"]
    lines.append(f"{'':<24} {'':>5} {'':>5} {'TFLOP/s':>9} {'GB/s':>9} {'bus GB/s':>9} {'bus GB/s':>9}")
    for report in reports:
        cells = " ".join(f"{_format(report[figure]):>9}" for figure in (*RANK_FIGURES, *NODE_FIGURES))
        lines.append(f"{report['host']:<24} {report['rank']:>5} {report['local_rank']:>5} {cells}")
    first = reports[0]
    if first["all_bus"] is not None:
        bandwidths = f"{_format(first['all_algorithm'])} GB/s algorithm, {_format(first['all_bus'])} GB/s bus"
        lines.append(f"all-reduce among all {len(reports)} ranks: {bandwidths} bandwidth")
    return "\n".join(lines)


def sentence(outlier: Outlier) -> str:
    """One line for the terminal: which rank or node is slow, and by how much."""
    who = outlier.host if outlier.local_rank is None else f"{outlier.host} local rank {outlier.local_rank}"
    unit = (RANK_FIGURES | NODE_FIGURES)[outlier.figure]
    less = 1 - outlier.value / outlier.median
    value, median = _format(outlier.value), _format(outlier.median)
    return f"slow: {who}: {outlier.figure} {value} {unit}, {less:.0%} below the median {median}"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
