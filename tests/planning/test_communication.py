"""Seconds of collectives, by hand from sizes and link rates."""

import pytest

from trinity.hardware import GPU
from trinity.planning.communication import Flow, flow_seconds

CARD = GPU(bf16=1.0, fp32=1.0, memory=1.0, bandwidth=1.0, node_link=80.0, network=8.0)


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "expected"),
    [
        # 1600 bytes in groups of n: each rank gets (n − 1)/n of them
        ("all_gather", 8, 1, 1400 / 80),  # inside a node
        ("reduce_scatter", 4, 2, 1200 / 80),
        ("all_gather", 16, 1, 1500 / 64),  # all eight of a node: eight cards
        ("reduce_scatter", 16, 4, 1500 / 16),  # two of a node
        ("all_gather", 16, 8, 1500 / 8),  # one
        ("all_gather", 2, 128, 800 / 8),
        ("all_reduce", 16, 128, 2 * 1500 / 8),  # there and back
        ("all_to_all", 8, 1, 1400 / 80),
        # to seven in the node 100 each over NVLink, to eight others 100 each over the network, at the same time
        ("all_to_all", 16, 1, 800 / 8),
        ("all_to_all", 9, 1, 7 * 1600 / 9 / 80),
    ],
)
def test_seconds(kind: str, ranks: int, stride: int, expected: float) -> None:
    """At half of each rate."""
    card = CARD._replace(network=80.0) if (kind, ranks) == ("all_to_all", 9) else CARD
    flow = Flow("passes", "any", kind, "shard", ranks, stride, 7, 1600)
    assert flow_seconds(flow, card, achieved=0.5) == pytest.approx(2 * expected, rel=1e-12)


def test_node_link_is_the_limit() -> None:
    """Eight fast network cards deliver more than NVLink carries."""
    flow = Flow("passes", "any", "all_gather", "shard", 16, 1, 1, 1600)
    assert flow_seconds(flow, CARD._replace(network=50.0), achieved=1.0) == pytest.approx(1500 / 80, rel=1e-12)
