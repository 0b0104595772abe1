"""Activation memory and expert exchange of a block: by hand, meta against real memory, and under recompute."""

import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.config.run import BalancingConfig, DataConfig, ParallelConfig, PrecisionConfig, RunConfig
from trinity.models import attention_backends
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import Block
from trinity.parallel.comm_counter import Traffic
from trinity.parallel.mesh import check_parallel
from trinity.planning.activations import (
    Activations,
    LiveBytes,
    block_activations,
    head_activations,
    mean_destination_ranks,
)
from trinity.planning.fake_rank import fake_rank
from trinity_kernels import linear_cross_entropy

ROWS, LENGTH = 3, 16
TOKENS = ROWS * LENGTH
KINDS = ("none", "selective", "block")


def config_of(model: ModelConfig, parallel: ParallelConfig | None = None, recompute: str = "none") -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        parallel=parallel or ParallelConfig(),
        recompute=recompute,
        balancing=BalancingConfig(sequence_loss=1e-4),
    )


def measured(config: RunConfig, gpus: int = 1) -> list[Activations]:
    with fake_rank(config, check_parallel(config.parallel, config.model, gpus)) as rank:
        return block_activations(config, rank.ranks, ROWS)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_context_parallelism_by_hand(tiny: ModelConfig, size: int, kind: str) -> None:
    """Bytes in bf16 that the first of N ranks gives to its exchanges, and what `recompute` repeats.

    8 ranks cannot split 4 heads.
    """
    model = replace(tiny, heads=4, kv_heads=2, expert_width=8)
    config = config_of(model, ParallelConfig(context=size), kind)
    H, G, C, w, chunk = model.heads, model.kv_heads, model.head_dim, model.window, LENGTH // size
    again = 2 if kind == "block" else 1
    token = 2 * ROWS  # bytes of one number of every row
    for layer, block in enumerate(measured(config, size)):
        assert block.context is not None
        if not model.is_global(layer):  # it gets no halo, so it returns no gradients
            sent = sum(min(max(w - 1 - distance * chunk, 0), chunk) for distance in range(size - 1))
            assert block.context == ("halo", (1 + again, again * sent * 2 * G * C * token), block.context.counts)
        elif size == 8:
            sent = (size - 1) * chunk
            assert block.context == ("gather", (1 + again, again * sent * 2 * G * C * token), block.context.counts)
        else:
            there, back = chunk * (H + 2 * max(G, size)) * C * token, chunk * H * C * token
            expected = Traffic(2 * (1 + again), (1 + again) * (there + back))
            assert block.context == ("heads", expected, block.context.counts)
        sparse = layer >= model.dense_layers
        assert block.context.counts == (Traffic(1, 8 * ROWS * model.experts) if sparse else Traffic(0, 0))


