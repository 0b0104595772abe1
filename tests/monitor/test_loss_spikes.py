"""The spike detector against its rule, written out with the standard library."""

import math
import statistics

import torch

from trinity.monitor.loss_spikes import CAPACITY, SpikeDetector


def test_spikes_follow_the_rule() -> None:
    """Mean and standard deviation of the last ordinary steps come from the statistics module."""
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(400, generator=generator, dtype=torch.float64) + 5).tolist()
    for at in (20, 31, 150, 151, 399):
        values[at] += 6
    spikes, past, detected = SpikeDetector(window=40, sigma=4), [], []
    for step, loss in enumerate(values):
        spiked = spikes.detect(loss, 1.0) is not None
        last = past[-40:]
        expected = len(last) >= 20 and loss > statistics.fmean(last) + 4 * statistics.pstdev(last)
        assert spiked == expected, step
        detected += [step] if spiked else []
        past += [] if spiked else [loss]
    assert {20, 31, 150, 151, 399} <= set(detected)


def test_a_spike_of_the_gradient_norm() -> None:
    spikes = SpikeDetector(window=8, sigma=3)
    for step in range(8):
        assert spikes.detect(2.0, 1 + 0.01 * (step % 2)) is None
    assert spikes.detect(2.0, 1.5) == "gradient norm 1.5 stands 99.0 standard deviations above the mean 1.005"
    assert spikes.detect(2.1, 1.0) == "loss 2.1 stands any number of standard deviations above the mean 2"


def test_state_is_restored() -> None:
    one, other, shorter = SpikeDetector(20, 3), SpikeDetector(20, 3), SpikeDetector(5, 3)
    for step in range(33):
        one.detect(5 + math.sin(step), 1 + 0.1 * math.cos(step))
    assert one.state().shape == (2, CAPACITY)
    other.restore(one.state())
    assert torch.equal(other.state(), one.state())
    for step in range(33, 60):
        assert one.detect(5 + 3 * math.sin(step), 1) == other.detect(5 + 3 * math.sin(step), 1)
    shorter.restore(one.state())
    assert torch.equal(shorter.state()[:, -5:], one.state()[:, -5:])
    assert shorter.state().isinf().sum() == 2 * (CAPACITY - 5)
