"""Counts of experts: those of the model's own forward passes over the rows without their padding."""

import pytest
import torch

from tests.interop.small_model import CONFIG, make_model
from trinity.balancing import dead_share, max_violation
from trinity.evaluation.expert_load import ExpertLoad, up_to_last_target
from trinity_kernels.cross_entropy import IGNORE


def test_padding_is_not_counted() -> None:
    """Rows of 5, 3 and 7 targets, each padded to 7, against each row alone: attention is causal."""
    model, lengths = make_model(), (5, 3, 7)
    tokens_BS = torch.randint(CONFIG.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    targets_BS = torch.full_like(tokens_BS, IGNORE)
    for row, length in enumerate(lengths):
        targets_BS[row, :length] = tokens_BS[row, :length]
    targets_BS[0, 1] = IGNORE  # a hole is no padding
    with ExpertLoad(model) as load, torch.no_grad():
        model(tokens_BS[:2], targets_BS=targets_BS[:2])
        model(tokens_BS[2:], targets_BS=targets_BS[2:])
    alone = [model(row[None, :n], targets_BS=row[None, :n]).counts_ME for row, n in zip(tokens_BS, lengths)]
    assert torch.equal(load.counts_ME, sum(alone))
    assert load.counts_ME.sum(dim=1).tolist() == [sum(lengths) * CONFIG.active_experts] * 3
    metrics = load.metrics()
    assert metrics["max_violation"] == max_violation(sum(alone)).max().item()
    assert metrics["max_violation_mean"] == pytest.approx(max_violation(sum(alone)).mean().item(), rel=1e-15)
    assert metrics["dead_experts"] == dead_share(sum(alone)).mean().item()
    model(tokens_BS, targets_BS=targets_BS)  # the hooks are gone
    assert load.metrics() == metrics


def test_dense_model_has_no_figures() -> None:
    model = make_model(dense_layers=5)
    with ExpertLoad(model) as load:
        model(torch.zeros(1, 3, dtype=torch.int64), targets_BS=torch.zeros(1, 3, dtype=torch.int64))
    assert load.metrics() == {}


def test_up_to_last_target() -> None:
    targets_BS = torch.tensor([[1, IGNORE, 2, IGNORE], [IGNORE] * 4, [IGNORE, IGNORE, IGNORE, 0]])
    expected = [[True, True, True, False], [False] * 4, [True] * 4]
    assert up_to_last_target(targets_BS).tolist() == expected
