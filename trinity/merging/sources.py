"""Models to merge, opened without reading their weights: the interface, and Hugging Face folders.

A source shows every model the same way: by AfMoE's names on disk with a matrix for each expert, whether the folder has
such matrices, stacks of all experts (`experts.gate_up_proj`, as transformers holds them in memory), or both. Opening a
source reads headers. Rows of a tensor are read when they are asked for, with pread: a file that shrinks is an error and
no crash. No pickle is opened, and no file outside of the folder.
"""

import io
import json
import os
import struct
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.config.hf_config import read_hf_config
from trinity.config.model import ModelConfig
from trinity.errors import UserError
from trinity.interop.weight_files import weight_files
from trinity.io.json_files import read_json
from trinity.merging.tensors import fused_parts

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Data types of safetensors files that are merged; all others are quantised weights or no weights."""
_OPEN_FILES = 64


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def file_states(paths: Iterable[Path]) -> list[Any]:
    """Name, size, time and inode of files: another file or content has others."""
    return [[path.name, (status := path.stat()).st_size, status.st_mtime_ns, status.st_ino] for path in paths]


class Entry(NamedTuple):
    """Shape and data type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(ABC):
    """A model to merge.

    Attributes:
        label: as the recipe names it.
        folder: the folder; of a run, the run directory.
        config: its sizes.
        raw_config: its config.json.
        entries: name → shape and data type of every tensor.
        tokenizer: the folder with its tokenizer; None without one.
        files: the folder that code is copied from; None for a run.
        generation_config: content of generation_config.json; None without one.
        opened: `identity` when the source was opened.
    """

    label: str
    folder: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    entries: dict[str, Entry]
    tokenizer: Path | None
    files: Path | None
    generation_config: dict[str, Any] | None
    opened: list[Any]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor, [stop - start, columns] in its data type; a vector is one row.

        Raises:
            UserError: the file changed since it was opened.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """Values for JSON that change when a file of the source does; read from the disk anew."""

    @property
    def tokenizer_files(self) -> list[Path]:
        """tokenizer.json if there is one: it says which row of the embedding belongs to which token."""
        return [] if self.tokenizer is None else [self.tokenizer / "tokenizer.json"]

    @cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """Content of tokenizer.json.

        Raises:
            UserError: it is no tokenizer.
        """
        assert self.tokenizer is not None  # only models with a tokenizer are asked
        return read_json(self.tokenizer / "tokenizer.json", "fetch the folder again") or {}

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Token → id, with the added tokens, as the tokenizers library counts them.

        Raises:
            UserError: tokenizer.json is no tokenizer.
        """
        assert self.tokenizer is not None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.tokenizer / "tokenizer.json")).get_vocab()
        except Exception as error:  # the library raises plain Exception
            path = self.tokenizer / "tokenizer.json"
            raise UserError(
                f"{path} is no tokenizer ({' '.join(str(error).split())}); fetch the folder again"
            ) from None

    def rows(self, name: str) -> int:
        """Rows of a tensor as `read` counts them."""
        shape = self.entries[name].shape
        return shape[0] if len(shape) == 2 else 1


class FilePlace(NamedTuple):
    """Where a tensor is: file, offset of its first byte, bytes of a row."""

    path: Path
    offset: int
    row_bytes: int


class FolderSource(Source):
    """A Hugging Face folder."""

    def __init__(self, label: str, folder: Path) -> None:
        self.label = label
        self.config = read_hf_config(folder)
        self.raw_config = read_json(folder / "config.json") or {}
        self.tokenizer = folder if (folder / "tokenizer.json").is_file() else None
        self.files = folder
        self.generation_config = read_json(folder / "generation_config.json", "fetch or export it again")
        self._open_files(folder)

    def _open_files(self, folder: Path) -> None:
        """Read the headers of the folder's weights."""
        self.folder, self.entries = folder, {}
        self._places: dict[str, FilePlace] = {}
        self._paths = weight_files(folder)
        self._open: OrderedDict[Path, io.FileIO] = OrderedDict()
        self._lock = Lock()
        self.opened = self.identity()
        for path in self._paths:
            self._read_header(path)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        place, entry = self._places[name], self.entries[name]
        columns = entry.shape[-1]
        rows = torch.empty((stop - start, columns), dtype=entry.dtype)
        buffer = byte_view(rows)
        done, at = 0, place.offset + start * place.row_bytes
        descriptor = self._file(place.path).fileno()
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], at + done)
            if count == 0:
                raise UserError(f"{place.path} became shorter while it was read; merge again when it is whole")
            done += count
        return rows

    def place(self, name: str) -> FilePlace:
        """Where a tensor is in the folder's files."""
        return self._places[name]

    def identity(self) -> list[Any]:
        return file_states([*self._paths, self.folder / "config.json", *self.tokenizer_files])

    def _file(self, path: Path) -> io.FileIO:
        """The open file. A file that falls out of the cache is closed when no thread uses it any more."""
        with self._lock:
            if path not in self._open:
                self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path]

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):  # checks that the header is sound and the file has its length
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            shape, dtype = tuple(tensor["shape"]), DTYPES.get(tensor["dtype"])
            if dtype is None:
                raise UserError(
                    f"{path} holds {name} in {tensor['dtype']}: quantised weights are not merged; give the model in "
                    "BF16, F16 or F32"
                )
            self._add(path, name, shape, dtype, 8 + length + tensor["data_offsets"][0])

    def _add(self, path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        row_bytes = dtype.itemsize * (shape[-1] if shape else 1)
        parts = fused_parts(name, shape)
        if parts is None:
            self._put(name, Entry(shape, dtype), FilePlace(path, offset, row_bytes))
            return
        for part, first, rows in parts:
            self._put(part, Entry((rows, shape[2]), dtype), FilePlace(path, offset + first * row_bytes, row_bytes))

    def _put(self, name: str, entry: Entry, place: FilePlace) -> None:
        if name in self.entries:
            raise UserError(f"{self.folder} holds {name} twice; fetch or export it again")
        self.entries[name], self._places[name] = entry, place
