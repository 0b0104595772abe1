"""A run's checkpoint as a model to merge: the fp32 masters, read from the shards that the ranks saved.

A checkpoint stores each parameter in chunks, one per rank, and matrices that are multiplied together in one parameter.
The weight map says which part of which parameter a tensor on disk is; only the chunks that overlap it are read. The
last chunks are kept, because the experts' matrices of a layer come from the same ones.
"""

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from trinity.checkpoint.checkpoint import COMPLETE, METADATA
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import read_metadata
from trinity.config.hf_config import to_hf_config
from trinity.config.paths import kept_tokenizer, tokenizer_folder
from trinity.errors import UserError
from trinity.interop.tokenizer_files import SpecialIds, generation_config, special_ids
from trinity.interop.weight_map import weight_map
from trinity.merging.sources import Entry, Source, file_states
from trinity.run_directory import newest_config

_CHUNKS = 4
"""Chunks kept in memory: of two models' worth of neighbouring parameters."""

_Region = list[tuple[int, int]]
"""Start and stop in each dimension of a parameter."""


class RunSource(Source):
    """The checkpoint of a run.

    Args:
        label: as the recipe names it.
        folder: the run directory.
        step: the checkpoint's step; None: the newest intact one.

    Raises:
        UserError: not a run directory, no such checkpoint, or a damaged one.
    """

    def __init__(self, label: str, folder: Path, step: int | None) -> None:
        config = newest_config(folder)
        checkpoints = CheckpointDirectory.at(folder, config.checkpoint.url)
        self.step = checkpoints.pick_intact(step)
        self.label, self.folder, self.config, self.files = label, folder, config.model, None
        self._path = checkpoints.path_of(self.step)
        self.tokenizer = self._tokenizer(kept_tokenizer(folder) or tokenizer_folder(config))
        self.opened = self.identity()
        self._metadata = read_metadata(self._path / METADATA)
        self._cache: OrderedDict[MetadataIndex, Tensor] = OrderedDict()
        self._lock = Lock()
        self._parts: dict[str, tuple[str, _Region]] = {}
        self.entries = dict(self._described())
        self._make_configs()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        parameter, region = self._parts[name]
        entry = self.entries[name]
        region = list(region)
        row = len(region) - len(entry.shape)  # the dimensions before are single experts and halves
        if len(entry.shape) == 2:
            region[row] = (region[row][0] + start, region[row][0] + stop)
        rows = torch.empty([high - low for low, high in region], dtype=entry.dtype)
        for chunk in self._tensor(parameter).chunks:
            low = [max(at, offset) for (at, _), offset in zip(region, chunk.offsets)]
            high = [min(end, offset + size) for (_, end), offset, size in zip(region, chunk.offsets, chunk.sizes)]
            if all(a < b for a, b in zip(low, high)):
                inside = tuple(slice(a - offset, b - offset) for a, b, offset in zip(low, high, chunk.offsets))
                target = tuple(slice(a - at, b - at) for a, b, (at, _) in zip(low, high, region))
                rows[target] = self._chunk(parameter, chunk)[inside]
        return rows.view(-1, entry.shape[-1])

    def identity(self) -> list[Any]:
        files = json.loads((self._path / COMPLETE).read_bytes())["files"]
        return [self.step, files, file_states(self.tokenizer_files)]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the chunks that are kept, at most."""
        sizes = [
            chunk.sizes.numel() * stored.properties.dtype.itemsize
            for parameter in {parameter for parameter, _ in self._parts.values()}
            for stored in [self._tensor(parameter)]
            for chunk in stored.chunks
        ]
        return _CHUNKS * max(sizes)

    def _described(self) -> Iterator[tuple[str, Entry]]:
        for name, parameter, index in weight_map(self.config):
            parameter = f"model.{parameter}"
            stored = self._metadata.state_dict_metadata.get(parameter)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{self._path} has no {parameter}; use another checkpoint")
            region, shape = [], []
            for dim, size in enumerate(stored.size):
                entry = index[dim] if dim < len(index) else slice(0, size)
                low, high = (entry, entry + 1) if isinstance(entry, int) else (entry.start, entry.stop)
                region.append((low, high))
                if not isinstance(entry, int):
                    shape.append(high - low)
            self._parts[name] = parameter, region
            yield name, Entry(tuple(shape), stored.properties.dtype)

    def _tensor(self, parameter: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[parameter]
        assert isinstance(stored, TensorStorageMetadata)  # _described looked
        return stored

    def _chunk(self, parameter: str, chunk: ChunkStorageMetadata) -> Tensor:
        key = MetadataIndex(parameter, chunk.offsets)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            self._cache[key] = self._load(key)
            while len(self._cache) > _CHUNKS:
                self._cache.popitem(last=False)
            return self._cache[key]

    def _load(self, key: MetadataIndex) -> Tensor:
        info = self._metadata.storage_data[key]
        path = self._path / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        try:
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            raise UserError(f"{path} is damaged ({key.fqn} in it cannot be read); use another checkpoint") from None
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def _tokenizer(self, folder: Path | None) -> Path | None:
        return folder if folder is not None and (folder / "tokenizer.json").is_file() else None

    def _make_configs(self) -> None:
        """config.json and generation_config.json as an export of the run has them."""
        ids = SpecialIds() if self.tokenizer is None else special_ids(self.tokenizer, self.config.vocab_size)
        dtype = self.entries["lm_head.weight"].dtype
        self.raw_config = to_hf_config(self.config, bos_id=ids.bos, eos_id=ids.eos, pad_id=ids.pad, dtype=dtype)
        self.generation_config = generation_config(ids)
