"""Reading what torch.distributed.checkpoint stored, without trusting it.

The tensors are read by the library with weights_only. Its .metadata is a pickle, which could run anything: it is read
here by an unpickler that knows the few classes which describe tensors and files, and no other.
"""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trinity.checkpoint.save import State, told
from trinity.errors import Failure, UserError
from trinity.io.remote_path import AnyPath, RemoteFileSystem
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import run_on_all_ranks

METADATA_CLASSES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip

ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in METADATA_CLASSES} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table of layouts
    ("pathlib", "PosixPath"),  # where it was saved, until that was a str
    ("pathlib._local", "PosixPath"),  # the same, as Python 3.13 calls it
}


class Reader(dcp.FileSystemReader):
    """The library's reader of a folder, its description read with care, once, when this is made.

    Raises:
        UserError: .metadata is missing, damaged, or names something else than tensors and files.
    """

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(str(folder))
        self.path = folder
        if not isinstance(folder, Path):
            self.fs = RemoteFileSystem()
        self._metadata = read_metadata(folder / ".metadata")

    def read_metadata(self) -> Metadata:  # the library would also offer a file by rank, which we never write
        """What is stored: names, shapes, and where in which file."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def read_metadata(path: AnyPath) -> Metadata:
    """The description of a checkpoint.

    Raises:
        UserError: the file is missing, damaged, or names something else than tensors and files.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, path).load()
        _check(found, path)
    except (OSError, UserError, Failure):
        raise
    except Exception as error:  # bytes that are no pickle fail in every way there is
        raise UserError(f"{path} is damaged ({type(error).__name__}); use another checkpoint") from None
    return found


def _check(found: Any, path: AnyPath) -> None:
    parts = isinstance(found, Metadata) and (found.storage_data, found.state_dict_metadata)
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} does not describe a checkpoint; use another one")
    for name, stored in found.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or not _whole(stored):
            raise UserError(f"{path} does not say where all of {name} is stored; use another checkpoint")


def _whole(stored: TensorStorageMetadata) -> bool:
    """Whether the chunks hold as many numbers as the tensor: the library would pass over what none of them holds."""
    return sum(math.prod(chunk.sizes) for chunk in stored.chunks) == math.prod(stored.size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: AnyPath) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in ALLOWED:
            named = f"{module}.{name}"
            raise UserError(f"{self._path} names {named!r}, which no checkpoint needs; do not trust this folder")
        return super().find_class(module, name)


def load(state: State, path: AnyPath) -> None:
    """Fill the given tensors in place, whatever mesh they were saved on; every rank calls this.

    Checksums are not compared: CheckpointDirectory.pick_intact and newest_intact did that, once per start.

    Args:
        state: tensors and DTensors by name.
        path: the checkpoint's folder.
    Raises:
        UserError: the checkpoint lacks a tensor, holds it in another shape, or cannot be read.
        Failure: it lies elsewhere, and cannot be reached.
    """
    _read(state, path, run_on_all_ranks(lambda: Reader(path)), alone=not dist.is_initialized())


def read_alone(folder: AnyPath, prefix: str) -> State:
    """The small tensors whose names begin so in a checkpoint, read by this process without the others.

    Raises:
        UserError: it cannot be read.
        Failure: it lies elsewhere, and cannot be reached.
    """
    state = tensors_of(folder, prefix)
    if state:
        _read(state, folder, Reader(folder), alone=True)
    return state


def _read(state: State, folder: AnyPath, reader: Reader, alone: bool) -> None:
    # a copy: the library wants to write its own references into the dictionary
    wanted = dict(state)
    try:
        with warnings.catch_warnings():
            # a tool that reads a run alone means to: torch warns of it
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):  # its text is the traceback of every rank
            if isinstance(failure := told(error), Failure):
                raise failure from None
            error = next(iter(error.failures.values()))[0]
        if isinstance(error, pickle.UnpicklingError):  # whose text is advice to trust the file
            raise UserError(f"{folder} is damaged (a tensor in it cannot be read); use another checkpoint") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder} does not fit this run's config: {reason}") from None


def tensors_of(folder: AnyPath, prefix: str | tuple[str, ...]) -> State:
    """Empty tensors of the names in a checkpoint that begin with a prefix, shaped as they were saved, for load to fill.

    Args:
        folder: of the checkpoint.
        prefix: one, or several.
    Raises:
        UserError: its .metadata is damaged, or names something else than tensors and files.
    """
    metadata = Reader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.items()
        if name.startswith(prefix)
    }


def model_state(model: Trinity) -> State:
    """Parameters and balancing state, by name."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
