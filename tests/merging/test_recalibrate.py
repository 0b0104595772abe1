"""Recalibration against a plain transcription in float64: the search for biases, and the least squares of routers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.merging.conftest import child, tensors_of
from trinity.config.run import BalancingConfig
from trinity.evaluation.expert_load import moe_layers
from trinity.merging.balance import END_RATE, MAX_PASSES, PATIENCE, START_RATE, Rows, expert_counts, settle_biases
from trinity.merging.fit_routers import OFF_DIAGONAL, STEPS, fit_routers, router_logits
from trinity.merging.rewrite import rewrite_tensors
from trinity.models import Trinity


def rows(seed: int = 0) -> list[Rows]:
    """Two batches of tokens, the second with padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(CONFIG.vocab_size, (5, 40), generator=generator)
    ids_BS = torch.zeros(2, 40, dtype=torch.int32)
    ids_BS[1, 25:] = -1
    return [Rows(tokens_BS[:3], None), Rows(tokens_BS[3:], ids_BS)]


def shuffled(seed: int = 3) -> Trinity:
    """A float64 model whose biases belong to other experts."""
    model = child(seed).double()
    with torch.no_grad():
        for number, layer in enumerate(moe_layers(model)):
            layer.expert_bias.copy_(torch.roll(layer.expert_bias * 2, number + 1))
    return model


def counts(model: Trinity, batches: list[Rows]) -> np.ndarray:
    """Tokens of each expert, from the model's own counts of rows without their padding."""
    total = 0
    for tokens_BS, ids_BS in batches:
        for row, tokens_S in enumerate(tokens_BS):
            kept_S = tokens_S if ids_BS is None else tokens_S[ids_BS[row] >= 0]
            total += model(kept_S[None], targets_BS=kept_S[None]).counts_ME
    return total.numpy()


def max_vio(counts_ME: np.ndarray) -> float:
    return (counts_ME.max(1) / counts_ME.mean(1) - 1).mean()


@torch.no_grad()
def transcribed(model: Trinity, batches: list[Rows], kind: str) -> tuple[np.ndarray, int, float]:
    """(biases, passes, MaxVio) of the search, with the rules of eq. 19-28 written out."""

    def passed(bias_ME: np.ndarray) -> SimpleNamespace:
        for layer, bias_E in zip(moe_layers(model), bias_ME):
            layer.expert_bias.copy_(torch.from_numpy(bias_E))
        counts_ME = counts(model, batches)
        return SimpleNamespace(bias=bias_ME, counts=counts_ME, vio=max_vio(counts_ME))

    best = now = passed(np.stack([layer.expert_bias.numpy().copy() for layer in moe_layers(model)]))
    momentum, rate, stale, passes = np.zeros_like(best.bias), START_RATE, 0, 0
    while rate >= END_RATE and best.vio > 0 and passes < MAX_PASSES:
        violation = 1 - now.counts / now.counts.mean(1, keepdims=True)
        if kind == "sign":
            moved = now.bias + rate * np.sign(violation)
            moved -= moved.mean(1, keepdims=True)
        else:
            step = rate * np.tanh(2 * violation)
            momentum = 0.5 * momentum + 0.5 * (step - step.mean(1, keepdims=True))
            moved = now.bias + momentum
        now, passes, stale = passed(moved), passes + 1, stale + 1
        if now.vio < best.vio:
            best, stale = now, 0
        elif stale == PATIENCE:
            now, stale, rate, momentum = best, 0, rate / 2, np.zeros_like(momentum)
    return best.bias, passes, best.vio


@pytest.mark.parametrize("kind", ["smebu", "sign"])
def test_biases_equal_the_transcription(kind: str) -> None:
    """And MaxVio falls. In float64 the rounding of a bias moves no token to another expert."""
    model, batches = shuffled(), rows()
    before = max_vio(counts(model, batches))
    settled = settle_biases(model, batches, BalancingConfig(kind=kind))
    bias_ME, passes, after = transcribed(shuffled(), batches, kind)
    found_ME = np.stack([layer.expert_bias.numpy() for layer in moe_layers(model)])
    np.testing.assert_allclose(found_ME, bias_ME, rtol=0, atol=1e-12)  # sums in another order
    assert settled.passes == passes
    assert (settled.before, settled.after) == pytest.approx((before, after), rel=1e-12)
    assert after < 0.5 * before
    assert max_vio(counts(model, batches)) == pytest.approx(after, rel=1e-12)
    assert not any(layer.expert_momentum.any() for layer in moe_layers(model))
    assert all(not parameter.grad for parameter in model.parameters())


def test_counts_without_padding() -> None:
    model, batches = shuffled(), rows()
    assert np.array_equal(expert_counts(model, batches), counts(model, batches))


