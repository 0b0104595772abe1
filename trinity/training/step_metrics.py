"""Metrics of one step over all ranks, under their names in metrics.jsonl.

Each rank puts its sums and the losses of its rows into one vector. Gathered over all ranks, the rows are put back into
stream order, so no metric depends on how rows were distributed. With context parallelism the ranks of a group have
parts of the same rows: sums of a row are added over them, and rows have one line for each group. Expert counts are
reduced separately, because balancing uses them on the device. Everything that the host needs then crosses in one copy
(HostCopy).

Shapes: R ranks (of rows and source counts: groups of ranks), B rows of one rank, M MoE layers, E experts, N token
sources.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.models.trinity import Losses
from trinity.parallel.collectives import all_gather_single


class StepStats(NamedTuple):
    """Statistics of one step: on the device, or as HostCopy returns them (all float64, on the CPU).

    Gathered from every rank, float64:
        ce_RB: cross-entropy of each row, summed over its tokens, each times its weight if targets have weights.
        valid_RB: valid targets of each row, or the sum of their weights.
        sums_R3: Σ lse², weighted likewise, Σ sequence loss, and the seconds that the rank waited for its rows.
        top_logit_R1: the largest logit.
        entropy_RM: Σ over tokens of each router's entropy; None without MoE layers.
        source_counts_RN: tokens read of each source; None where they are not counted.
    Equal on every rank:
        grad_norm: scalar, before clipping.
        counts_ME: tokens of the global batch per layer and expert; None without MoE layers.
        bias_ranges: [2], the largest max − min of a layer's expert biases, before and after the step; None likewise.
    Gathered from every rank, float64, too:
        pairs_R1: pairs of query and key in attention (attention_pairs.py); None where they are not counted.
    """

    ce_RB: Tensor
    valid_RB: Tensor
    sums_R3: Tensor
    top_logit_R1: Tensor
    entropy_RM: Tensor | None
    source_counts_RN: Tensor | None
    grad_norm: Tensor
    counts_ME: Tensor | None = None
    bias_ranges: Tensor | None = None
    pairs_R1: Tensor | None = None

    @property
    def attention_spread(self) -> float | None:
        """The most pairs of a rank over the mean of the ranks; None where they are not counted."""
        return None if self.pairs_R1 is None else (self.pairs_R1.max() / self.pairs_R1.mean()).item()


def total_counts(losses: list[Losses]) -> Tensor | None:
    """Tokens per layer and expert over the global batch, [M, E] int64: one all-reduce; None without MoE layers."""
    counts = [microbatch.counts_ME for microbatch in losses if microbatch.counts_ME is not None]
    if not counts:
        return None
    counts_ME = torch.stack(counts).sum(dim=0)
    dist.all_reduce(counts_ME)
    return counts_ME


def gather_stats(
    losses: list[Losses],
    valid_B: Tensor,
    grad_norm: Tensor,
    source_counts_N: Tensor | None = None,
    data_seconds: float = 0.0,
    weights_BS: Tensor | None = None,
    context: int = 1,
    pairs: float = 0.0,
) -> StepStats:
    """Gather one step's statistics from all ranks, on the device: one all-gather.

    Args:
        losses: of this rank's microbatches, detached.
        valid_B: [B] valid targets of this rank's rows, or the sums of their weights.
        grad_norm: scalar, equal on every rank.
        source_counts_N: tokens that this rank read of each source, exact up to 2⁵³; None where they are not counted.
        data_seconds: seconds that this rank waited for its rows.
        weights_BS: [B, S] weights of the targets, on the CPU; None: 1.
        context: how many ranks have parts of the same rows.
        pairs: this rank's pairs of query and key in attention.
    """
    weights = [None] * len(losses) if weights_BS is None else weights_BS.to(losses[0].ce_BS).chunk(len(losses))
    ce_B = torch.cat([_weighted(part.ce_BS, weight).sum(dim=1) for part, weight in zip(losses, weights)]).double()
    zero = ce_B.new_zeros(())
    sequence_losses = [microbatch.sequence_loss_B for microbatch in losses]
    sums = [
        sum((_weighted(x.lse_BS.double().square(), weight).sum() for x, weight in zip(losses, weights)), start=zero),
        sum((zero if loss_B is None else loss_B.double().sum() for loss_B in sequence_losses), start=zero),
        ce_B.new_full((), data_seconds),
    ]
    top_logit = torch.stack([microbatch.top_logit for microbatch in losses]).amax(dim=0, keepdim=True).double()
    entropies = [microbatch.entropy_M for microbatch in losses if microbatch.entropy_M is not None]
    entropy_M = torch.stack(entropies).sum(dim=0).double() if entropies else None
    source_counts_N = None if source_counts_N is None else source_counts_N.to(ce_B)
    pairs_1 = ce_B.new_full((1,), pairs)
    local = [ce_B, valid_B.to(ce_B), torch.stack(sums), top_logit, entropy_M, source_counts_N, pairs_1]
    flat = torch.cat([tensor for tensor in local if tensor is not None])
    gathered = flat.new_empty(dist.get_world_size() * len(flat))
    all_gather_single(gathered, flat)
    columns = gathered.view(-1, len(flat)).split([0 if tensor is None else len(tensor) for tensor in local], dim=1)
    ce_RB, valid_RB, sums_R3, top_logit_R1, entropy_RM, source_counts_RN, pairs_R1 = columns
    return StepStats(
        ce_RB.unflatten(0, (-1, context)).sum(dim=1),
        valid_RB.unflatten(0, (-1, context)).sum(dim=1),
        sums_R3,
        top_logit_R1,
        None if entropy_M is None else entropy_RM,
        None if source_counts_N is None else source_counts_RN[::context],  # a group reads its rows on each rank
        grad_norm,
        pairs_R1=pairs_R1,
    )


def _weighted(values_BS: Tensor, weights_BS: Tensor | None) -> Tensor:
    return values_BS if weights_BS is None else values_BS * weights_BS


class HostCopy:
    """Copy a step's statistics to the host in one asynchronous transfer.

    The copy is enqueued when this object is made, behind the work that the device has so far. Work enqueued afterwards
    runs on the device while the host waits for the copy, so the device stays busy if that work takes longer than the
    host needs to enqueue more.

    Args:
        stats: on one device; floating point, or integers below 2⁵³.
    """

    def __init__(self, stats: StepStats) -> None:
        tensors = {name: tensor for name, tensor in stats._asdict().items() if tensor is not None}
        self._shapes: dict[str, torch.Size] = {name: tensor.shape for name, tensor in tensors.items()}
        self._values = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._done: torch.cuda.Event | None = None
        if self._values.is_cuda:
            # an asynchronous copy to the host must end in pinned memory
            pinned = torch.empty_like(self._values, device="cpu", pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> StepStats:
        """Wait for the copy; return the statistics in float64 on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        columns = self._values.split([shape.numel() for shape in self._shapes.values()])
        tensors: dict[str, Any] = dict.fromkeys(StepStats._fields)
        tensors |= {name: column.view(shape) for (name, shape), column in zip(self._shapes.items(), columns)}
        return StepStats(**tensors)


