"""Merge one tensor of a plan, block by block: shared by merges into a folder and into a model in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.merging.experts import ExpertMatcher, first_and_others
from trinity.merging.inputs import Inputs, Reader
from trinity.merging.plan import Job, Part, Plan
from trinity.merging.sources import Source
from trinity.merging.tensors import EMBED, HEAD
from trinity.merging.vocabulary import EmbeddingRows

WriteRows = Callable[[int, Tensor], None]
"""write(first element, rows): put rows of a tensor into its place."""
_FINITE = torch.finfo(torch.float32).max


class InfiniteResult(UserError):
    """Finite inputs and a method's parameters give a value that the output's data type does not hold."""


class TensorMerger:
    """Carries out the jobs of a plan, in any order and by several threads.

    Args:
        plan: gives sources, vocabulary, seed, and whether experts are matched; its own jobs are not used.
        sources: label → source to read from in place of the plan's.
        keep_orders: keep the order of the experts of every layer, for merges that are repeated.
    """

    def __init__(self, plan: Plan, sources: Mapping[str, Source] | None = None, keep_orders: bool = False) -> None:
        self._plan = plan
        self._sources = dict(plan.sources if sources is None else sources)
        self._embeddings = EmbeddingRows(plan.vocabulary, self._sources)
        self._matcher = ExpertMatcher(self._sources, keep_orders) if plan.recipe.match_experts else None

    def merge(self, job: Job, write: WriteRows) -> None:
        """Merge a tensor and write its rows, fp32, in order.

        Raises:
            UserError: an input holds NaN or infinity.
            InfiniteResult: the result is not finite in the job's data type.
        """
        base = None if job.base is None else self.reader(job.base, job)
        inputs = Inputs(job.shape, base, [self.reader(part, job) for part in job.models], self._seed(job))
        combine = job.merge(inputs, **job.arguments)
        limit = torch.finfo(job.dtype).max
        for block in inputs:
            rows = combine(block)
            if not _within(rows, limit):
                raise InfiniteResult(
                    f"{job.name} becomes infinite in {job.dtype}; change the weights, or set out_dtype"
                )
            write(block.first, rows)

    def reader(self, part: Part, job: Job) -> Reader:
        """The reader of an input, with the rows of tokens and the experts in the order of the merged model."""
        source = self._sources[part.label]
        rows: Tensor | None = None
        if self._plan.vocabulary.rows is not None and job.name in (EMBED, HEAD):
            rows = self._embeddings.read(part.label, part.name)
        elif self._matcher is not None and part != (first := first_and_others(job)[0]):
            rows = self._matcher.read(part, first)
        if rows is not None:
            whole = rows
            return lambda start, stop: _finite(whole[start:stop], part)
        return lambda start, stop: _finite(source.read(part.name, start, stop).float(), part)

    def _seed(self, job: Job) -> str:
        return f"{self._plan.recipe.seed}/{job.name}"


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each operation, so that sums have one order; the workers of a merge are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(rows: Tensor, part: Part) -> Tensor:
    if not _within(rows, _FINITE):
        raise UserError(
            f"{part.name} of {part.label} holds NaN or infinity; repair the model, or take another checkpoint"
        )
    return rows


def _within(rows: Tensor, limit: float) -> bool:
    """Whether all values are between ±limit; NaN is not."""
    if not rows.numel():
        return True
    low, high = torch.aminmax(rows)
    return -limit <= float(low) and float(high) <= limit
