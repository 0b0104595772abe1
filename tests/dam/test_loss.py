"""The distance between logits and the penalties, with their equations in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from trinity.dam.config import DamConfig, SourceModel
from trinity.dam.loss import penalty, tempered_kl

CONFIG = DamConfig([SourceModel("a")], similarity=0.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl(temperature: float) -> None:
    """torch's KL divergence of two softmaxes, and gradcheck."""
    merged, teacher = random(5, 11), random(5, 11, seed=1).detach()
    log_p, log_q = (F.log_softmax(z / temperature, dim=-1) for z in (teacher, merged))
    expected = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    torch.testing.assert_close(tempered_kl(merged, teacher, temperature), expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: tempered_kl(z, teacher, temperature), (merged,))


def test_equal_logits_have_no_gradient() -> None:
    """Exactly 0, in fp32 too: AdamW would make a whole step of rounding errors."""
    merged = random(5, 300).float().detach().requires_grad_()
    value = tempered_kl(merged, merged.detach().clone(), 2.0)
    value.sum().backward()
    assert value.abs().max() == 0
    assert merged.grad.abs().max() == 0


def test_penalties() -> None:
    """The docstring's means, matrix by matrix."""
    parts = [random(2, 3, 7), random(4, 3, 7, seed=1)]
    matrices = [matrix for part in parts for matrix in part]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = {
        "l1": [m.abs().mean() for m in matrices],
        "l2": [(m * m).mean() for m in matrices],
        "overlap": [sum((m[a] * m[b]).abs().mean() for a, b in pairs) / 3 for m in matrices],
        "similarity": [sum(m[a] @ m[b] / (m[a].norm() * m[b].norm()) for a, b in pairs) / 3 for m in matrices],
    }
    for name, values in expected.items():
        found = penalty(parts, replace(CONFIG, **{name: 0.3}), 6)
        torch.testing.assert_close(found, 0.3 * sum(values) / 6, rtol=1e-12, atol=0)
    assert float(penalty(parts, CONFIG, 6)) == 0
    one_number = [random(2, 3, 1)]
    assert float(penalty(one_number, replace(CONFIG, similarity=1.0), 2)) == 0
