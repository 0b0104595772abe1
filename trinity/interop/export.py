"""Export a model as a Hugging Face folder, the same as transformers itself would write.

Tensors are streamed. In addition to the model, rank 0 holds one matrix and the tensors of one file, and each rank that
takes part in a gather holds one matrix. The folder is written under a temporary name and renamed when it is complete,
so a partial export is never read.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trinity.config.hf_config import to_hf_config
from trinity.config.model import ModelConfig
from trinity.errors import UserError
from trinity.interop.output_folder import SHARD_BYTES, check_replaceable, partial_folder, replace_folder, write_hf_json
from trinity.interop.tensors import gather_part, part_shape, storage_dtypes
from trinity.interop.tokenizer_files import SpecialIds, copy_tokenizer, generation_config, special_ids
from trinity.interop.weight_map import Index, weight_map
from trinity.io.local import atomic_path, make_folder, resolve_path
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import errors_reach_all_ranks, run_on_rank0
from trinity.terminal import Progress


def export_hf(
    model: Trinity,
    directory: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    beat: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> Path:
    """Write a model as a folder that transformers, vLLM and llama.cpp read.

    Every rank of a sharded model must call this: gathering a parameter is a collective. Rank 0 writes.

    Args:
        model: sharded by FSDP2 or not, on any device; not changed.
        directory: the folder to make.
        tokenizer: folder of a tokenizer, to copy its files and special tokens.
        dtype: data type of the matrices; gains, routers and expert_bias are always fp32.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        overwrite: replace an earlier export in `directory`.
        beat: called after each file.
        progress: show progress on stderr, in bytes gathered.
    Returns:
        directory.
    Raises:
        UserError: `directory` is not empty and not an earlier export, or is one and `overwrite` is False; or the
            tokenizer cannot be used; or hooks changed the model's architecture.
    """
    directory = resolve_path(directory)
    partial = partial_folder(directory)
    first = not dist.is_initialized() or dist.get_rank() == 0

    def begin() -> None:
        check_replaceable(directory, overwrite)
        ids = SpecialIds() if tokenizer is None else special_ids(Path(tokenizer), model.config.vocab_size)
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted export
        make_folder(partial)
        _write_configs(model.config, ids, dtype, partial)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), partial)

    def end() -> None:
        _write_index(files, partial)
        replace_folder(partial, directory)

    try:
        run_on_rank0(begin)
        # state_dict makes FSDP2 reshard: after a forward without backward, parameters may still be gathered
        state = model.state_dict()
        files = _plan(model, state, dtype, max_shard_bytes)
        total = sum(part.bytes for parts in files.values() for part in parts)
        with Progress("exporting", total, "B", progress and first, scaled=True) as gathered:
            _write_tensors(state, files, partial if first else None, beat, gathered)
        run_on_rank0(end)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # free the space on a full disk
        raise
    return directory


def _refuse_variant(model: Trinity) -> None:
    if model.variant is not None:
        raise UserError(
            f"the architecture of this model was changed ({model.variant}), which AfMoE cannot express; export a model "
            "without the change"
        )


@dataclass(frozen=True)
class _Part:
    """One tensor on disk: its name there, the part of the parameter or buffer that it holds, and its storage."""

    name: str
    parameter: str
    index: Index
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _plan(model: Trinity, state: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[_Part]]:
    """File name → its tensors. The parts of a parameter are consecutive."""
    _refuse_variant(model)
    dtypes = storage_dtypes(model, dtype)
    by_parameter: dict[str, list[_Part]] = {}
    for name, parameter, index in weight_map(model.config):
        shape, stored = part_shape(state[parameter].shape, index), dtypes.get(parameter, torch.float32)
        by_parameter.setdefault(parameter, []).append(_Part(name, parameter, index, shape, stored))
    files: list[list[_Part]] = [[]]
    room = max_shard_bytes
    for part in chain.from_iterable(by_parameter.values()):
        if files[-1] and part.bytes > room:
            files.append([])
            room = max_shard_bytes
        files[-1].append(part)
        room -= part.bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": parts for n, parts in enumerate(files, start=1)}


def _write_tensors(
    state: dict[str, Tensor],
    files: dict[str, list[_Part]],
    folder: Path | None,
    beat: Callable[[], None],
    gathered: Progress,
) -> None:
    """Gather the tensors of each file and write it into `folder`; None on ranks that only take part in the gather."""
    for name, parts in files.items():
        tensors = {}
        for part in parts:
            tensor = gather_part(state[part.parameter], part.index)
            if folder is not None:
                assert tensor is not None  # rank 0
                # always a copy: safetensors needs every tensor in memory of its own
                tensors[part.name] = tensor.to("cpu", part.dtype, copy=True)
            gathered.update(part.bytes)
        with errors_reach_all_ranks():
            if folder is not None:
                _save(tensors, folder / name)
        beat()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file. A file that cannot be written raises OSError, in place of safetensors' own error type."""
    try:
        with atomic_path(path) as part:
            save_file(tensors, part, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _write_configs(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype, folder: Path) -> None:
    written = to_hf_config(config, bos_id=ids.bos, eos_id=ids.eos, pad_id=ids.pad, dtype=dtype)
    write_hf_json(folder / "config.json", written)
    write_hf_json(folder / "generation_config.json", generation_config(ids))


def _write_index(files: dict[str, list[_Part]], folder: Path) -> None:
    if len(files) == 1:
        return
    parts = list(chain.from_iterable(files.values()))
    totals = {
        "total_parameters": sum(prod(part.shape) for part in parts),
        "total_size": sum(part.bytes for part in parts),
    }
    file_by_tensor = {part.name: file for file, parts in files.items() for part in parts}
    index = {"metadata": totals, "weight_map": dict(sorted(file_by_tensor.items()))}
    write_hf_json(folder / "model.safetensors.index.json", index)
