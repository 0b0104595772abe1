"""BatchHet by hand, and the copy of a step's statistics to the host."""

import pytest
import torch

from trinity.training.step_metrics import HostCopy, StepStats, batch_heterogeneity


def test_batch_heterogeneity_by_hand() -> None:
    """Groups of two rows: losses 1.5 and 4, mean 2.75; a row without valid targets counts nothing."""
    ce = torch.tensor([2.0, 4.0, 12.0, 0.0], dtype=torch.float64)
    valid = torch.tensor([2, 2, 3, 0])
    assert batch_heterogeneity(ce, valid, 2) == pytest.approx(4 - 2.75)


def test_a_host_copy_holds_what_was_copied() -> None:
    """Shapes and values, integers exactly, as they were when the copy was made; None stays None."""
    stats = StepStats(
        ce_RB=torch.tensor([[1.5, -2.0]]),
        valid_RB=torch.tensor([[2**52 + 1, 3]]),
        sums_R3=torch.zeros(1, 3),
        top_logit_R1=torch.ones(1, 1),
        entropy_RM=None,
        source_counts_RN=None,
        grad_norm=torch.tensor(0.1),
        counts_ME=torch.tensor([[4, 5], [6, 7]]),
    )
    host_copy = HostCopy(stats)
    stats.ce_RB.zero_()
    copied = host_copy.wait()
    assert copied.ce_RB.tolist() == [[1.5, -2.0]]
    assert copied.valid_RB.tolist() == [[2**52 + 1, 3]]
    assert copied.grad_norm.item() == torch.tensor(0.1).item()
    assert copied.counts_ME.tolist() == [[4, 5], [6, 7]]
    assert (copied.entropy_RM, copied.source_counts_RN, copied.bias_ranges) == (None, None, None)
