"""One training step, in the report's order: microbatches, norm, statistics, clip, Muon and AdamW, biases.

The loss of a step is the mean over the valid targets of its global batch. They are counted first, over all ranks. Every
microbatch divides its loss sum by that count and gradients are added up, so the result depends neither on the
microbatch size nor on the number of ranks. Where targets have weights (loss.per=example), the same holds of weighted
sums and the sum of the weights. With context parallelism a rank computes a part of the columns of its rows: its losses
are sums over these.

Shapes: B rows of one rank's batch, S sequence, M MoE layers, E experts.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.data.stream.collate import Batch, count_padding
from trinity.models.trinity import Losses, Trinity, moe_layers
from trinity.monitor.hooks import NO_HOOKS, SkipReason, StepHooks, StepResult
from trinity.optim.build import Optimizers
from trinity.optim.grad_clip import clip_, global_norm
from trinity.parallel.context_parallel import row_parts
from trinity.parallel.grad_accumulation import defers_reduction, end_accumulation, set_reduction
from trinity.parallel.mesh import Ranks
from trinity.training.attention_pairs import attention_pairs
from trinity.training.divisibility import microbatch_size
from trinity.training.step_metrics import (
    HostCopy,
    StepStats,
    gather_stats,
    router_entropy,
    step_metrics,
    total_counts,
)
from trinity_kernels.cross_entropy import IGNORE

MOST_TRAINED = 0.75
"""With at most this share of the global batch's tokens trained, the head is computed for these tokens alone.

Pre-training trains on more than this, and its results keep their bits."""


class Targets(NamedTuple):
    """The targets of a step.

    trained_B: [B] targets of each of this rank's rows.
    weight_B: [B] the sums of their weights; without weights, the same numbers.
    total: that of the global batch, by which the loss is divided; 1 if there is no target.
    trained_only: whether the head is computed for tokens with a target alone: decided for the global batch, so that
        no result depends on the mesh or the microbatches.
    """

    trained_B: Tensor
    weight_B: Tensor
    total: float
    trained_only: bool


def train_step(
    model: Trinity,
    optimizers: Optimizers,
    batch: Batch,
    config: RunConfig,
    rate: float,
    ranks: Ranks,
    source_counts: Tensor | None = None,
    data_seconds: float = 0.0,
    hooks: StepHooks = NO_HOOKS,
) -> StepResult:
    """Take one optimizer step on a global batch; every rank calls it with the same number of rows.

    The host reads from the device once, while it clips. The optimizer may still run on the device when this returns.

    Args:
        batch: this rank's rows, on the CPU; whole rows, of which it computes the columns that ranks.columns names.
        rate: fraction of the peak learning rates.
        source_counts: [N] tokens that this rank read of each source, to be summed over all ranks.
        data_seconds: seconds that this rank waited for its rows; with source_counts, the metrics hold the largest.
        hooks: what the monitor does during the step.
    Returns:
        The metrics, and the reason if the step was skipped: then no weight, no momentum and no bias has changed.
    """
    pairs = attention_pairs(config.model, batch.tokens_BS.shape, batch.document_ids_BS, ranks)
    batch = batch.columns(ranks.columns(batch.tokens_BS.shape[1]))
    targets = _count_targets(batch)
    losses = _forward_and_backward(model, batch, targets, config, ranks, hooks)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = global_norm(gradients, ranks.shard_group)
    sizes = batch.weights_BS, ranks.sizes.context, pairs
    stats = gather_stats(losses, targets.weight_B, grad_norm, source_counts, data_seconds, *sizes)
    biases = balancing.next_biases(moe_layers(model), total_counts(losses), config.balancing)
    if biases is not None:
        stats = stats._replace(counts_ME=biases.counts_ME, bias_ranges=biases.ranges)
    host_copy = HostCopy(stats)
    if config.optim.clip_norm:
        clip_(gradients, grad_norm, config.optim.clip_norm)  # harmless if skipped: zero_grad drops the gradients
    stats = host_copy.wait()
    metrics = step_metrics(stats, targets.total, config) | {"grad_norm": stats.grad_norm.item()}
    skip_reason, spike = _skip_reason(metrics["loss"], metrics["grad_norm"], hooks)
    if skip_reason is None:
        optimizers.set_rates(rate)
        optimizers.step()
        if biases is not None:
            balancing.set_biases(moe_layers(model), biases)
    optimizers.zero_grad()
    metrics |= _update_metrics(rate, config, stats, skipped=skip_reason is not None)
    return StepResult(
        metrics,
        skip_reason,
        spike,
        source_counts=None if stats.source_counts_RN is None else stats.source_counts_RN.sum(dim=0).tolist(),
        counts_ME=None if stats.counts_ME is None else stats.counts_ME.long(),
        router_entropy_M=router_entropy(stats, config.model.active_experts),
        attention_spread=stats.attention_spread,
    )


def _update_metrics(rate: float, config: RunConfig, stats: StepStats, skipped: bool) -> dict[str, Any]:
    """Metrics of the update, or of the state that a skipped step leaves as it is."""
    return {
        "lr_muon": rate * config.optim.muon.lr,
        "lr_adamw": rate * config.optim.adamw.lr,
        "bias_range": 0.0 if stats.bias_ranges is None else stats.bias_ranges[0 if skipped else 1].item(),
        "skipped": skipped,
    }


def _skip_reason(loss: float, grad_norm: float, hooks: StepHooks) -> tuple[SkipReason | None, str | None]:
    """Why the step is skipped, None if it is not; and the description of a spike, None without one."""
    if not (math.isfinite(grad_norm) and math.isfinite(loss)):
        return "not finite", None
    spike = None if hooks.detect_spike is None else hooks.detect_spike(loss, grad_norm)
    return "spike" if spike is not None and hooks.skip_spikes else None, spike


def _count_targets(batch: Batch) -> Targets:
    """Count the targets of this rank's rows and of the global batch: one all-reduce, on the CPU."""
    trained_BS = batch.targets_BS != IGNORE
    trained_B = trained_BS.sum(dim=1)
    most = MOST_TRAINED * trained_BS.numel() * dist.get_world_size()
    if batch.weights_BS is None:
        trained = _all_reduce_count(trained_B.sum())
        return Targets(trained_B, trained_B, trained, trained <= most)
    weight_B = batch.weights_BS.double().where(trained_BS, 0.0).sum(dim=1)
    sums = torch.stack((weight_B.sum(), trained_B.sum().double()))
    dist.all_reduce(sums)
    weight, trained = sums.tolist()
    return Targets(trained_B, weight_B, weight or 1.0, trained <= most)


