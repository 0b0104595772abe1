"""The collapse detector on expert counts chosen by hand, and restored after every step."""

import torch

from trinity.monitor.router_health import WINDOW, CollapseDetector


def test_a_climbing_layer_is_warned_about_once() -> None:
    collapse = CollapseDetector(factor=2, dead_steps=0)
    even = torch.tensor([[10, 10, 10, 10], [16, 8, 8, 8]])  # MaxVio 0 and 0.6
    skewed = torch.tensor([[10, 10, 10, 10], [29, 3, 4, 4]])  # and 1.9
    for _ in range(3 * WINDOW):
        assert collapse.update(even) == []
    warnings = [sentence for _ in range(3 * WINDOW) for sentence, _ in collapse.update(skewed)]
    assert warnings == ["MaxVio of MoE layer 1 has climbed to 1.25 from 0.60, over 20 steps"]
    for _ in range(3 * WINDOW):
        assert collapse.update(even) == []
    assert len([warning for _ in range(WINDOW) for warning in collapse.update(skewed)]) == 1


def test_a_restored_detector_gives_the_same_warnings() -> None:
    """One detector is restored after every step, the other never is."""
    generator = torch.Generator().manual_seed(2)
    whole, warned = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2), 0
    parts = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2)
    for step in range(120):
        counts_ME = torch.randint(0, 40 + step * (step % 50 > 25), (3, 5), generator=generator)
        counts_ME[1] *= torch.tensor([step % 11 < 5, 1, 1, 1, 1])
        state = parts.state(3, 5)
        parts = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2)
        parts.restore(state)
        warnings = whole.update(counts_ME)
        assert parts.update(counts_ME) == warnings
        warned += len(warnings)
    assert warned > 5
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in CollapseDetector(2, 1).state(3, 5).items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in parts.state(3, 5).items()
    }


def test_dead_experts_are_named() -> None:
    collapse = CollapseDetector(factor=0, dead_steps=3)
    alive, dead = torch.tensor([[1, 1, 1], [1, 1, 1]]), torch.tensor([[1, 1, 1], [3, 0, 0]])
    looks = [alive, dead, dead, alive, dead, dead, dead, dead]
    results = [collapse.update(counts) for counts in looks]
    assert [bool(warnings) for warnings in results] == [False] * 6 + [True, False]
    assert results[6][0][0] == "MoE layer 1 has 2 experts without a token for 3 steps: [1, 2]"


def test_layers_are_numbered_as_in_the_model() -> None:
    """Two dense layers come first: the second router is that of layer 3."""
    warnings = CollapseDetector(0, dead_steps=1, first_layer=2).update(torch.tensor([[1, 1], [2, 0]]))
    assert warnings == [("MoE layer 3 has 1 experts without a token for 1 steps: [1]", {"layer": 3, "dead": 1})]
