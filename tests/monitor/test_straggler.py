"""The straggler detector on attention times chosen by hand."""

from trinity.monitor.straggler import PATIENCE, StragglerDetector


def test_stragglers_are_named() -> None:
    """Three probes in a row at twice the median's time: one warning, and another only after the rank recovered."""
    detector, even, slow = StragglerDetector(1.5), [1.0, 1.1, 0.9, 1.0], [1.0, 2.0, 0.9, 1.0]
    probes = (slow, slow, even, slow, slow, slow, slow, even, *[slow] * PATIENCE)
    warnings = [detector.update(seconds) for seconds in probes]
    assert [bool(of_probe) for of_probe in warnings] == [False] * 5 + [True, False, False] + [False, False, True]
    message, fields = warnings[5][0]
    assert message == "rank 1 has been slow in 3 probes: attention takes 2.0 times as long on it as on the median rank"
    assert fields == {"slow_rank": 1, "ratio": 2.0}
    assert StragglerDetector(0).update([1.0, 9.0]) == []
