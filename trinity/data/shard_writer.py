"""Writing token shards so that a kill at any moment costs the shard it falls in, and nothing else.

A shard grows in two .tmp files. When it is full they are fsynced and take their names, and then progress.json, replaced
in one move, counts the shard as done and says where in the input the next one begins. index.json comes last. What is
not in progress.json or index.json does not exist for a reader and is written over.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trinity.data.documents import Place
from trinity.data.files import move_into_place, new_hash, temporary, write_atomically
from trinity.data.shards import KINDS, OFFSET, shard_path, token_dtype


class ShardWriter:
    """Appends documents to the shards of a folder.

    Attributes:
        shards: entries of index.json of the shards that are done.
        tokens: tokens written, in done shards and in the present one.
    """

    def __init__(self, directory: Path, header: dict, shard_tokens: int, shards: list[dict]) -> None:
        """Go on after `shards`, which are whole.

        Args:
            directory: made if it is not there.
            header: what index.json says of all shards; vocab_size decides the type of the ids.
            shard_tokens: tokens at which a shard is full.
            shards: entries of the shards that are done.
        """
        self.directory, self.header, self.shard_tokens = directory, header, shard_tokens
        self.shards = list(shards)
        self.tokens = sum(entry["tokens"] for entry in shards)
        self._dtype = token_dtype(header["vocab_size"])
        self._skipped: Counter[str] = Counter()
        self._open: _OpenShard | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._save_progress()

    def add(self, ids: np.ndarray, text_bytes: int, place: Place) -> None:
        """Append one document, beginning with BOS; `place` is where it stands in the input."""
        if self._open is not None and self._open.tokens + len(ids) > self.shard_tokens:
            self._close(place)
        if self._open is None:
            self._open = _OpenShard(self.directory, len(self.shards), self._dtype)
        self._open.add(ids, text_bytes)
        self.tokens += len(ids)

    def skip(self, reason: str) -> None:
        """Count a document that is left out."""
        self._skipped[reason] += 1

    def finish(self, end: Place) -> dict:
        """Close the last shard and write index.json; returns its content."""
        if self._open is not None:
            self._close(end)
        sums = {key: sum(entry[key] for entry in self.shards) for key in ("documents", "tokens", "text_bytes")}
        skipped: Counter[str] = Counter()
        for entry in self.shards:
            skipped.update(entry["skipped"])
        index = {**self.header, **sums, "skipped": dict(sorted(skipped.items())), "shards": self.shards}
        write_atomically(self.directory / "index.json", [json.dumps(index, indent=1), "\n"])
        (self.directory / "progress.json").unlink()
        return index

    def _close(self, next_place: Place) -> None:
        entry = self._open.close()
        # Counted with the shard after whose beginning they were met, so that a resumed run counts the same.
        entry["skipped"] = dict(sorted(self._skipped.items()))
        entry["next"] = list(next_place)
        self.shards.append(entry)
        self._open = None
        self._skipped.clear()
        self._save_progress()

    def _save_progress(self) -> None:
        progress = {**self.header, "shards": self.shards}
        write_atomically(self.directory / "progress.json", [json.dumps(progress, indent=1), "\n"])


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, directory: Path, number: int, dtype: np.dtype) -> None:
        self.tokens = 0
        self._dtype = dtype
        self._paths = {kind: shard_path(directory, number, kind) for kind in KINDS}
        self._files = {kind: _HashedFile(path) for kind, path in self._paths.items()}
        self._lengths: Counter[int] = Counter()
        self._text_bytes = 0
        self._files["documents"].write(np.zeros(1, OFFSET).tobytes())

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        self.tokens += len(ids)
        self._text_bytes += text_bytes
        self._lengths[len(ids).bit_length() - 1] += 1
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        self._files["documents"].write(np.array([self.tokens], OFFSET).tobytes())

    def close(self) -> dict:
        """Make the files last and give them their names; returns the shard's entry."""
        entry = {
            "documents": sum(self._lengths.values()),
            "tokens": self.tokens,
            "text_bytes": self._text_bytes,
            "document_lengths": [self._lengths[power] for power in range(max(self._lengths) + 1)],
        }
        for kind, file in self._files.items():
            entry[kind + "_bytes"], entry[kind + "_checksum"] = file.close()
        for path in self._paths.values():
            move_into_place(path)
        return entry


class _HashedFile:
    """A temporary file that knows its size and checksum."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(temporary(path), "wb")  # noqa: SIM115 (closed by close)
        self._hash = new_hash()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> tuple[int, str]:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell(), self._hash.hexdigest()
