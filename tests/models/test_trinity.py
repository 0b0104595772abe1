"""The whole model: its equation, precisions, losses, positions, documents; forward changes no state.

Shapes: B batch, S sequence, D width, V vocabulary, M MoE layers, E experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config.model import ZOO, ModelConfig
from trinity.models import Losses, Trinity, next_tokens, parameter_roles
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask

B, S = 2, 24


@pytest.fixture
def model(tiny: ModelConfig) -> Trinity:
    """In float64; balancing biases that change choices, gains different from 1."""
    model = Trinity(tiny).double()
    model.init_weights(seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "expert_bias")):
                tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, some of them ignored."""
    tokens_BS = torch.randint(50, (B, S + 1), generator=torch.Generator().manual_seed(0))
    targets_BS = tokens_BS[:, 1:].clone()
    targets_BS[0, 3:6] = -100
    return tokens_BS[:, :-1], targets_BS


@pytest.mark.parametrize(
    ("name", "parameters"), [("nano", 6_120_003_328), ("mini", 26_123_974_400), ("large", 398_635_286_016)]
)
def test_published_sizes(name: str, parameters: int) -> None:
    """Exact, expert_bias included as in the published checkpoints; built without memory."""
    with torch.device("meta"):
        model = Trinity(ZOO[name])
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    assert sum(tensor.numel() for tensor in (*model.parameters(), *biases)) == parameters


@torch.no_grad()
def test_sandwich(model: Trinity, tiny: ModelConfig) -> None:
    """Eq. 33 and 39 around attention and FFN, which have their own tests; 1e-12 after five layers."""

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + tiny.norm_eps).sqrt() * gain

    tokens_BS, _ = batch()
    positions_BS = torch.arange(S).unsqueeze(0)
    visible = AttentionMask(positions_BS, None)
    rotation = rope_cos_sin(positions_BS, tiny.head_dim, tiny.rope_theta, torch.float64)
    x = model.embed.weight[tokens_BS] * math.sqrt(tiny.width)
    for block in model.blocks:
        inner = block.attention(normed(x, block.attention_norm.gain), rotation, visible)
        x = x + normed(inner, block.attention_post_norm.gain)
        inner = block.ffn(normed(x, block.ffn_norm.gain))
        x = x + normed(inner[0] if isinstance(inner, tuple) else inner, block.ffn_post_norm.gain)
    logits = normed(x, model.norm.gain) @ model.head.weight.t()
    assert torch.allclose(model(tokens_BS), logits, rtol=0, atol=1e-12)


def test_losses_are_those_of_the_logits(model: Trinity) -> None:
    """Sums over valid targets of CE and lse²; the largest logit; counts, sequence losses and entropy over layers."""
    tokens_BS, targets_BS = batch()
    routings = []
    for block in model.blocks[1:]:
        block.ffn.register_forward_hook(lambda module, args, output: routings.append(output[1]))
    losses: Losses = model(tokens_BS, targets_BS=targets_BS, z=0.01)
    logits_BSV = model(tokens_BS)
    ce_BS = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(B, S)
    lse_BS = torch.where(targets_BS == -100, 0.0, logits_BSV.logsumexp(dim=-1))
    assert torch.allclose(losses.ce_BS, ce_BS, rtol=0, atol=1e-12)
    assert torch.allclose(losses.lse_BS, lse_BS, rtol=0, atol=1e-12)
    assert losses.token_loss.item() == pytest.approx((ce_BS + 0.01 * lse_BS**2).sum().item(), abs=1e-11)
    assert losses.top_logit.item() == pytest.approx(logits_BSV.max().item(), abs=1e-13)
    assert torch.equal(losses.counts_ME, torch.stack([routing.counts_E for routing in routings[:4]]))
    assert losses.counts_ME.sum(dim=1).tolist() == [B * S * 2] * 4
    assert torch.equal(losses.sequence_loss_B, sum(routing.sequence_loss_B for routing in routings[:4]))
    assert losses.entropy_M.tolist() == [routing.entropy_sum.item() for routing in routings[:4]]


def test_without_the_sequence_loss_all_else_is_equal(model: Trinity) -> None:
    """Bit for bit, losses and gradients; the sequence loss is None."""
    tokens_BS, targets_BS = batch()
    results = []
    for wanted in (True, False):
        losses = model(tokens_BS, targets_BS=targets_BS, z=0.01, with_sequence_loss=wanted)
        results.append((losses, torch.autograd.grad(losses.token_loss, list(model.parameters()))))
    (expected, gradients), (actual, others) = results
    assert actual.sequence_loss_B is None
    for one, other in zip(expected._replace(sequence_loss_B=None), actual):
        assert one is other is None or torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others))


