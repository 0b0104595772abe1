"""Tokens per expert of a validation set, counted row by row from the choices of the routing operation.

Shapes: M MoE layers, E experts, K experts chosen per token, T tokens of a row.
"""

from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import trinity_kernels
from trinity.balancing import dead_share, max_violation
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.validation import validation_sequences
from trinity.models import Trinity


def count_choices(model: Trinity, shards: Path, sequence_length: int, rows: int, after_document: bool) -> Tensor:
    """[M, E]: each row by itself, without its padding, its documents separate.

    Args:
        after_document: the run's data.loss_on_document_start.
    """
    choices: list[Tensor] = []
    route = trinity_kernels.route

    def record(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        indices_TK, counts_E = route(*args, **kwargs)
        choices.append(indices_TK)
        return indices_TK, counts_E

    counts_ME = torch.zeros(model.config.moe_layers, model.config.experts, dtype=torch.int64)
    with mock.patch.object(trinity_kernels, "route", record), torch.no_grad():
        for row in validation_sequences(TokenSource(shards), sequence_length, rows, after_document):
            trained = [place for place, target in enumerate(row.targets.tolist()) if target != -100]
            end = trained[-1] + 1
            choices.clear()
            model(row.tokens[None, :end], document_ids_BS=row.document_ids[None, :end])
            for layer, indices_TK in enumerate(choices):
                for expert in indices_TK.flatten().tolist():
                    counts_ME[layer, expert] += 1
    return counts_ME


def expected_metrics(counts_ME: Tensor, name: str) -> dict[str, float]:
    """The fields of metrics.jsonl of a validation set with these counts."""
    return {
        f"validation_max_violation.{name}": max_violation(counts_ME).max().item(),
        f"validation_max_violation_mean.{name}": max_violation(counts_ME).mean().item(),
        f"validation_dead_experts.{name}": dead_share(counts_ME).mean().item(),
    }