def test_only_biases_change() -> None:
    model, before = shuffled(), shuffled().state_dict()
    settle_biases(model, rows(), BalancingConfig())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"expert_bias", "expert_momentum"}


def test_routers_equal_the_transcription() -> None:
    """Layer by layer, expert by expert, with solve() in float64; inputs are read from the FFN norm's output."""
    merged, expected, teacher, batches = child(1).double(), child(1).double(), child(2).double(), rows()
    fitted = fit_routers(merged, batches, router_logits(teacher, batches))
    teacher_xs, before, after = inputs(teacher, batches), [], []
    for number, layer in enumerate(moe_layers(expected)):
        x_TD = inputs(expected, batches)[number].numpy()
        z_TE = (teacher_xs[number] @ moe_layers(teacher)[number].router.weight.T).float().double().detach().numpy()
        weight_ED = layer.router.weight.detach().numpy()
        p_TE = 1 / (1 + np.exp(-z_TE))
        before.append(np.mean((1 / (1 + np.exp(-x_TD @ weight_ED.T)) - p_TE) ** 2))
        for expert in range(CONFIG.experts):
            omega_T = p_TE[:, expert] * (1 - p_TE[:, expert])
            a_DD = (x_TD * omega_T[:, None]).T @ x_TD
            shrunk_DD = OFF_DIAGONAL * a_DD + (1 - OFF_DIAGONAL) * np.diag(np.diag(a_DD))
            shrunk_DD += 1e-6 * np.diag(a_DD).mean() * np.eye(len(a_DD))
            for _ in range(STEPS):
                error_T = z_TE[:, expert] - x_TD @ weight_ED[expert]
                weight_ED[expert] += np.linalg.solve(shrunk_DD, x_TD.T @ (omega_T * error_T))
        after.append(np.mean((1 / (1 + np.exp(-x_TD @ weight_ED.T)) - p_TE) ** 2))
        found_ED = moe_layers(merged)[number].router.weight.detach().numpy()
        np.testing.assert_allclose(found_ED, weight_ED, rtol=1e-8, atol=1e-8)  # cond(A) is about 1e5
    assert (fitted.before, fitted.after) == pytest.approx((np.mean(before), np.mean(after)), rel=1e-6)
    assert fitted.after < fitted.before


def test_disturbed_routers_return() -> None:
    """Where only the routers differ, activations are the model's own, and the scores return nearly whole."""
    model, own, batches = child(1).double(), child(1).double(), rows()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(model):
            noise_ED = torch.randn(layer.router.weight.shape, generator=generator, dtype=torch.float64)
            layer.router.weight.add_(noise_ED, alpha=0.05)
    fitted = fit_routers(model, batches, router_logits(own, batches))
    assert fitted.after < 0.05 * fitted.before


def test_a_router_with_its_own_scores_stays() -> None:
    model, before, batches = child(1).double(), child(1).double(), rows()
    fit_routers(model, batches, router_logits(before, batches))
    for layer, old in zip(moe_layers(model), moe_layers(before)):
        # logits are kept in fp32: 6e-8 of each, through the inverse of A
        torch.testing.assert_close(layer.router.weight, old.router.weight, rtol=0, atol=1e-5)


def inputs(model: Trinity, batches: list[Rows]) -> list[torch.Tensor]:
    """The inputs of every router over all rows, in one pass."""
    found: list[list[torch.Tensor]] = [[] for _ in moe_layers(model)]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, number=number: found[number].append(args[0].flatten(0, 1)))
        for number, layer in enumerate(moe_layers(model))
    ]
    with torch.no_grad():
        for tokens_BS, ids_BS in batches:
            for row, tokens_S in enumerate(tokens_BS):
                kept_S = tokens_S if ids_BS is None else tokens_S[ids_BS[row] >= 0]
                model(kept_S[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]


def test_only_these_bytes_are_rewritten(family: Path) -> None:
    """Over several files, in the stored data types; a wrong name or shape writes nothing."""
    before, files = tensors_of(family / "a"), {path: path.read_bytes() for path in (family / "a").iterdir()}
    new = {name: torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in before.items() if "router" in name
           or name.endswith("bias")}  # fmt: skip
    assert rewrite_tensors(family / "a", new) == 6
    for name, tensor in tensors_of(family / "a").items():
        assert torch.equal(tensor, new[name].float() if name in new else before[name])
    for path, content in files.items():
        assert len(path.read_bytes()) == len(content)
        if path.suffix != ".safetensors":
            assert path.read_bytes() == content
    after = {path: path.read_bytes() for path in (family / "a").iterdir()}
    with pytest.raises(ValueError, match=r"has no model.norm.weight of shape \(3,\)"):
        rewrite_tensors(family / "a", {"lm_head.weight": before["lm_head.weight"], "model.norm.weight": torch.ones(3)})
    assert {path: path.read_bytes() for path in (family / "a").iterdir()} == after
