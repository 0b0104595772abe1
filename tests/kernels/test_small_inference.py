"""Few tokens in inference mode: each operation gives what it gives elsewhere, by fewer calls.

Shapes: T tokens, D width, H heads, C head width, E experts, F expert width, K active experts.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import trinity_kernels as ops
from trinity_kernels import experts_cpu, op
from trinity_kernels.experts import _forward

EPS = 1e-5
T, D, H, C, E, F, K = 5, 48, 3, 16, 7, 24, 2
# fp32: a few roundings of 2⁻²⁴ and sums of 48 squares; bf16: a last bit, 2⁻⁸, where fp32 rounds to the other side
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def calls(dtype: torch.dtype, tokens: int = T) -> dict[str, Callable[[], object]]:
    """Each operation with a small path, on inputs of that dtype; gains, angles and scores in fp32 or float64."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = random(tokens, D, dtype=dtype), random(tokens, D + 1, dtype=dtype)[:, :D]
    gain, post_gain, head_gain = (1 + 0.3 * random(n, dtype=precise) for n in (D, D, C))
    heads = random(tokens, 1, H, C, dtype=dtype)
    angles = random(tokens, 1, 1, C // 2, dtype=precise)
    scores, bias = random(tokens, E, dtype=precise).sigmoid(), random(E)
    return {
        "rms_norm": lambda: ops.rms_norm(x, gain, EPS),
        "norm_add": lambda: ops.norm_add(y, x, gain, EPS),
        "add_norm": lambda: ops.add_norm(y, x, post_gain, gain, EPS),
        "qk_norm": lambda: ops.qk_norm(heads, head_gain, EPS, (angles.cos(), angles.sin())),
        "qk_norm without angles": lambda: ops.qk_norm(heads, head_gain, EPS),
        "swiglu": lambda: ops.swiglu(x),
        "sigmoid_gate": lambda: ops.sigmoid_gate(x, y),
        "route": lambda: ops.route(scores, bias, K),
    }


def both(call: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """(result in inference mode, result elsewhere) of each tensor that the call returns."""
    with torch.inference_mode():
        inside = call()
    outside = call()
    pairs = [(inside, outside)] if isinstance(inside, Tensor) else list(zip(inside, outside))
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    return pairs


@pytest.mark.parametrize("name", list(calls(torch.float32)))
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_the_same_within_rounding(name: str, dtype: torch.dtype) -> None:
    for inside, outside in both(calls(dtype)[name]):
        assert ((inside - outside).double().abs() <= BOUNDS[dtype] * outside.double().abs().clamp_min(1)).all()


@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_the_same_bits_in_float64_and_for_many_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (calls(torch.float64)[name], calls(torch.float32, 1 + op.SMALL // E)[name]):
        assert all(torch.equal(inside, outside) for inside, outside in both(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remote", [0.0, 0.4, 1.0], ids=["all local", "some remote", "none local"])
@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("with_plus", [True, False])
def test_few_rows_of_experts_give_the_same_bits(
    dtype: torch.dtype, remote: float, tokens: int, with_plus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients, as expert_mlp on one thread; in no_grad as well as in inference mode."""
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
