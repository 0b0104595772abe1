"""The model with every operation in Triton against the model with the references: losses and every gradient.

fp32 on both sides, products exact to 2⁻²⁴ and summed in another order: 1e-5 of a tensor's norm, as for a single kernel
in triton_case.BOUNDS; the routes are equal, because no two scores here are that close.

Shapes: B batch, S sequence, M MoE layers, E experts.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import DEVICE, assert_close
from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig
from trinity.models import Trinity
from trinity.models.trinity import Losses
from trinity_kernels import split

CONFIG = ModelConfig(
    vocab_size=128, width=32, layers=4, dense_layers=1, dense_width=48, heads=4, kv_heads=2, head_dim=8, window=5,
    experts=8, active_experts=2, expert_width=16,
)  # fmt: skip


def kernels(which: str) -> KernelsConfig:
    """Every operation but attention, which has no Triton kernel in trinity_kernels."""
    return KernelsConfig(**{field.name: which for field in fields(KernelsConfig) if "reference" in str(field.type)})


def run(which: str, config: ModelConfig) -> tuple[Losses, dict[str, Tensor]]:
    """A forward and backward pass over two packed rows of documents, with both extra losses."""
    model = Trinity(config, kernels(which))
    model.init_weights(3)
    model.to(DEVICE)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 14), generator=random).to(DEVICE)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    documents = (torch.arange(14, device=DEVICE) // 6).expand(2, -1)
    losses = model(tokens, document_ids_BS=documents, targets_BS=targets, z=1e-3)
    (losses.token_loss / 26 + 0.1 * losses.sequence_loss_B.sum()).backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("experts", [8, 3])
def test_model_in_triton_is_the_model_in_torch(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "DEVICES", ("cpu", "cuda"))
    config = replace(CONFIG, experts=experts)
    (actual, gradients), (reference, exact) = run("triton", config), run("reference", config)
    assert torch.equal(actual.counts_ME, reference.counts_ME)
    for name in ("token_loss", "ce_BS", "lse_BS", "top_logit", "sequence_loss_B", "entropy_M"):
        assert_close(getattr(actual, name), getattr(reference, name), 1e-5)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert_close(gradient, exact[name], 1e-5)