def test_loss_is_the_mean_over_the_next_tokens(model: Trinity) -> None:
    """Against cross_entropy on shifted logits, and on given targets with z·lse² added; 1e-12 in float64."""
    tokens_BS, targets_BS = batch()
    logits_BSV = model(tokens_BS)
    expected = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    assert model.loss(tokens_BS).item() == pytest.approx(expected.item(), abs=1e-12)
    lse_BS = logits_BSV.logsumexp(dim=-1)[targets_BS != -100]
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()) + 0.01 * lse_BS.square().mean()
    assert model.loss(tokens_BS, targets_BS, z=0.01).item() == pytest.approx(expected.item(), abs=1e-12)
    assert model.loss(tokens_BS, torch.full_like(targets_BS, -100)).item() == 0.0


def test_loss_does_not_cross_a_document(model: Trinity) -> None:
    """Two documents in one row: the mean over both of each document alone, at its positions of the row."""
    tokens_BS = batch()[0][:1]
    first = torch.arange(S) < 10
    losses = [
        F.cross_entropy(model(tokens_BS[:, part], positions_BS=torch.arange(S)[part].view(1, -1))[0, :-1],
                        tokens_BS[0, part][1:], reduction="sum")
        for part in (first, ~first)
    ]  # fmt: skip
    assert next_tokens(tokens_BS, (~first).long().view(1, S))[0, [9, S - 1]].tolist() == [-100, -100]
    got = model.loss(tokens_BS, document_ids_BS=(~first).long().view(1, S)).item()
    assert got == pytest.approx(sum(losses).item() / (S - 2), abs=1e-12)


def test_microbatches_add_up(model: Trinity) -> None:
    """One batch of two rows against each row alone: losses, counts and gradients; float64 sums, 1e-12."""
    tokens_BS, targets_BS = batch()

    def run(rows: slice) -> tuple[Losses, list[Tensor]]:
        losses = model(tokens_BS[rows], targets_BS=targets_BS[rows], z=0.01)
        total = losses.token_loss + 0.1 * losses.sequence_loss_B.sum()
        return losses, list(torch.autograd.grad(total, list(model.parameters())))

    (whole, grads), *parts = (run(rows) for rows in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert whole.token_loss.item() == pytest.approx(sum(p.token_loss.item() for p, _ in parts), abs=1e-11)
    assert torch.equal(whole.counts_ME, parts[0][0].counts_ME + parts[1][0].counts_ME)
    assert torch.allclose(whole.sequence_loss_B, torch.cat([p.sequence_loss_B for p, _ in parts]), rtol=0, atol=1e-12)
    for gradient, first, second in zip(grads, parts[0][1], parts[1][1]):
        assert torch.allclose(gradient, first + second, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_no_token_attends_to_a_later_one(model: Trinity) -> None:
    """Another token at position 10 changes the logits from there on, and none before it."""
    tokens_BS, _ = batch()
    changed = tokens_BS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 50
    before, after = model(tokens_BS), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], rtol=0, atol=1e-13)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("shift", [0, 1, 1000])
@torch.no_grad()
def test_only_differences_of_positions_matter(model: Trinity, shift: int) -> None:
    """The default is 0…S−1; RoPE is relative and NoPE has none. Angles of 1e3 are good to 1e-13 in float64."""
    tokens_BS, _ = batch()
    positions_BS = torch.arange(shift, shift + S).unsqueeze(0)
    assert torch.allclose(model(tokens_BS), model(tokens_BS, positions_BS), rtol=0, atol=1e-10)
    assert torch.equal(model(tokens_BS, positions_BS), model(tokens_BS, positions_BS.expand(B, -1)))


@torch.no_grad()
def test_positions_are_used(model: Trinity) -> None:
    """Gaps between positions change the logits: RoPE turns further and windows hold fewer tokens."""
    tokens_BS, _ = batch()
    assert not torch.allclose(model(tokens_BS), model(tokens_BS, 2 * torch.arange(S).unsqueeze(0)), atol=1e-4)


