"""Writes a model as the Hugging Face folder that transformers itself would write.

Tensors are streamed: at any moment there is, beside the model, one matrix of it and one file's tensors on rank 0, and
one matrix on each rank that helps to gather it.
The folder is written under another name and renamed when it is complete, so half an export is never taken for one.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trinity.config.hf_config import to_hf_config
from trinity.config.model import ModelConfig
from trinity.errors import UserError
from trinity.interop.tensors import gather_part, part_shape, storage_dtypes
from trinity.interop.tokenizer_files import SpecialIds, copy_tokenizer, special_ids
from trinity.interop.weight_map import Index, correspondence
from trinity.io.json_files import read_json, write_json
from trinity.io.local import atomic_path, make_folder, sync_folder
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import run_on_all_ranks, run_on_rank0
from trinity.terminal import Progress

SHARD_BYTES = 5 * 10**9
"""The most that one file holds by default."""


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

    Of a sharded model every rank calls this, because gathering a parameter takes all of them; the first writes.

    Args:
        model: sharded by FSDP2 or not, on any device; not changed.
        directory: the folder to make.
        tokenizer: folder of a tokenizer, whose files and special tokens are taken over.
        dtype: format of the matrices; gains, routers and expert_bias are fp32 in any case.
        max_shard_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.
        overwrite: replace an earlier export in `directory`.
        beat: called when a file is done.
        progress: show on stderr how many bytes are gathered.
    Returns:
        directory.
    Raises:
        UserError: something else, or without `overwrite` anything at all, is in the way; or the tokenizer is not one.
    """
    directory = Path(directory).resolve()
    partial = directory.parent / f".{directory.name}.partial"
    first = not dist.is_initialized() or dist.get_rank() == 0

    def begin() -> None:
        _refuse_to_replace(directory, overwrite)
        ids = SpecialIds() if tokenizer is None else special_ids(Path(tokenizer), model.config.vocab_size)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that died
        make_folder(partial)
        _write_configs(model.config, ids, dtype, partial)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), partial)

    def end() -> None:
        _write_index(files, partial)
        _move(partial, directory)

    try:
        run_on_rank0(begin)
        # FSDP2 puts its sharded parameters back for this: after a forward without backward it may still show gathered
        # ones
        state = model.state_dict()
        files = _plan(model, state, dtype, max_shard_bytes)
        total = sum(part.bytes for parts in files.values() for part in parts)
        with Progress("exporting", total, "B", progress and first, scaled=True) as gathered:
            _write_tensors(state, files, partial if first else None, beat, gathered)
        run_on_rank0(end)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk is not to stay full by it
        raise
    return directory


@dataclass(frozen=True)
class _Part:
    """One tensor on disk: what of ours it is, and how it is stored."""

    name: str
    ours: str
    index: Index
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _plan(model: Trinity, state: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[_Part]]:
    """Each file's name and what goes into it; the parts of a parameter follow each other."""
    dtypes = storage_dtypes(model, dtype)
    by_parameter: dict[str, list[_Part]] = {}
    for name, ours, index in correspondence(model.config):
        shape, stored = part_shape(state[ours].shape, index), dtypes.get(ours, torch.float32)
        by_parameter.setdefault(ours, []).append(_Part(name, ours, index, shape, stored))
    files, room = [[]], max_shard_bytes
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
    """Gather every part in turn, and write the files into `folder`; None on the ranks that only help to gather."""
    for name, parts in files.items():
        tensors = {}
        for part in parts:
            tensor = gather_part(state[part.ours], part.index)
            if folder is not None:
                # a copy even where nothing changes: safetensors wants every tensor in memory of its own
                tensors[part.name] = tensor.to("cpu", part.dtype, copy=True)
            gathered.update(part.bytes)
        run_on_all_ranks(_saving(tensors, folder / name) if folder is not None else lambda: None)
        beat()


def _saving(tensors: dict[str, Tensor], path: Path) -> Callable[[], None]:
    """What writes one file; if it cannot be written, an OSError says so: the library has an error of its own."""
    return lambda: _save(tensors, path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
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
    _write_json(folder / "config.json", written)
    tokens = {"bos_token_id": ids.bos, "eos_token_id": ids.stop or None, "pad_token_id": ids.pad}
    generation = {key: value for key, value in tokens.items() if value is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes it: keys in their own order, characters as they are."""
    write_json(path, content, indent=2, ensure_ascii=False)


def _write_index(files: dict[str, list[_Part]], folder: Path) -> None:
    if len(files) == 1:
        return
    parts = list(chain.from_iterable(files.values()))
    totals = {
        "total_parameters": sum(prod(part.shape) for part in parts),
        "total_size": sum(part.bytes for part in parts),
    }
    weight_map = {part.name: file for file, parts in files.items() for part in parts}
    index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _refuse_to_replace(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not _is_export(directory):
        raise UserError(f"{directory} exists and is not an earlier export; give the name of a folder to make")
    if not overwrite:
        raise UserError(
            f"{directory} holds an earlier export; give another folder, or say overwrite=True (--overwrite)"
        )


def _is_export(directory: Path) -> bool:
    """An AfMoE config, and files only: a folder in it was put there by somebody else."""
    try:
        raw = read_json(directory / "config.json")
    except (UserError, OSError):
        return False
    return (
        raw is not None and raw.get("model_type") == "afmoe" and all(entry.is_file() for entry in directory.iterdir())
    )


def _move(partial: Path, directory: Path) -> None:
    """Rename, an earlier export giving way first: a folder cannot be renamed onto a full one."""
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync_folder(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
