"""Preflight: outliers among made-up measurements, pairs of neighbours, and a run on three nodes."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.launch.local_nodes import free_port, start
from trinity.parallel.preflight import neighbour_pairs
from trinity.parallel.preflight_report import VERSIONS, Outlier, Report, find_outliers, mismatches, sentence, table


def report(rank: int, **different: Any) -> Report:
    """A healthy rank of eight on two nodes."""
    healthy = dict.fromkeys(VERSIONS, "1.0")
    healthy |= {"rank": rank, "node": rank // 4, "local_rank": rank % 4, "host": f"host{rank // 4}"}
    healthy |= {
        "gemm": 700.0,
        "copy": 4000.0,
        "node_bus": 400.0,
        "pair_bus": 90.0,
        "all_bus": 80.0,
        "all_algorithm": 50.0,
    }
    return healthy | different


def ranks(**different: dict[int, Any]) -> list[Report]:
    """Eight ranks; gemm={3: 600.0} makes rank 3 differ."""
    return [report(rank, **{key: of[rank] for key, of in different.items() if rank in of}) for rank in range(8)]


@pytest.mark.parametrize(
    ("different", "expected"),
    [
        ({}, []),
        ({"gemm": {5: 629.0}}, [Outlier("host1", 1, "gemm", 629.0, 700.0)]),
        ({"gemm": {5: 631.0}}, []),  # within a tenth
        ({"gemm": {5: 900.0}}, []),  # fast is no outlier
        (
            {"gemm": {2: 600.0, 3: 500.0}, "copy": {0: 1.0}},
            [
                Outlier("host0", 3, "gemm", 500.0, 700.0),
                Outlier("host0", 2, "gemm", 600.0, 700.0),
                Outlier("host0", 0, "copy", 1.0, 4000.0),
            ],
        ),
        # all ranks of a node have its bandwidth; the node is named once; the median of 400 and 300 is 350
        ({"node_bus": dict.fromkeys(range(4, 8), 300.0)}, [Outlier("host1", None, "node_bus", 300.0, 350.0)]),
        ({"node_bus": dict.fromkeys(range(8)), "pair_bus": dict.fromkeys(range(8))}, []),  # None: one rank, one node
        ({"all_bus": {7: 1.0}}, []),  # a measurement of all ranks
    ],
)
def test_outliers(different: dict, expected: list[Outlier]) -> None:
    """More than 10 % below the median of a measurement."""
    assert find_outliers(ranks(**different), 0.1) == expected


def test_threshold() -> None:
    """A fraction of the median; at 1 nothing is an outlier."""
    slow = ranks(gemm={1: 350.0})
    assert [one.local_rank for one in find_outliers(slow, 0.49)] == [1]
    assert find_outliers(slow, 0.51) == find_outliers(ranks(gemm={1: 0.0}), 1.0) == []


def test_sentences() -> None:
    """Host, local rank, measurement, unit, how far below."""
    assert sentence(Outlier("a", 3, "gemm", 560.0, 700.0)) == (
        "slow: a local rank 3: gemm 560 TFLOP/s, 20% below the median 700"
    )
    assert sentence(Outlier("b", None, "pair_bus", 45.0, 90.0)) == "slow: b: pair_bus 45 GB/s, 50% below the median 90"


@pytest.mark.parametrize("fact", ["python", "torch", "triton", "cuda", "nccl", "driver", "device"])
def test_mismatches(fact: str) -> None:
    """The ranks that differ from most are named."""
    assert mismatches(ranks()) == []
    assert mismatches(ranks(**{fact: {2: "0.9", 7: "0.9", 4: None}})) == [
        f"{fact} is 0.9 on host0 local rank 2, host1 local rank 3; 1.0 on 5 ranks",
        f"{fact} is None on host1 local rank 0; 1.0 on 5 ranks",
    ]


def test_table() -> None:
    """One line per rank, with its measurements."""
    lines = table(ranks(gemm={6: 123.0}, pair_bus={6: None})).splitlines()
    assert lines[2 + 6].split() == ["host1", "6", "2", "123", "4000", "400", "-"]
    assert lines[-1] == "all-reduce among all 8 ranks: 50 GB/s algorithm, 80 GB/s bus bandwidth"


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8, 255, 256])
def test_neighbour_pairs(nodes: int) -> None:
    """Every pair of neighbours on the ring once; no node twice in a round, or two all-reduces would deadlock."""
    rounds = neighbour_pairs(nodes)
    ring = {frozenset(pair) for pair in [*pairwise(range(nodes)), (nodes - 1, 0)] if pair[0] != pair[1]}
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert set(pairs) == ring
    assert len(pairs) == len(ring)
    for pairs in rounds:
        nodes_of_round = [node for pair in pairs for node in pair]
        assert len(nodes_of_round) == len(set(nodes_of_round))


def test_three_nodes_measure_one_another(run: Path) -> None:
    """Three launch/node.py with the real torchrun over c10d, one process each: three pairs, no link within a node."""
    report_file = run / "report.json"
    command = ["tools/preflight.py", "--quick", "--threshold", "100", "--json", str(report_file)]
    options = ["--nodes=3", f"--port={free_port()}"]
    launchers = [start(run, command, *options, index=index) for index in (2, 1, 0)]
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0, 0], outputs
    written = json.loads(report_file.read_text())
    assert [(of["rank"], of["node"], of["local_rank"]) for of in written["ranks"]] == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]
    for of in written["ranks"]:
        assert min(of["gemm"], of["copy"], of["pair_bus"]) > 0
        assert of["node_bus"] is None
        assert of["all_bus"] == of["all_algorithm"] * (2 * 2 / 3) > 0
    assert written["odd"] == written["mismatches"] == []
    assert written["threshold"] == 1.0
    assert "".join(outputs).count("no rank and no node stands out") == 1


def test_wrong_arguments_are_refused(run_command: Callable) -> None:
    """One sentence and exit code 2, before any process group."""
    for words, expected in (
        (["--threshold", "0"], "--threshold 0 is not a percentage; write one in (0, 100]"),
        (["--copy-mib", "-1"], "--copy-mib -1 must be above 0"),
    ):
        ended = run_command("tools/preflight.py", *words)
        assert (ended.code, ended.errors) == (2, f"error: {expected}\n")
