"""One training step as the report has it: microbatches → clip → Muon and AdamW → balancing → figures.

The loss of a step is a mean over the valid targets of its global batch. These are counted first, over all ranks; every
microbatch's sum is divided by that one number, and gradients add up: so neither microbatches nor ranks change anything.

Shapes: B rows of one rank's batch, S sequence, M MoE layers, E experts.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import BalancingConfig, RunConfig
from trinity.data.stream.collate import Batch
from trinity.models.trinity import Losses, Trinity, moe_layers
from trinity.monitor.hooks import NO_HOOKS, StepHooks
from trinity.optim.build import Optimizers
from trinity.optim.grad_clip import clip_, global_norm
from trinity.parallel.grad_accumulation import defers_reduction, set_reduction
from trinity.parallel.mesh import Ranks
from trinity.training.build import microbatch_size
from trinity.training.host_copy import HostCopy
from trinity.training.step_metrics import of_all_ranks, router_entropy, step_figures, total_counts
from trinity_kernels.cross_entropy import IGNORE


def train_step(
    model: Trinity,
    optimizers: Optimizers,
    batch: Batch,
    config: RunConfig,
    rate: float,
    ranks: Ranks,
    source_counts: Tensor | None = None,
    waited: float = 0.0,
    watch: StepHooks = NO_HOOKS,
) -> dict[str, Any]:
    """One optimizer step on a global batch; every rank calls it with rows of its own, equally many.

    The host reads once what it must know, and waits for the device only while that clips. So a step's optimizer is
    still at work on the device when this returns.

    Args:
        batch: this rank's rows, on the CPU.
        rate: fraction of the peak learning rates.
        source_counts: counts of this rank, of any shape, whose sum over all ranks is wanted.
        waited: seconds that this rank waited for its rows; with source_counts, "data_seconds" is the longest.
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
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm(gradients, ranks.copy_group)
    wanted = of_all_ranks(parts, valid_B, source_counts, waited) | {"norm": norm}
    biases = next_biases(model, total_counts(parts), config.balancing)
    if biases is not None:
        wanted |= {"counts": biases.counts_ME, "bias_range": biases.ranges}
    reading = HostCopy(wanted)
    if config.optim.clip_norm:
        clip_(gradients, norm, config.optim.clip_norm)  # of no harm to a step that is skipped: they are dropped
    known = reading.wait()
    figures = step_figures(known, valid, batch.tokens_BS.shape[1], config)
    grad_norm = known["norm"].item()
    skipped = not (math.isfinite(grad_norm) and math.isfinite(figures["loss"]))
    if not skipped and watch.judge is not None and watch.judge(figures["loss"], grad_norm):
        skipped = watch.skips
    if watch.routed is not None and biases is not None:
        watch.routed(known["counts"].long(), router_entropy(known, batch.tokens_BS.shape[1]))
    if not skipped:
        optimizers.set_rates(rate)
        optimizers.step()
        if biases is not None:
            set_biases(model, biases)
    optimizers.zero_grad()
    return figures | {
        "grad_norm": grad_norm,
        "lr_muon": rate * config.optim.muon.lr,
        "lr_adamw": rate * config.optim.adamw.lr,
        "bias_range": 0.0 if biases is None else known["bias_range"][0 if skipped else 1].item(),
        "skipped": skipped,
    }


def _over_all_ranks(count: Tensor) -> int:
    """A count summed over all ranks, on the CPU: known before the first forward pass, without waiting for a device."""
    count = count.clone()
    dist.all_reduce(count)
    return max(int(count), 1)


def _forward_and_backward(
    model: Trinity, batch: Batch, valid: int, config: RunConfig, ranks: Ranks, watch: StepHooks
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


class Biases(NamedTuple):
    """The balancing state that a step leads to, [M, E] each, on the device.

    counts_ME: tokens of the global batch, int64.
    ranges: [2] fp32, the largest over the layers of max − min of the biases, before and after.
    """

    bias_ME: Tensor
    momentum_ME: Tensor
    counts_ME: Tensor
    ranges: Tensor


@torch.no_grad()
def next_biases(model: Trinity, counts_ME: Tensor | None, config: BalancingConfig) -> Biases | None:
    """Where the counts of the whole global batch move every layer's expert bias; None without MoE layers."""
    if counts_ME is None:
        return None
    layers = moe_layers(model)
    bias_ME = before_ME = torch.stack([layer.expert_bias for layer in layers])
    momentum_ME = torch.stack([layer.expert_momentum for layer in layers])
    if config.kind == "smebu":
        bias_ME, momentum_ME = balancing.smebu_update(
            bias_ME, momentum_ME, counts_ME, config.rate, config.kappa, config.beta
        )
    elif config.kind == "sign":
        bias_ME = balancing.sign_update(bias_ME, counts_ME, config.gamma)
    ranges = [(bias.amax(dim=1) - bias.amin(dim=1)).max() for bias in (before_ME, bias_ME)]
    return Biases(bias_ME, momentum_ME, counts_ME, torch.stack(ranges))


@torch.no_grad()
def set_biases(model: Trinity, biases: Biases) -> None:
    """Move every layer's expert bias there: once a step."""
    for layer, bias_E, momentum_E in zip(moe_layers(model), biases.bias_ME, biases.momentum_ME):
        layer.expert_bias.copy_(bias_E)
        layer.expert_momentum.copy_(momentum_E)


def _without_graph(losses: Losses) -> Losses:
    return Losses(*(None if value is None else value.detach() for value in losses))