def test_packed_documents_equal_separate_documents(model: Trinity) -> None:
    """Logits and gradients of one packed row against its three documents one by one, 1e-11 after five layers."""
    lengths = [7, 1, 16]
    tokens_BS, targets_BS = (rows[:1] for rows in batch())
    ids_BS = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    parameters = list(model.parameters())
    together = model(tokens_BS, document_ids_BS=ids_BS)
    alone = torch.cat([model(part) for part in tokens_BS.split(lengths, dim=1)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-11)
    crossing = model(tokens_BS)
    assert not torch.allclose(together, crossing, atol=1e-4)
    losses = [F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten()) for logits in (together, alone)]
    for packed, separate in zip(*(torch.autograd.grad(loss, parameters) for loss in losses)):
        assert torch.allclose(packed, separate, rtol=1e-9, atol=1e-12)


@pytest.fixture
def dtypes(model: Trinity) -> Iterator[Callable[[], dict[str, set[torch.dtype]]]]:
    """The floating-point dtypes of each module's outputs so far, by the module's full name."""
    recorded: dict[str, set[torch.dtype]] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            if output.is_floating_point():
                recorded.setdefault(name, set()).add(output.dtype)
        elif isinstance(output, tuple):
            for part in output:
                record(name, part)

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name, module in model.named_modules()
    ]
    yield lambda: recorded
    for hook in hooks:
        hook.remove()


def test_float64_stays_float64(model: Trinity, dtypes: Callable[[], dict[str, set[torch.dtype]]]) -> None:
    """Outputs of all modules and all gradients are float64."""
    tokens_BS, targets_BS = batch()
    model(tokens_BS)
    losses = model(tokens_BS, targets_BS=targets_BS, z=0.01)
    (losses.token_loss + losses.sequence_loss_B.sum()).backward()
    recorded = dtypes()
    assert len(recorded) == len([m for m in model.modules() if not isinstance(m, torch.nn.ModuleList)])
    assert set().union(*recorded.values()) == {torch.float64}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}


def test_dtypes_in_bf16(model: Trinity, dtypes: Callable[[], dict[str, set[torch.dtype]]]) -> None:
    """Matrices in bf16, gains and router in fp32: the residual stream is bf16, router, losses and biases are fp32."""
    model.float()
    for role in parameter_roles(model):
        if role.kind not in ("gain", "router"):
            role.parameter.data = role.parameter.data.bfloat16()
    tokens_BS, targets_BS = batch()
    assert model(tokens_BS).dtype == torch.bfloat16
    recorded = dtypes()
    fp32_inside = {f"blocks.{layer}.ffn" for layer in range(1, 5)} | {f"blocks.{layer}" for layer in range(1, 5)}
    for name, dtypes_found in recorded.items():
        if name.endswith("router"):
            assert dtypes_found == {torch.float32}, name
        elif name in fp32_inside:  # their Routing is fp32
            assert dtypes_found == {torch.bfloat16, torch.float32}, name
        else:
            assert dtypes_found == {torch.bfloat16}, name
    losses = model(tokens_BS, targets_BS=targets_BS, z=0.01)
    assert {value.dtype for value in losses if value.is_floating_point()} == {torch.float32}
    assert losses.counts_ME.dtype == torch.int64
    (losses.token_loss + losses.sequence_loss_B.sum()).backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())


@torch.no_grad()
def test_bf16_scores_are_not_rounded(model: Trinity) -> None:
    """The router multiplies a bf16 input by its fp32 weight in fp32: to 1e-6 the float64 scores of the same numbers."""
    model.float()
    x_TD = torch.randn(100, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    router = model.blocks[1].ffn.router
    scores_TE = router(x_TD, torch.zeros(6))[1]
    exact = torch.sigmoid(x_TD.double() @ router.weight.double().t())
    assert torch.allclose(scores_TE.double(), exact, rtol=0, atol=1e-6)
    assert (scores_TE != scores_TE.bfloat16()).float().mean() > 0.9


def test_forward_and_backward_change_no_state(model: Trinity) -> None:
    """Parameters and buffers bit for bit, in training and in evaluation mode: counts are returned, not kept."""
    tokens_BS, targets_BS = batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        losses = model(tokens_BS, targets_BS=targets_BS, z=0.01)
        (losses.token_loss + losses.sequence_loss_B.sum()).backward()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_dense_model_has_no_routing(tiny: ModelConfig) -> None:
    model = Trinity(replace(tiny, dense_layers=5))
    model.init_weights(seed=0)
    tokens_BS, targets_BS = batch()
    losses = model(tokens_BS, targets_BS=targets_BS)
    assert (losses.sequence_loss_B, losses.counts_ME, losses.entropy_M) == (None, None, None)
    assert losses.token_loss.item() == pytest.approx(losses.ce_BS.sum().item(), rel=1e-6)
