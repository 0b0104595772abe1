"""One training step as the report has it: microbatches → clip → Muon and AdamW → balancing → figures.

The loss of a step is a mean over the valid targets of its global batch. These are counted first, every microbatch's sum
is divided by that one number, and gradients add up: so neither microbatches nor ranks change the result.

Shapes: B rows of a batch, S sequence, M MoE layers, E experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trinity import balancing
from trinity.config.run import Balancing, RunConfig
from trinity.models.moe import MoE
from trinity.models.trinity import Losses, Trinity
from trinity.optim.clip import clip_, global_norm
from trinity.optim.groups import Optimizers
from trinity.training.setup import microbatch_size
from trinity_kernels.cross_entropy import IGNORE


@dataclass
class Batch:
    """Rows of one step: tokens, targets [B, S] int64 and, under a document mask, document ids [B, S]."""

    tokens_BS: Tensor
    targets_BS: Tensor
    document_ids_BS: Tensor | None

    def microbatches(self, size: int, device: torch.device) -> Iterator["Batch"]:
        """Consecutive parts of `size` rows on the device."""
        for start in range(0, self.tokens_BS.shape[0], size):
            rows = slice(start, start + size)
            documents = self.document_ids_BS
            yield Batch(
                self.tokens_BS[rows].to(device),
                self.targets_BS[rows].to(device),
                None if documents is None else documents[rows].to(device),
            )


def train_step(
    model: Trinity, optimizers: Optimizers, batch: Batch, config: RunConfig, rate: float, device: torch.device
) -> dict[str, Any]:
    """One optimizer step on a global batch.

    Args:
        batch: the whole batch, on the CPU.
        rate: fraction of the peak learning rates.
    Returns:
        the step's figures, named as in metrics.jsonl. Where the loss or the gradient is not finite, "skipped" is True
        and nothing has changed: no weight, no momentum, no bias.
    """
    rows = batch.tokens_BS.shape[0]
    valid = max(int((batch.targets_BS != IGNORE).sum()), 1)
    alpha = config.balancing.sequence_loss
    parts: list[Losses] = []
    for part in batch.microbatches(microbatch_size(rows, config.batch.microbatch), device):
        losses = model(
            part.tokens_BS, document_ids_BS=part.document_ids_BS, targets_BS=part.targets_BS, z=config.loss.z
        )
        loss = losses.token_loss / valid
        if alpha and losses.sequence_loss_B is not None:
            loss = loss + alpha * losses.sequence_loss_B.sum() / rows
        loss.backward()
        parts.append(_without_graph(losses))

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm(gradients)
    figures = _figures(parts, batch, valid, config)
    skipped = not (math.isfinite(norm.item()) and math.isfinite(figures["loss"]))
    if not skipped:
        if config.optim.clip_norm:
            clip_(gradients, norm, config.optim.clip_norm)
        optimizers.set_rates(rate)
        optimizers.step()
        if parts[0].counts_ME is not None:
            update_biases(model, torch.stack([part.counts_ME for part in parts]).sum(dim=0), config.balancing)
        figures["starved_experts"] = optimizers.muon.starved_count.item() // 3  # an expert is three matrices
    optimizers.zero_grad()
    return figures | {
        "grad_norm": norm.item(),
        "lr_muon": rate * config.optim.muon.lr,
        "lr_adamw": rate * config.optim.adamw.lr,
        "bias_range": _bias_range(model),
        "skipped": skipped,
    }


def moe_layers(model: Trinity) -> list[MoE]:
    """The sparse layers, first to last."""
    return [block.ffn for block in model.blocks if block.sparse]


@torch.no_grad()
def update_biases(model: Trinity, counts_ME: Tensor, config: Balancing) -> None:
    """Move every layer's expert bias once, by the counts of the whole global batch."""
    layers = moe_layers(model)
    bias_ME = torch.stack([layer.expert_bias for layer in layers])
    momentum_ME = torch.stack([layer.expert_momentum for layer in layers])
    if config.kind == "smebu":
        bias_ME, momentum_ME = balancing.smebu_update(
            bias_ME, momentum_ME, counts_ME, config.rate, config.kappa, config.beta
        )
    elif config.kind == "sign":
        bias_ME = balancing.sign_update(bias_ME, counts_ME, config.gamma)
    for layer, bias_E, momentum_E in zip(layers, bias_ME, momentum_ME):
        layer.expert_bias.copy_(bias_E)
        layer.expert_momentum.copy_(momentum_E)


def _without_graph(losses: Losses) -> Losses:
    return Losses(*(None if value is None else value.detach() for value in losses))


def _figures(parts: list[Losses], batch: Batch, valid: int, config: RunConfig) -> dict[str, Any]:
    ce_B = torch.cat([part.ce_BS.sum(dim=1) for part in parts]).double()
    lse_square = sum(part.lse_BS.double().square().sum() for part in parts)
    valid_B = (batch.targets_BS != IGNORE).sum(dim=1).to(ce_B.device)
    figures = {
        "loss": ce_B.sum().item() / valid,
        "z_loss": config.loss.z * lse_square.item() / valid,
        "batch_het": batch_heterogeneity(ce_B, valid_B, config.log.het_sequences),
        "max_head_logit": torch.stack([part.top_logit for part in parts]).max().item(),
    }
    if parts[0].counts_ME is None:
        return figures
    counts_ME = torch.stack([part.counts_ME for part in parts]).sum(dim=0)
    violation_M = balancing.max_violation(counts_ME)
    sequence_loss = sum(part.sequence_loss_B.double().sum() for part in parts)
    entropy = sum(part.entropy_sum.double() for part in parts)
    return figures | {
        "sequence_loss": config.balancing.sequence_loss * sequence_loss.item() / len(ce_B),
        "max_violation": violation_M.max().item(),
        "max_violation_mean": violation_M.mean().item(),
        "dead_experts": balancing.dead_share(counts_ME).mean().item(),
        "router_entropy": entropy.item() / (batch.tokens_BS.numel() * len(counts_ME)),
    }


def batch_heterogeneity(ce_B: Tensor, valid_B: Tensor, group: int) -> float:
    """BatchHet (eq. 40): largest minus mean loss over groups of `group` consecutive rows.

    Args:
        ce_B: [B], each row's summed cross-entropy, rows in stream order.
        valid_B: [B], each row's valid targets.
        group: rows in a group; a last, smaller group counts like the others.
    """
    sums = torch.stack([part.sum() for part in ce_B.split(group)])
    losses = sums / torch.stack([part.sum() for part in valid_B.split(group)]).clamp_min(1)
    return (losses.max() - losses.mean()).item()


def _bias_range(model: Trinity) -> float:
    ranges = [layer.expert_bias.max() - layer.expert_bias.min() for layer in moe_layers(model)]
    return torch.stack(ranges).max().item() if ranges else 0.0
