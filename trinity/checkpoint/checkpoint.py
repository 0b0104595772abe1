"""One checkpoint: a folder of files, and COMPLETE, which is written last and lists each file's size and crc32.

A folder without COMPLETE is an interrupted save or deletion. A checkpoint is damaged when its COMPLETE cannot be read,
or when a file differs from what COMPLETE lists.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from trinity.errors import Failure
from trinity.io.checksum import FileSum, checksum_file
from trinity.io.json_files import to_json
from trinity.io.local import sync_folder, write_atomically
from trinity.io.remote_path import AnyPath, RemotePath
from trinity.parallel.collectives import errors_reach_all_ranks, run_on_rank0

COMPLETE = "COMPLETE"
METADATA = ".metadata"
"""The file in which torch.distributed.checkpoint describes the tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint in one folder, local or remote; the folder may be missing, incomplete or damaged."""

    path: AnyPath

    def mark_complete(self, sums: dict[str, FileSum]) -> None:
        """Write COMPLETE, then `latest` beside the folder. Every file must be on the disk, or in the store, by now."""
        _sync(self.path)
        _sync(self.path.parent)
        files = {name: file_sum._asdict() for name, file_sum in sorted(sums.items())}
        # COMPLETE is on the disk when this returns, before any older checkpoint is deleted
        _write(self.path / COMPLETE, to_json({"files": files}, indent=1) + "\n")
        _write(self.path.parent / "latest", self.path.name + "\n")

    def remove(self) -> None:
        """Delete the folder, complete or not. An interrupted deletion leaves a folder that is not complete.

        COMPLETE is deleted first, then .metadata: `CheckpointDirectory.retain` deletes a folder that has neither.
        """
        for name in (COMPLETE, METADATA):
            (self.path / name).unlink(missing_ok=True)
        if isinstance(self.path, RemotePath):
            self.path.rmtree()
        else:
            shutil.rmtree(self.path)

    def is_complete(self) -> bool:
        """Whether COMPLETE exists and every listed file has its size; checksums are not compared."""
        sums = self.listed_sums()
        return sums is not None and not self._wrong_size(sums)

    def size(self) -> int:
        """Bytes of all files that COMPLETE lists; 0 without COMPLETE."""
        return sum(file_sum.bytes for file_sum in (self.listed_sums() or {}).values())

    def check_sizes(self, sums: dict[str, FileSum]) -> None:
        """Check, before COMPLETE is written, that every written file is in the folder with its size.

        Raises:
            Failure: a file is missing or has another size.
        """
        reason = self._wrong_size(sums)
        if reason:
            raise Failure(f"{self.path} was written and is not there as it was ({reason}); run the same command again")

    def why_damaged(self) -> str:
        """Compare every file with COMPLETE; every rank calls this.

        Rank r of R computes the checksums of files r, r + R, …, so each rank reads about as much as it wrote.

        Returns:
            What is wrong, the same sentence on all ranks; "" for an intact checkpoint.
        """
        sums, reason = run_on_rank0(self._check_listing)
        if reason:
            return reason
        names = list(sums)
        if dist.is_initialized():
            names = names[dist.get_rank() :: dist.get_world_size()]
        with errors_reach_all_ranks():
            reason = next(filter(None, (_wrong_content(self.path / name, sums[name]) for name in names)), "")
        gathered = [reason]
        if dist.is_initialized():
            gathered = [""] * dist.get_world_size()
            dist.all_gather_object(gathered, reason)
        return next(filter(None, gathered), "")

    def listed_sums(self) -> dict[str, FileSum] | None:
        """What COMPLETE lists, by file name; None where it is missing, unreadable, or lists no .metadata."""
        try:
            files = json.loads((self.path / COMPLETE).read_bytes())["files"]
            sums = {name: FileSum(int(entry["bytes"]), str(entry["crc32"])) for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        return sums if METADATA in sums else None

    def _check_listing(self) -> tuple[dict[str, FileSum], str]:
        """(what COMPLETE lists, what is wrong with it or with a file's size)."""
        sums = self.listed_sums()
        if sums is None:
            return {}, "its COMPLETE is missing or cannot be read"
        return sums, self._wrong_size(sums)

    def _wrong_size(self, sums: dict[str, FileSum]) -> str:
        """Describe the first file that is missing or has another size; "" where all sizes are right."""
        size_of: Callable[[str], int]
        if isinstance(self.path, RemotePath):
            size_of = self.path.sizes().__getitem__  # one listing: a request for each file would take minutes
        else:
            size_of = partial(_local_size, self.path)
        for name, file_sum in sums.items():
            try:
                size = size_of(name)
            except (FileNotFoundError, KeyError):
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if size != file_sum.bytes:
                return f"{name} has {size} bytes of {file_sum.bytes}"
        return ""


def _local_size(folder: Path, name: str) -> int:
    return (folder / name).stat().st_size


def _wrong_content(path: AnyPath, file_sum: FileSum) -> str:
    """Describe a file whose size or crc32 differs; "" where both are right."""
    try:
        return "" if checksum_file(path) == file_sum else f"{path.name} has changed since it was written"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _write(path: AnyPath, text: str) -> None:
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
    else:
        write_atomically(path, text)


def _sync(folder: AnyPath) -> None:
    if not isinstance(folder, RemotePath):
        sync_folder(folder)
