"""Write the safetensors files of a merge, tensor by tensor at planned places, in any order and by several threads.

The header of a file is known before its first tensor: names, types and offsets follow from the plan. Rows are written
where they belong as soon as they are merged. So no file is held in memory, and its bytes depend neither on the order
nor on the number of threads. A file gets its name when it is whole (trinity/io/local.py).
"""

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.interop.output_folder import write_hf_json
from trinity.io.json_files import to_json
from trinity.io.local import atomic_file
from trinity.merging.plan import Job
from trinity.merging.sources import byte_view
from trinity.merging.tensor_merger import WriteRows

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

Work = Callable[[Job, WriteRows], None]
"""Merges one tensor and writes its rows."""


@dataclass
class OutputFile:
    """One safetensors file: its name, its tensors, and their offsets in the data part."""

    name: str
    jobs: list[Job]
    offsets: dict[str, int] = field(default_factory=dict)
    header: bytes = b""

    def __post_init__(self) -> None:
        # the widest type first, so that every tensor is aligned; the order of safetensors' own writer
        end = 0
        listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for job in sorted(self.jobs, key=lambda job: (-job.dtype.itemsize, job.name)):
            self.offsets[job.name] = end
            entry = {"dtype": _NAMES[job.dtype], "shape": list(job.shape), "data_offsets": [end, end + job.bytes]}
            listed[job.name] = entry
            end += job.bytes
        text = to_json(listed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(job.bytes for job in self.jobs)


def plan_files(jobs: list[Job], max_shard_bytes: int) -> list[OutputFile]:
    """Divide the tensors among files of at most `max_shard_bytes`; a larger tensor gets a file of its own."""
    groups: list[list[Job]] = [[]]
    room = max_shard_bytes
    for job in jobs:
        if groups[-1] and job.bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(job)
        room -= job.bytes
    if len(groups) == 1:
        return [OutputFile("model.safetensors", groups[0])]
    return [OutputFile(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def write_file(file: OutputFile, folder: Path, work: Work, workers: int, done: Callable[[Job], None]) -> None:
    """Merge and write all tensors of a file.

    Args:
        file: what to write.
        folder: where.
        work: merges one tensor.
        workers: number of threads.
        done: called in the calling thread after each tensor, in order.
    """
    with atomic_file(folder / file.name) as handle:
        descriptor = handle.fileno()
        _write_at(descriptor, memoryview(file.header), 0)

        def run(job: Job) -> None:
            start = len(file.header) + file.offsets[job.name]
            work(job, lambda first, rows: _write_rows(descriptor, start + first * job.dtype.itemsize, job, rows))

        run_jobs(file.jobs, run, workers, done)


def run_jobs(jobs: list[Job], run: Callable[[Job], None], workers: int, done: Callable[[Job], None]) -> None:
    """Run every job in one of several threads; see write_file."""
    if workers == 1:
        for job in jobs:
            run(job)
            done(job)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job, future in [(job, pool.submit(run, job)) for job in jobs]:
            future.result()
            done(job)
    finally:
        pool.shutdown(cancel_futures=True)


def write_index(files: list[OutputFile], folder: Path) -> None:
    """Write the index of several files; a single one has none."""
    if len(files) == 1:
        return
    jobs = [job for file in files for job in file.jobs]
    totals = {
        "total_parameters": sum(prod(job.shape) for job in jobs),
        "total_size": sum(job.bytes for job in jobs),
    }
    file_by_tensor = {job.name: file.name for file in files for job in file.jobs}
    index = {"metadata": totals, "weight_map": dict(sorted(file_by_tensor.items()))}
    write_hf_json(folder / "model.safetensors.index.json", index)


def _write_rows(descriptor: int, offset: int, job: Job, rows: Tensor) -> None:
    stored = rows.to(job.dtype).contiguous()
    if stored.numel():
        _write_at(descriptor, byte_view(stored), offset)


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count
