"""Few rows of experts without gradients, and one token: the same as expert_mlp.

Shapes: D width, E experts, F expert width, K active experts.
"""

import pytest
import torch
from torch import Tensor

import trinity_kernels as ops
from trinity_kernels import experts_cpu
from trinity_kernels.experts import _forward

D, E, F, K = 48, 7, 24, 2


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remote", [0.0, 0.4, 1.0], ids=["all local", "some remote", "none local"])
@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("with_plus", [True, False])
def test_few_rows_of_experts(
    dtype: torch.dtype, remote: float, tokens: int, with_plus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients, as expert_mlp on one thread, in fp32 bit for bit; in no_grad as well as in inference mode."""
    x_TD, plus_TD = random(tokens, D, dtype=dtype), random(tokens, D, dtype=dtype) if with_plus else None
    w1_E2FD, w2_EDF = random(E, 2, F, D, dtype=dtype), random(E, D, F, dtype=dtype)
    indices_TK = random(tokens, E).argsort(dim=1)[:, :K]
    indices_TK = indices_TK.masked_fill(random(tokens, K).abs() < torch.erfinv(torch.tensor(remote)) * 2**0.5, -1)
    s_TK, rows = random(tokens, K).sigmoid(), (indices_TK >= 0).sum().item()
    expected = _forward(x_TD, w1_E2FD.flatten(1, 2), w2_EDF, indices_TK, s_TK, rows, plus_TD)[0]
    ran = []
    few = experts_cpu.forward_few_rows
    monkeypatch.setattr(experts_cpu, "forward_few_rows", lambda *a: (ran.append(1), few(*a))[1])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = ops.expert_mlp(x_TD, w1_E2FD, w2_EDF, indices_TK, s_TK, rows, plus_TD=plus_TD)
        assert got.dtype == dtype
        if dtype == torch.bfloat16:  # expert_mlp pads the rows, which the products sum in another order; rounded twice
            assert (got - expected).norm() <= 2**-7 * expected.norm()
        else:
            assert torch.equal(got, expected)
    assert ran == [1, 1]


def test_many_rows_and_gradients_take_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more than the limit, and one token with gradients."""
    monkeypatch.setattr(experts_cpu, "forward_few_rows", None)
    w1_E2FD, w2_EDF = random(E, 2, F, D), random(E, D, F)
    many = experts_cpu.FEW_ROWS + 1
    for mode, tokens in ((torch.no_grad(), many), (torch.enable_grad(), 1)):
        x_TD, indices_T1 = random(tokens, D), torch.zeros(tokens, 1, dtype=torch.int64)
        with mode:
            assert ops.expert_mlp(x_TD, w1_E2FD, w2_EDF, indices_T1, torch.ones(tokens, 1)).shape == (tokens, D)


def test_one_token() -> None:
    """Against expert_mlp in float64; fp32 rounds sums of 48 terms."""
    x_1D, plus_1D, w1_E2FD, w2_EDF = random(1, D), random(1, D), random(E, 2, F, D), random(E, D, F)
    indices_1K, s_1K = torch.tensor([[4, 1]]), torch.tensor([[0.7, 1.9]])
    got = experts_cpu.forward_one_token(x_1D, w1_E2FD, w2_EDF, indices_1K, s_1K, plus_1D)
    wide = [tensor.double() for tensor in (x_1D, w1_E2FD, w2_EDF)]
    exact = ops.expert_mlp(*wide, indices_1K, s_1K.double(), plus_TD=plus_1D.double())
    assert ((got - exact).norm() / exact.norm()).item() < 1e-6
