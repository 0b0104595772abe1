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
from trinity.parallel.collectives import all_gather_single


def total_counts(parts: list[Losses]) -> Tensor | None:
    """Tokens per layer and expert over the global batch, [M, E] int64: one reduction; None without MoE layers."""
    if parts[0].counts_ME is None:
        return None
    counts_ME = torch.stack([part.counts_ME for part in parts]).sum(dim=0)
    dist.all_reduce(counts_ME)
    return counts_ME


def of_all_ranks(
    parts: list[Losses], valid_B: Tensor, source_counts: Tensor | None, waited: float = 0.0
) -> dict[str, Tensor]:
    """What each rank has to say of a step, gathered on the device: one collective; step_figures reads it on the host.

    Args:
        parts: this rank's microbatches, detached.
        valid_B: [B] valid targets of this rank's rows.
        source_counts: of this rank, of any shape; exact up to 2⁵³.
        waited: seconds that this rank waited for its rows.
    Returns:
        by name, with R in front, float64: ce [R, B], valid [R, B], sums [R, 3] (lse², sequence loss, waited),
        top_logit [R, 1], entropy [R, M], and source_counts [R, …].
    """
    ce_B = torch.cat([part.ce_BS.sum(dim=1) for part in parts]).double()
    zero = ce_B.new_zeros(())
    sums = [
        sum(part.lse_BS.double().square().sum() for part in parts),
        sum((zero if part.sequence_loss_B is None else part.sequence_loss_B.double().sum()) for part in parts),
        ce_B.new_full((), waited),
    ]
    own = {
        "ce": ce_B,
        "valid": valid_B.to(ce_B),
        "sums": torch.stack(sums),
        "top_logit": torch.stack([part.top_logit for part in parts]).amax(dim=0, keepdim=True).double(),
    }
    if parts[0].entropy_M is not None:
        own["entropy"] = torch.stack([part.entropy_M for part in parts]).sum(dim=0).double()
    if source_counts is not None:
        own["source_counts"] = source_counts.to(ce_B)
    flat = torch.cat([tensor.flatten() for tensor in own.values()])
    everyone = flat.new_empty(dist.get_world_size() * len(flat))
    all_gather_single(everyone, flat)
    gathered = everyone.view(-1, len(flat)).split([tensor.numel() for tensor in own.values()], dim=1)
    return {name: part.unflatten(1, tensor.shape) for (name, tensor), part in zip(own.items(), gathered)}


def step_figures(known: dict[str, Tensor], valid: int, sequence: int, config: RunConfig) -> dict[str, Any]:
    """What a step's forward passes say, equal on every rank.

    Args:
        known: of_all_ranks, and counts [M, E] of the global batch where there are MoE layers; on the CPU.
        valid: valid targets of the global batch.
        sequence: tokens of a row.
    """
    # rank r holds the rows r, r + R, r + 2R, … of the batch: transposed, they stand in the stream's order
    ce, valid_rows = (known[name].t().flatten() for name in ("ce", "valid"))
    lse_square, sequence_loss, _ = known["sums"].sum(dim=0).tolist()
    figures = {
        "loss": ce.sum().item() / valid,
        "z_loss": config.loss.z * lse_square / valid,
        "batch_het": batch_heterogeneity(ce, valid_rows, config.log.het_sequences),
        "max_head_logit": known["top_logit"].max().item(),
    }
    if "source_counts" in known:
        figures["source_counts"] = known["source_counts"].sum(dim=0).tolist()
        figures["data_seconds"] = known["sums"][:, 2].max().item()
    if "counts" not in known:
        return figures
    counts_ME = known["counts"]
    violation_M = balancing.max_violation(counts_ME)
    return figures | {
        "sequence_loss": config.balancing.sequence_loss * sequence_loss / len(ce),
        "max_violation": violation_M.max().item(),
        "max_violation_mean": violation_M.mean().item(),
        "dead_experts": balancing.dead_share(counts_ME).mean().item(),
        "router_entropy": router_entropy(known, sequence).mean().item(),
        "starved_experts": int((counts_ME == 0).sum()),
    }


def router_entropy(known: dict[str, Tensor], sequence: int) -> Tensor:
    """[M]: the mean over the global batch's tokens of the entropy of s/Σs in nats; see step_figures."""
    return known["entropy"].sum(dim=0) / (known["ce"].numel() * sequence)


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