def _all_reduce_count(count: Tensor) -> int:
    """Sum a count over all ranks, on the CPU, so that it is known before the first forward pass; at least 1."""
    count = count.clone()
    dist.all_reduce(count)
    return max(int(count), 1)


def _forward_and_backward(
    model: Trinity, batch: Batch, targets: Targets, config: RunConfig, ranks: Ranks, hooks: StepHooks
) -> list[Losses]:
    """Accumulate the gradient of the global batch's mean loss; return the losses of each microbatch, detached."""
    rows = len(batch.tokens_BS)
    size = microbatch_size(rows, config.batch.microbatch)
    alpha = config.balancing.sequence_loss
    defer = defers_reduction(config.parallel.defer_reduce, model, ranks, rows // size)
    padding_B = count_padding(batch)
    done: list[Losses] = []
    for microbatch in batch.microbatches(size, ranks.device):
        part = slice(len(done) * size, (len(done) + 1) * size)
        set_reduction(model, last=len(done) + 1 == rows // size, defer=defer)
        losses = model(
            microbatch.tokens_BS,
            document_ids_BS=microbatch.document_ids_BS,
            targets_BS=microbatch.targets_BS,
            z=config.loss.z,
            documents=microbatch.documents,
            with_sequence_loss=alpha != 0,
            weights_BS=microbatch.weights_BS,
            padding=int(padding_B[part].sum()),
            trained=int(targets.trained_B[part].sum()) if targets.trained_only else None,
            parts=row_parts(
                ranks.context,
                microbatch.tokens_BS,
                microbatch.row_document_ids_BS,
                microbatch.documents,
                model.attention_engine,
            ),
        )
        loss = losses.token_loss / targets.total
        if losses.sequence_loss_B is not None:
            loss = loss + alpha * losses.sequence_loss_B.sum() / (rows * ranks.data_ranks)
        loss.backward()
        done.append(Losses._make(None if value is None else value.detach() for value in losses))
        if hooks.microbatch_done is not None:
            hooks.microbatch_done()
    end_accumulation(model)
    return done
