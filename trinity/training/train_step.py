"""One training step, in the report's order: microbatches, norm, statistics, clip, Muon and AdamW, biases.

The loss of a step is the mean over the valid targets of its global batch. They are counted first, over all ranks. Every
microbatch divides its loss sum by that count and gradients are added up, so the result depends neither on the
microbatch size nor on the number of ranks. With context parallelism a rank computes a part of the columns of its rows:
its losses are sums over these.

Shapes: B rows of one rank's batch, S sequence, M MoE layers, E experts.
"""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.data.stream.collate import Batch
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
    sequence_length = batch.tokens_BS.shape[1]
    pairs = attention_pairs(config.model, batch.tokens_BS.shape, batch.document_ids_BS, ranks)
    batch = batch.columns(ranks.columns(sequence_length))
    valid_B = (batch.targets_BS != IGNORE).sum(dim=1)
    valid = _all_reduce_count(valid_B.sum())
    losses = _forward_and_backward(model, batch, valid, config, ranks, hooks)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = global_norm(gradients, ranks.shard_group)
    stats = gather_stats(losses, valid_B, grad_norm, source_counts, data_seconds, ranks.sizes.context, pairs)
    biases = balancing.next_biases(moe_layers(model), total_counts(losses), config.balancing)
    if biases is not None:
        stats = stats._replace(counts_ME=biases.counts_ME, bias_ranges=biases.ranges)
    host_copy = HostCopy(stats)
    if config.optim.clip_norm:
        clip_(gradients, grad_norm, config.optim.clip_norm)  # harmless if skipped: zero_grad drops the gradients
    stats = host_copy.wait()
    metrics = step_metrics(stats, valid, sequence_length, config) | {"grad_norm": stats.grad_norm.item()}
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
        router_entropy_M=router_entropy(stats, sequence_length),
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


def _all_reduce_count(count: Tensor) -> int:
    """Sum a count over all ranks, on the CPU, so that it is known before the first forward pass; at least 1."""
    count = count.clone()
    dist.all_reduce(count)
    return max(int(count), 1)


def _forward_and_backward(
    model: Trinity, batch: Batch, valid: int, config: RunConfig, ranks: Ranks, hooks: StepHooks
) -> list[Losses]:
    """Accumulate the gradient of the global batch's mean loss; return the losses of each microbatch, detached."""
    rows = len(batch.tokens_BS)
    size = microbatch_size(rows, config.batch.microbatch)
    alpha = config.balancing.sequence_loss
    defer = defers_reduction(config.parallel.defer_reduce, model, ranks, rows // size)
    done: list[Losses] = []
    for microbatch in batch.microbatches(size, ranks.device):
        set_reduction(model, last=len(done) + 1 == rows // size, defer=defer)
        losses = model(
            microbatch.tokens_BS,
            document_ids_BS=microbatch.document_ids_BS,
            targets_BS=microbatch.targets_BS,
            z=config.loss.z,
            documents=microbatch.documents,
            with_sequence_loss=alpha != 0,
            parts=row_parts(
                ranks.context,
                microbatch.tokens_BS,
                microbatch.row_document_ids_BS,
                microbatch.documents,
                model.attention_engine,
            ),
        )
        loss = losses.token_loss / valid
        if losses.sequence_loss_B is not None:
            loss = loss + alpha * losses.sequence_loss_B.sum() / (rows * ranks.data_ranks)
        loss.backward()
        done.append(Losses._make(None if value is None else value.detach() for value in losses))
        if hooks.microbatch_done is not None:
            hooks.microbatch_done()
    end_accumulation(model)
    return done
