"""The figures of one step over the whole mesh, named as in metrics.jsonl.

Every rank puts its sums and its rows' losses into one vector; gathered, they stand in the order of the stream, so that
no figure depends on how the rows were dealt. Counts have a reduction of their own, which balancing uses as well.

Shapes: R ranks, B rows of one rank, M MoE layers, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.models.trinity import Losses
from trinity.parallel.agree import all_gather_single


def total_counts(parts: list[Losses]) -> Tensor | None:
    """Tokens per layer and expert over the global batch, [M, E] int64: one reduction; None without MoE layers."""
    if parts[0].counts_ME is None:
        return None
    counts_ME = torch.stack([part.counts_ME for part in parts]).sum(dim=0)
    dist.all_reduce(counts_ME)
    return counts_ME


def step_figures(
    parts: list[Losses],
    valid_B: Tensor,
    valid: int,
    counts_ME: Tensor | None,
    config: RunConfig,
    source_counts: Tensor | None = None,
) -> dict[str, Any]:
    """What a step's forward passes say, equal on every rank.

    Args:
        parts: this rank's microbatches, detached.
        valid_B: [B] valid targets of this rank's rows.
        valid: valid targets of the global batch.
        counts_ME: of the global batch.
        source_counts: of this rank; their sums over all ranks come back as lists of their shape.
    """
    gathered = _gathered(parts, valid_B, source_counts)
    rows = len(valid_B)
    # rank r holds the rows r, r + R, r + 2R, … of the batch: transposed, they stand in the stream's order
    ce, valid_rows = (gathered[:, start : start + rows].t().flatten() for start in (0, rows))
    lse_square, sequence_loss, entropy = gathered[:, 2 * rows : 2 * rows + 3].sum(dim=0).tolist()
    figures = {
        "loss": ce.sum().item() / valid,
        "z_loss": config.loss.z * lse_square / valid,
        "batch_het": batch_heterogeneity(ce, valid_rows, config.log.het_sequences),
        "max_head_logit": gathered[:, 2 * rows + 3].max().item(),
    }
    if source_counts is not None:
        figures["source_counts"] = gathered[:, 2 * rows + 4 :].sum(dim=0).view(source_counts.shape).tolist()
    if counts_ME is None:
        return figures
    violation_M = balancing.max_violation(counts_ME)
    return figures | {
        "sequence_loss": config.balancing.sequence_loss * sequence_loss / len(ce),
        "max_violation": violation_M.max().item(),
        "max_violation_mean": violation_M.mean().item(),
        "dead_experts": balancing.dead_share(counts_ME).mean().item(),
        "router_entropy": entropy / (len(ce) * parts[0].ce_BS.shape[1] * len(counts_ME)),
        "starved_experts": int((counts_ME == 0).sum()),
    }


def _gathered(parts: list[Losses], valid_B: Tensor, source_counts: Tensor | None) -> Tensor:
    """[R, 2B + 4 + C] float64 on the CPU: each rank's CE and valid targets by row, four figures (`sums`), and C counts
    (exact up to 2⁵³)."""
    ce_B = torch.cat([part.ce_BS.sum(dim=1) for part in parts]).double()
    zero = ce_B.new_zeros(())
    sums = [
        sum(part.lse_BS.double().square().sum() for part in parts),
        sum((zero if part.sequence_loss_B is None else part.sequence_loss_B.double().sum()) for part in parts),
        sum((zero if part.entropy_sum is None else part.entropy_sum.double()) for part in parts),
        torch.stack([part.top_logit for part in parts]).max().double(),
    ]
    counts = zero.new_empty(0) if source_counts is None else source_counts.flatten().to(ce_B)
    own = torch.cat([ce_B, valid_B.to(ce_B), torch.stack(sums), counts])
    everyone = own.new_empty(dist.get_world_size() * len(own))
    all_gather_single(everyone, own)
    return everyone.view(-1, len(own)).cpu()


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