@pytest.mark.parametrize(("experts", "active", "ranks"), [(6, 2, 3), (8, 3, 2), (8, 8, 4), (4, 1, 4), (9, 4, 1)])
def test_destinations(experts: int, active: int, ranks: int) -> None:
    """Against an enumeration of all choices of experts."""
    choices = list(combinations(range(experts), active))
    counted = sum(len({expert // (experts // ranks) for expert in choice}) for choice in choices)
    assert mean_destination_ranks(experts, active, ranks) == pytest.approx(counted / len(choices), rel=1e-12)


def test_dense_block_by_hand(tiny: ModelConfig) -> None:
    """Every tensor that backward needs, per token; 2 bytes a number except the fp32 ones.

    Flash attention's seeds take a few bytes for any size.
    """
    D, P, HC, GC, F = 24, 2 * (32 + 16), 32, 16, 40
    sixteen_bits = D + P + HC + GC  # first norm's output; q, k, v and gate; q and k after their norms (and RoPE)
    sixteen_bits += HC + HC  # attention's output, gated and not; the gate's sigmoid is made again
    sixteen_bits += D + D + D  # the output projection, the residual stream, the second norm's output
    sixteen_bits += 2 * F + F  # gate and up, and SwiGLU of them; silu(gate) is made again
    sixteen_bits += D + D  # the down projection, the block's output
    wide = 4 + (4 + 2) + 4  # 1/rms of four norms, of each head of q and k; attention's log-sum-exp
    dense = measured(config_of(tiny))[0]
    assert 0 <= dense.kept - TOKENS * (2 * sixteen_bits + 4 * wide) <= 64


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_meta_device_matches_memory(
    tiny: ModelConfig, layer: int, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same block on the CPU, with the CPU's flash attention: saved bytes and both peaks.

    Meta's flash attention also has a few seeds. Neither side measures inside the expert operation.
    """

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, True)[0].transpose(1, 2)

    monkeypatch.setitem(attention_backends._ENGINES, "sdpa", flash)
    # the CPU would widen bf16; sys.modules because the package exports an operation of the module's name
    monkeypatch.setattr(sys.modules["trinity_kernels.linear"], "multiplies_in_fp32", lambda _: False)
    monkeypatch.setattr("trinity.planning.activations._expert_workspace", lambda *_: 0)
    tiny = replace(tiny, kv_heads=tiny.heads)  # the CPU's flash attention has no grouped queries
    on_meta = measured(replace(config_of(tiny), precision=PrecisionConfig(compute=compute)))[layer]
    block, x_BSD = Block(tiny, layer).to(getattr(torch, compute)), torch.randn(ROWS, LENGTH, tiny.width)
    x_BSD = x_BSD.to(getattr(torch, compute)).requires_grad_()
    for name, part in block.named_modules():
        if name.endswith(("norm", "router")):
            part.float()
    with torch.no_grad():
        for x in [*block.parameters(), *block.buffers()]:
            x.normal_()
    positions = torch.arange(LENGTH).unsqueeze(0)
    rotation = rope_cos_sin(positions, tiny.head_dim, tiny.rope_theta, torch.float32)
    with LiveBytes() as live:
        y_BSD, routing = block(x_BSD, rotation, AttentionMask(positions, None, True, "sdpa"))
        kept, forward = live.now, live.peak
        live.peak = live.now
        outputs = [y_BSD] + ([routing.sequence_loss_B] if routing else [])
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        assert on_meta[:3] == pytest.approx((kept, forward, live.peak - kept), rel=0, abs=64)


def test_recompute(tiny: ModelConfig) -> None:
    """`block` saves a block's output, the next block's input, and its routing; `selective` saves more, `none` most."""
    kept = {kind: [block.kept for block in measured(config_of(tiny, recompute=kind))] for kind in KINDS}
    output, routing = TOKENS * 24 * 2, TOKENS * 2 * 8 + 6 * 8  # indices [T, K] and counts [E], int64
    assert kept["block"][0] == output
    assert 0 <= kept["block"][1] - (output + routing) <= 256  # the sums over tokens that a block returns
    for none, selective, block in zip(*(kept[kind] for kind in KINDS)):
        assert none > selective > block
    # attention: output and log-sum-exp; experts: pre-activations [T·K, 2F] and the sums [T, D]
    attention, experts = TOKENS * (32 * 2 + 4 * 4), TOKENS * (2 * 20 * 2 + 24 * 2)
    assert 0 <= kept["selective"][0] - (output + attention) <= 64
    assert 0 <= kept["selective"][1] - (kept["block"][1] + attention + experts) <= 64


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("selective", 1), ("block", 2)])
def test_exchange_by_hand(tiny: ModelConfig, recompute: str, forwards: int) -> None:
    """Sent: rows in bf16, K gates and K choices in fp32; returned: sums; then the gradients of all three.

    Each forward pass has three calls, backward three; counts are exchanged once, two int64 for each rank.
    """
    config = config_of(tiny, ParallelConfig(shard=3, expert=3), recompute)
    sent = round(TOKENS * mean_destination_ranks(6, 2, 3) / 3) * 3
    passes = forwards + 1
    rows, gates = sent * 24 * 2, sent * 2 * 2 * 4
    expected = Traffic(1 + 3 * passes, 3 * 2 * 8 + passes * (2 * rows + gates))
    assert [block.exchange for block in measured(config, 3)] == [Traffic(0, 0), expected, expected, expected]


def test_expert_workspace(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added in sparse blocks only: here at most nine fp32 tensors [T·K, F] and a bf16 one [T·K, D]."""
    with_workspace = measured(config_of(tiny))
    monkeypatch.setattr("trinity.planning.activations._expert_workspace", lambda *_: 0)
    without = measured(config_of(tiny))
    rows = TOKENS * 2
    added = [a.backward - b.backward for a, b in zip(with_workspace, without)]
    assert added == [0, *[max(rows * (9 * 4 * 10 + 2 * 24), rows * (8 * 4 * 10 + 10 * 24))] * 3]


def test_head(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loss in real memory, in fp32 and chunks of ten tokens.

    The formula is for a GPU, so the CPU gets chunks of the same size; it leaves out a few numbers a token.
    """
    chunk = 10 * 50 * 4
    for name in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(f"trinity_kernels.cross_entropy.{name}", chunk)
    x = torch.randn(TOKENS, 24, requires_grad=True)
    weight, targets = torch.randn(50, 24, requires_grad=True), torch.randint(50, (TOKENS,))
    expected = head_activations(replace(config_of(tiny), precision=PrecisionConfig(compute="float32")), ROWS)
    few = 40 * TOKENS
    with LiveBytes() as live:
        losses = linear_cross_entropy(x, weight, targets, 1e-4)
        assert 0 <= live.now - expected.kept <= few
        assert 0 <= live.peak - expected.forward <= few
        live.peak = before = live.now
        losses[0].backward()
        assert 0 <= live.peak - before - expected.backward <= few


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_bytes(device: str) -> None:
    """Views and in-place operations add nothing; tensors from before the mode are not counted."""
    outside = torch.empty(100, device=device)
    with LiveBytes() as live:
        a = torch.empty(10, device=device)  # 40 bytes
        view = a[2:].view(2, 4)
        outside.mul_(2)[:50].add_(1)
        assert (live.now, live.peak) == (40, 40)
        b = a.double()  # 80
        assert live.now == 120
        del b
        assert (live.now, live.peak) == (40, 120)
        del a
        assert live.now == 40
        del view
    assert (live.now, live.peak) == (0, 120)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_bytes_of_autograd(device: str) -> None:
    """exp saves its result, which only autograd refers to; x is from before the mode."""
    x = nn.Parameter(torch.empty(25, device=device))
    with LiveBytes() as live:
        y = x.exp().sum()
        assert live.now == 100 + 4
        y.backward()
        del y
        assert live.now == 100  # x's gradient
