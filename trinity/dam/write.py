"""Write the merged folder: Σ_i W_i·diag(c_i) tensor by tensor, through the writer of trinity.merging.

Arithmetic is in fp32, in the order of the models, and rounded once. Models are read again from their files: no rank
holds a whole merged weight. Expert biases are the models' mean.

Shapes: N models, R rows and I columns of a block.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.dam.layers import total
from trinity.io.checksum import new_hash
from trinity.merging.inputs import Block, Combine, Inputs
from trinity.merging.merge_models import Merged, Merger
from trinity.merging.plan import Plan


class ColumnSum:
    """A merge method for one tensor, with the tensor's coefficients in it.

    Args:
        coefficients_NI: [N, I] or [N, 1], fp32.
    """

    __name__ = "column_sum"

    def __init__(self, coefficients_NI: Tensor) -> None:
        self._coefficients_NI = coefficients_NI

    @property
    def arguments(self) -> dict[str, Any]:
        """What a merge that was interrupted compares, to keep its files or not."""
        digest = new_hash()
        digest.update(self._coefficients_NI.contiguous().numpy().tobytes())
        return {"digest": digest.hexdigest()}

    def __call__(self, inputs: Inputs, digest: str) -> Combine:
        """Merges a block: Σ_i W_i·diag(c_i)."""

        def combine(block: Block) -> Tensor:
            return total([rows_RI * c_I for rows_RI, c_I in zip(block.models, self._coefficients_NI)])

        return combine


def write_merged(plan: Plan, mixed: list[str], values: dict[str, Tensor], directory: Path, progress: bool) -> Merged:
    """Write config, tokenizer and merged weights.

    Args:
        plan: of the models.
        mixed: labels of the N that are mixed.
        values: name on disk → coefficients of every tensor but the expert biases.
        directory: the folder to make.
        progress: show progress on stderr.
    """
    jobs = []
    for job in plan.jobs:
        models = [part for part in job.models if part.label in mixed]
        count = len(models)
        method = ColumnSum(values.get(job.name, torch.full((count, 1), 1.0 / count)))
        jobs.append(replace(job, merge=method, arguments=method.arguments, models=models))
    return Merger(replace(plan, jobs=jobs), directory).run(progress)
