"""The attention sublayer against loops over heads, tokens and visible tokens in float64.

Shapes: B batch, S sequence, D width, H query heads, G key/value heads, C head width.
"""

import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.models.attention import Attention, rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity_kernels import split
from trinity_kernels.qk_norm import rotate

LOCAL, GLOBAL = 0, 3  # layers
S = 12


def make(config: ModelConfig, layer: int) -> Attention:
    """A float64 sublayer of random weights, gains away from 1."""
    torch.manual_seed(layer)
    attention = Attention(config, layer).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def run(attention: Attention, x_BSD: Tensor, positions_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    rotation = rope_cos_sin(positions_BS, attention.head_dim, 100.0, torch.float64)
    return attention(x_BSD, rotation, AttentionMask(positions_BS, documents_BS, engine="sdpa"))


def normed(x: list[float], gain: list[float]) -> list[float]:
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)
    return [v * scale * g for v, g in zip(x, gain)]


def rotated(x: list[float], position: int) -> list[float]:
    """RoPE as complex numbers: (x_i, x_{i+C/2}) times e^{i·position·θ^(−2i/C)}."""
    half = len(x) // 2
    angles = [position * 100.0 ** (-2 * i / len(x)) for i in range(half)]
    pairs = [complex(x[i], x[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


def plain(attention: Attention, x_SD: Tensor, local: bool, window: int, documents: list[int]) -> Tensor:
    """Eq. 9-14 for one row, positions 0…S−1; the weight's rows are q, k, v and gate."""
    heads, kv_heads, C = attention.heads, attention.kv_heads, attention.head_dim
    weight = attention.qkvg.weight
    q, k, v, gate = (x_SD @ part.t() for part in weight.split([heads * C, kv_heads * C, kv_heads * C, heads * C]))
    q_gain, k_gain = attention.q_norm.gain.tolist(), attention.k_norm.gain.tolist()
    rows = []
    for t in range(len(x_SD)):
        mixed: list[float] = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = normed(q[t, h * C : (h + 1) * C].tolist(), q_gain)
            query = rotated(query, t) if local else query
            first = max(1, (t + 1) - window + 1) - 1 if local else 0  # the rule counts from 1, Python from 0
            visible = [u for u in range(first, t + 1) if documents[u] == documents[t]]
            weights, values = [], []
            for u in visible:
                key = normed(k[u, g * C : (g + 1) * C].tolist(), k_gain)
                key = rotated(key, u) if local else key
                weights.append(math.exp(sum(a * b for a, b in zip(query, key)) / math.sqrt(C)))
                values.append(v[u, g * C : (g + 1) * C].tolist())
            total = sum(weights)
            mixed += [sum(w * value[c] for w, value in zip(weights, values)) / total for c in range(C)]
        rows.append(torch.tensor(mixed, dtype=torch.float64) * torch.sigmoid(gate[t]))
    return torch.stack(rows) @ attention.out.weight.t()


@pytest.mark.parametrize("documents", [[0] * S, [0] * 5 + [1] + [2] * 6])
@pytest.mark.parametrize(("layer", "window"), [(LOCAL, 1), (LOCAL, 5), (LOCAL, S), (LOCAL, 100), (GLOBAL, 5)])
@torch.no_grad()
def test_matches_loops(tiny: ModelConfig, layer: int, window: int, documents: list[int]) -> None:
    """Token t, from 1, of a local layer sees max(1, t−w+1)…t: with w = 1 itself alone; a global one ignores w.

    Sums of a few dozen float64 products of size 1: 1e-12.
    """
    attention = make(replace(tiny, window=window), layer)
    x_BSD = torch.randn(2, S, tiny.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids_BS = torch.tensor([documents, [0] * S])
    got = run(attention, x_BSD, torch.arange(S).unsqueeze(0), ids_BS)
    for row in range(2):
        expected = plain(attention, x_BSD[row], layer == LOCAL, window, ids_BS[row].tolist())
        assert torch.allclose(got[row], expected, rtol=0, atol=1e-12)


def test_global_layers(tiny: ModelConfig) -> None:
    """(index + 1) mod 4 = 0."""
    config = replace(tiny, layers=12)
    windows = [Attention(config, layer).window for layer in range(12)]
    assert windows == [5, 5, 5, None] * 3


@torch.no_grad()
def test_local_layers_depend_on_distance_and_global_layers_not_on_order(tiny: ModelConfig) -> None:
    """Shuffling the earlier tokens changes the last token's output with RoPE, and not without positions."""
    x_BSD = torch.randn(1, S, tiny.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shuffled = x_BSD[:, [*torch.randperm(S - 1, generator=torch.Generator().manual_seed(1)).tolist(), S - 1]]
    moved = {}
    for layer in (LOCAL, GLOBAL):
        attention = make(replace(tiny, window=S), layer)
        outputs = [run(attention, x, torch.arange(S).unsqueeze(0))[0, -1] for x in (x_BSD, shuffled)]
        moved[layer] = (outputs[0] - outputs[1]).abs().max().item()
    assert moved[GLOBAL] < 1e-13
    assert moved[LOCAL] > 1e-2


@pytest.mark.parametrize("shift", [1, 1000, 100_000])
def test_rope_is_relative(shift: int) -> None:
    """q·k depends on the distance alone: float64 angles of up to 1e5 are good to 1e-11, sums of 8 products to 1e-10."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, S, 2, 8, dtype=torch.float64, generator=random) for _ in range(2))
    positions = torch.arange(S).unsqueeze(0)
    products = []
    for start in (0, shift):
        rotation = rope_cos_sin(positions + start, 8, 10_000.0, torch.float64)
        products.append(torch.einsum("bshc,bthc->bhst", rotate(q, *rotation), rotate(k, *rotation)))
    assert torch.allclose(*products, rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", [8_192, 131_072, 260_000, 1_048_576])
def test_rope_is_relative_in_fp32(start: int) -> None:
    """Logits of unit-variance queries and keys within a window: at any offset those at 0, to a few roundings of cos and
    sin in fp32. Angles in fp32 would move them by 8e-3 at 260,000."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 64, 2, 128, generator=random) for _ in range(2))
    positions = torch.arange(64).unsqueeze(0)
    logits = []
    for first in (0, start):
        rotation = rope_cos_sin(positions + first, 128, 10_000.0, torch.float32)
        turned = (rotate(x, *rotation).double() for x in (q, k))
        logits.append(torch.einsum("bshc,bthc->bhst", *turned) / 128**0.5)
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


def test_rope_rotates_bf16_in_fp32() -> None:
    """bf16 queries at positions up to 131071: the float64 rotation to one rounding of bf16 (2⁻⁹ of the result).

    cos and sin are float64's, rounded to fp32: the absolute bound is for sums of two products in fp32 that cancel. With
    angles in fp32 they would be off by 0.008, and in bf16 by anything.
    """
    q = torch.randn(1, 64, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(0, 131_072, 2048).unsqueeze(0) + 2047
    cos, sin = rope_cos_sin(positions, 128, 10_000.0, torch.float32)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (1, 64, 1, 64)
    exact = rotate(q.double(), *rope_cos_sin(positions, 128, 10_000.0, torch.float64))
    got = rotate(q, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-6 * q.abs().max().item())


@pytest.mark.parametrize("layer", [LOCAL, GLOBAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_do_not_depend_on_how_the_projection_is_split(
    tiny: ModelConfig, dtype: torch.dtype, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written into slices of one tensor or concatenated by torch: the same bits."""
    attention = make(tiny, layer)
    for linear in (attention.qkvg, attention.out):
        linear.to(dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for norm in (attention.q_norm, attention.k_norm):
        norm.to(precision)
    x_BSD = torch.randn(2, S, tiny.width, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    positions_BS = torch.arange(S).unsqueeze(0)
    rotation = rope_cos_sin(positions_BS, attention.head_dim, 100.0, precision)
    grads = []
    for devices in (("cpu", "cuda"), ()):
        monkeypatch.setattr(split, "DEVICES", devices)
        y_BSD = attention(x_BSD, rotation, AttentionMask(positions_BS, None, engine="sdpa"))
        grads.append(torch.autograd.grad(y_BSD.square().sum(), (x_BSD, *attention.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*grads))


@torch.no_grad()
def test_the_gate_closes(tiny: ModelConfig) -> None:
    """σ(W_G x) multiplies before the output projection: with W_G = 0 it is one half everywhere."""
    attention = make(tiny, LOCAL)
    x_BSD = torch.randn(1, S, tiny.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate_weight = attention.qkvg.weight.split(attention.qkvg.rows)[3]
    gate_weight.zero_()
    half = run(attention, x_BSD, torch.arange(S).unsqueeze(0))
    attention.out.weight.mul_(2)
    assert torch.allclose(plain(attention, x_BSD[0], True, 5, [0] * S), 2 * half[0], rtol=0, atol=1e-12)