def step_metrics(stats: StepStats, valid: float, config: RunConfig) -> dict[str, Any]:
    """Metrics of a step's forward passes, equal on every rank.

    Args:
        stats: from HostCopy.
        valid: valid targets of the global batch, or the sum of their weights.
        config: the run's.
    """
    # data rank r holds the rows r, r + R, r + 2R, … of the batch: transposed, they are in stream order
    ce, valid_rows = stats.ce_RB.t().flatten(), stats.valid_RB.t().flatten()
    lse_square, sequence_loss, _ = stats.sums_R3.sum(dim=0).tolist()
    metrics = {
        "loss": ce.sum().item() / valid,
        "z_loss": config.loss.z * lse_square / valid,
        "batch_het": batch_heterogeneity(ce, valid_rows, config.log.het_sequences),
        "max_head_logit": _largest_logit(stats.top_logit_R1),
    }
    if stats.source_counts_RN is not None:
        metrics["data_seconds"] = stats.sums_R3[:, 2].max().item()
    entropy_M = router_entropy(stats, config.model.active_experts)
    if stats.counts_ME is None or entropy_M is None:
        return metrics
    violation_M = balancing.max_violation(stats.counts_ME)
    return metrics | {
        "sequence_loss": config.balancing.sequence_loss * sequence_loss / len(ce),
        "max_violation": violation_M.max().item(),
        "max_violation_mean": violation_M.mean().item(),
        "dead_experts": balancing.dead_share(stats.counts_ME).mean().item(),
        "router_entropy": entropy_M.mean().item(),
        "starved_experts": int((stats.counts_ME == 0).sum()),
    }


def _largest_logit(top_logit_R1: Tensor) -> float:
    """The largest of all ranks; 0 where no rank computed a logit, which is −∞ in fine-tuning without a target."""
    top = top_logit_R1.max().item()
    return 0.0 if top == -math.inf else top


def router_entropy(stats: StepStats, active: int) -> Tensor | None:
    """[M]: mean over the global batch's routed tokens of the entropy of s/Σs, in nats; None without MoE layers.

    Args:
        active: K, so that the counts of a layer sum to K times its routed tokens: all tokens but padding.
    """
    if stats.entropy_RM is None or stats.counts_ME is None:
        return None
    return stats.entropy_RM.sum(dim=0) / (stats.counts_ME.sum(dim=1) / active).clamp_min(1)


def batch_heterogeneity(ce_B: Tensor, valid_B: Tensor, group: int) -> float:
    """BatchHet (eq. 40): largest minus mean loss over groups of `group` consecutive rows.

    Args:
        ce_B: [B], each row's summed cross-entropy, rows in stream order.
        valid_B: [B], each row's valid targets.
        group: rows in a group; a last, smaller group counts like the others.
    """
    sums = torch.stack([rows.sum() for rows in ce_B.split(group)])
    losses = sums / torch.stack([rows.sum() for rows in valid_B.split(group)]).clamp_min(1)
    return (losses.max() - losses.mean()).item()
