"""Merge into a model in memory, again and again with other parameters: the trials of a search write no weights.

The jobs are those of a merge into a folder, by the same functions on the same blocks, and each result is rounded to the
data type that the folder would have. So the model is the one that load_hf reads from the folder, to the last bit.
A tensor is merged anew only if its method or parameters changed since the last merge.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trinity.config.hf_config import from_hf_config
from trinity.merging.folder_files import merged_config
from trinity.merging.load_model import empty_model, parts_of
from trinity.merging.plan import Job, Part, Plan
from trinity.merging.sources import FolderSource, Source
from trinity.merging.tensor_merger import TensorMerger, one_thread
from trinity.merging.writer import run_jobs


class MemoryMerge:
    """A model in fp32 that becomes the result of one merge after the other.

    Args:
        plan: the checked merge; the parameters of its jobs may change, its models and tokenizer stay.
        device: of the model; tensors are merged on the CPU.
        workers: threads that merge.

    Attributes:
        model: the merged model; its weights are not set before the first `merge`.
        merged: tensors merged so far, over all calls.

    Raises:
        UserError: the slices make a model that Trinity does not compute.
    """

    def __init__(self, plan: Plan, device: str = "cpu", workers: int = 1) -> None:
        self.model = empty_model(from_hf_config(merged_config(plan))).to(device)
        self.merged = 0
        self._parts = parts_of(self.model)
        self._workers = workers
        self._merger = TensorMerger(plan, {label: held(each) for label, each in plan.sources.items()}, keep_orders=True)
        self._last: dict[str, tuple] = {}

    def merge(self, jobs: Iterable[Job]) -> None:
        """Make the model the result of these jobs, those of a plan or of `plan_jobs`.

        Raises:
            UserError: an input holds NaN or infinity; InfiniteResult: the result is not finite in its data type.
        """
        changed = [job for job in jobs if self._last.get(job.name) != _key(job)]
        with one_thread():
            run_jobs(changed, self._merge, self._workers, self._done)

    @torch.no_grad()
    def _merge(self, job: Job) -> None:
        result = torch.empty(job.shape, dtype=job.dtype)
        flat = result.view(-1)

        def write(first: int, rows: Tensor) -> None:
            flat[first : first + rows.numel()] = rows.reshape(-1)

        self._merger.merge(job, write)
        self._parts[job.name].copy_(result)

    def _done(self, job: Job) -> None:
        self._last[job.name] = _key(job)
        self.merged += 1


class HeldSource(Source):
    """A model whose tensors are read once and kept in memory, in the data types in which they are stored."""

    def __init__(self, source: Source) -> None:
        self.label, self.folder, self.files = source.label, source.folder, source.files
        self.config, self.raw_config, self.entries = source.config, source.raw_config, source.entries
        self.tokenizer, self.generation_config, self.opened = source.tokenizer, source.generation_config, source.opened
        self._source = source
        self._held: dict[str, Tensor] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._held:
            self._held[name] = self._source.read(name, 0, self._source.rows(name))
        return self._held[name][start:stop]

    def identity(self) -> list[Any]:
        return self._source.identity()


def held(source: Source) -> Source:
    """The source, or a copy in memory of one that is slow to read again: the checkpoint of a run.

    Folders are read with pread: the system keeps their files in the page cache where there is room for them.
    """
    return source if isinstance(source, FolderSource) else HeldSource(source)


def _key(job: Job) -> tuple[Any, dict[str, Any], Part | None, list[Part]]:
    return job.merge, job.arguments, job.base, job.models
