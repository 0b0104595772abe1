"""One training step as the report has it: microbatches → clip → Muon and AdamW → balancing → figures.

The loss of a step is a mean over the valid targets of its global batch. These are counted first, over all ranks; every
microbatch's sum is divided by that one number, and gradients add up: so neither microbatches nor ranks change anything.

Shapes: B rows of one rank's batch, S sequence, M MoE layers, E experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import Balancing, RunConfig
from trinity.models.moe import MoE
from trinity.models.trinity import Losses, Trinity
from trinity.optim.clip import clip_, global_norm
from trinity.optim.groups import Optimizers
from trinity.parallel.accumulation import defers_reduction, set_reduction
from trinity.parallel.mesh import Ranks
from trinity.training.figures import step_figures, total_counts
from trinity.training.setup import microbatch_size
from trinity_kernels.cross_entropy import IGNORE


class Watch(NamedTuple):
    """What watches a step from outside.

    beat: called when a microbatch is done.
    judge: (loss, gradient norm), both finite → what is out of the ordinary about them, None for nothing.
    skips: whether such a step is skipped.
    loads: called with the tokens per layer and expert of the global batch, [M, E] int64.
    """

    beat: Callable[[], None] | None = None
    judge: Callable[[float, float], str | None] | None = None
    skips: bool = False
    loads: Callable[[Tensor], None] | None = None


UNWATCHED = Watch()


@dataclass
class Batch:
    """One rank's rows of one step: tokens, targets [B, S] int64 and, under a document mask, document ids [B, S]."""

    tokens_BS: Tensor
    targets_BS: Tensor
    document_ids_BS: Tensor | None

    def microbatches(self, size: int, device: torch.device) -> Iterator["Batch"]:
        """Consecutive parts of `size` rows on the device."""
        for start in range(0, self.tokens_BS.shape[0], size):
            rows = slice(start, start + size)
            documents = self.document_ids_BS
            yield Batch(
                self.tokens_BS[rows].to(device, non_blocking=True),
                self.targets_BS[rows].to(device, non_blocking=True),
                None if documents is None else documents[rows].to(device, non_blocking=True),
            )


def train_step(
    model: Trinity,
    optimizers: Optimizers,
    batch: Batch,
    config: RunConfig,
    rate: float,
    ranks: Ranks,
    source_counts: Tensor | None = None,
    watch: Watch = UNWATCHED,
) -> dict[str, Any]:
    """One optimizer step on a global batch; every rank calls it with rows of its own, equally many.

    Args:
        batch: this rank's rows, on the CPU.
        rate: fraction of the peak learning rates.
        source_counts: counts of this rank, of any shape, whose sum over all ranks is wanted.
        watch: what to tell of the step, and whom to ask whether it is to be skipped.
    Returns:
        the step's figures, named as in metrics.jsonl and equal on every rank. Where the loss or the gradient is not
        finite, or is a spike that is to be skipped, "skipped" is True and nothing has changed: no weight, no momentum,
        no bias.
        "source_counts": their sums.
    """
    valid_B = (batch.targets_BS != IGNORE).sum(dim=1)
    valid = _over_all_ranks(valid_B.sum())
    parts = _forward_and_backward(model, batch, valid, config, ranks, watch)
    counts_ME = total_counts(parts)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm(gradients, ranks.copy_group)
    figures = step_figures(parts, valid_B, valid, counts_ME, config, source_counts)
    skipped = not (math.isfinite(norm.item()) and math.isfinite(figures["loss"]))
    if not skipped and watch.judge is not None and watch.judge(figures["loss"], norm.item()):
        skipped = watch.skips
    if watch.loads is not None and counts_ME is not None:
        watch.loads(counts_ME)
    if not skipped:
        if config.optim.clip_norm:
            clip_(gradients, norm, config.optim.clip_norm)
        optimizers.set_rates(rate)
        optimizers.step()
        if counts_ME is not None:
            update_biases(model, counts_ME, config.balancing)
    optimizers.zero_grad()
    return figures | {
        "grad_norm": norm.item(),
        "lr_muon": rate * config.optim.muon.lr,
        "lr_adamw": rate * config.optim.adamw.lr,
        "bias_range": _bias_range(model),
        "skipped": skipped,
    }


def _over_all_ranks(count: Tensor) -> int:
    """A count summed over all ranks, on the CPU: known before the first forward pass, without waiting for a device."""
    count = count.clone()
    dist.all_reduce(count)
    return max(int(count), 1)


def _forward_and_backward(
    model: Trinity, batch: Batch, valid: int, config: RunConfig, ranks: Ranks, watch: Watch
) -> list[Losses]:
    """Add up every microbatch's gradient of the global batch's mean loss."""
    rows = len(batch.tokens_BS)
    size = microbatch_size(rows, config.batch.microbatch)
    alpha = config.balancing.sequence_loss
    defer = defers_reduction(config.parallel.defer_reduce, model, ranks) if size < rows else False
    parts: list[Losses] = []
    for part in batch.microbatches(size, ranks.device):
        set_reduction(model, last=len(parts) + 1 == rows // size, defer=defer)
        losses = model(
            part.tokens_BS, document_ids_BS=part.document_ids_BS, targets_BS=part.targets_BS, z=config.loss.z
        )
        loss = losses.token_loss / valid
        if alpha and losses.sequence_loss_B is not None:
            loss = loss + alpha * losses.sequence_loss_B.sum() / (rows * ranks.data_ranks)
        loss.backward()
        parts.append(_without_graph(losses))
        if watch.beat is not None:
            watch.beat()
    return parts


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


def _bias_range(model: Trinity) -> float:
    ranges = [layer.expert_bias.max() - layer.expert_bias.min() for layer in moe_layers(model)]
    return torch.stack(ranges).max().item() if ranges else 0.0
