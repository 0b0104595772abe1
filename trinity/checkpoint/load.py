"""Load a checkpoint that torch.distributed.checkpoint wrote, without trusting its files.

The library reads the tensors with weights_only. Its .metadata is a pickle, and unpickling may run any code: here an
unpickler reads it that accepts only the few classes that describe tensors and files.
"""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trinity.checkpoint.checkpoint import METADATA
from trinity.checkpoint.file_systems import RemoteFileSystem
from trinity.checkpoint.save import State, first_failure
from trinity.errors import Failure, UserError
from trinity.io.remote_path import AnyPath
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
    ("pathlib", "PosixPath"),  # the folder, in checkpoints saved before the folder was stored as a str
    ("pathlib._local", "PosixPath"),  # the same in Python 3.13
}


def load(state: State, path: AnyPath) -> None:
    """Fill the given tensors in place, saved on any mesh; every rank calls this.

    Checksums are not compared: CheckpointDirectory.pick_intact and newest_intact did that, once per start.

    Args:
        state: tensors and DTensors by name.
        path: the checkpoint's folder.
    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
        Failure: a remote store cannot be reached.
    """
    _load(state, path, run_on_all_ranks(Reader, path), single_process=not dist.is_initialized())


def load_on_this_rank(path: AnyPath, prefix: str) -> State:
    """Read the tensors whose names begin with `prefix`, on this process alone; for small tensors.

    Raises:
        UserError: they cannot be read.
        Failure: a remote store cannot be reached.
    """
    state = empty_tensors(path, prefix)
    if state:
        _load(state, path, Reader(path), single_process=True)
    return state


def empty_tensors(path: AnyPath, prefix: str | tuple[str, ...]) -> State:
    """Allocate the tensors of a checkpoint whose names begin with `prefix`, for `load` to fill.

    Args:
        path: the checkpoint's folder.
        prefix: one prefix, or several.
    Raises:
        UserError: .metadata is damaged, or names anything but tensors and files.
    """
    metadata = Reader(path).read_metadata().state_dict_metadata
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)  # read_metadata admits no other
    }


def model_state(model: Trinity) -> State:
    """The model's parameters and balancing state, by their names in a checkpoint."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def _load(state: State, path: AnyPath, reader: "Reader", single_process: bool) -> None:
    try:
        with warnings.catch_warnings():
            # torch warns of a load without a process group, which is what the tools do
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # a copy of the dictionary, as the library writes its own references into it
            dcp.load(dict(state), storage_reader=reader, no_dist=single_process)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise _load_error(error, path) from None


def _load_error(error: BaseException, path: AnyPath) -> UserError | Failure:
    """One sentence for an error that the library raised while loading."""
    if isinstance(error, dcp.CheckpointException):  # its message is the traceback of every rank
        failure = first_failure(error)
        if isinstance(failure, Failure):
            return failure
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # its message advises to trust the file
        return UserError(f"{path} is damaged (a tensor in it cannot be read); use another checkpoint")
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(f"{path} does not fit this run's config: {reason}")


class Reader(dcp.FileSystemReader):
    """The library's reader of a checkpoint folder; its constructor reads .metadata with the safe unpickler.

    Raises:
        UserError: .metadata is missing, damaged, or names anything but tensors and files.
    """

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(str(folder))
        self.path = cast(Path, folder)  # the library hands a RemotePath to self.fs alone
        if not isinstance(folder, Path):
            self.fs = RemoteFileSystem()  # type: ignore[assignment]  # it calls FileSystemBase's methods only
        self._metadata = read_metadata(folder / METADATA)

    def read_metadata(self) -> Metadata:
        """Names, shapes, and the place of each tensor in the files.

        The library's method takes the number of a rank, for a .metadata file per rank, which is never written here.
        """
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def read_metadata(path: AnyPath) -> Metadata:
    """Read a .metadata file with the safe unpickler.

    Raises:
        UserError: the file is missing, damaged, or names anything but tensors and files.
    """
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        _check_metadata(metadata, path)
    except (OSError, UserError, Failure):
        raise
    except Exception as error:  # unpickling random bytes can raise nearly any exception
        raise UserError(f"{path} is damaged ({type(error).__name__}); use another checkpoint") from None
    return metadata


def _check_metadata(metadata: Any, path: AnyPath) -> None:
    parts = isinstance(metadata, Metadata) and (metadata.storage_data, metadata.state_dict_metadata)
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} does not describe a checkpoint; use another one")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or not _chunks_cover_tensor(stored):
            raise UserError(f"{path} does not say where all of {name} is stored; use another checkpoint")


def _chunks_cover_tensor(stored: TensorStorageMetadata) -> bool:
    """Whether the chunks have as many elements as the tensor; the library leaves missing elements unset, silently."""
    return sum(math.prod(chunk.sizes) for chunk in stored.chunks) == math.prod(stored.size)


class _Unpickler(pickle.Unpickler):
    """An unpickler that refuses every class and function outside of ALLOWED and torch's dtypes."""

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
