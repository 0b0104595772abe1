"""Write token shards so that a kill at any moment loses at most the shard being written.

A shard is written to .tmp files. When it is full they are fsynced and renamed; then progress.json is replaced
atomically: it lists the finished shards and the position in the input where the next one begins. index.json is written
last. Readers ignore a shard that is not in progress.json or index.json, and the next run overwrites it.

Shapes: n items of the input, m of them documents that are kept, T tokens of these. An item of chat data may be several
documents: it is then as many items with one position, which stay in one shard, as a shard begins at a position.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from trinity.data.sources.documents import Position
from trinity.data.sources.shards import HASHES, MASK, OFFSET, kinds_of, shard_path, token_dtype
from trinity.io.checksum import new_hash
from trinity.io.json_files import to_json
from trinity.io.local import make_folder, publish, sync, temporary_path, write_atomically

KEPT, EMPTY, UNREADABLE, DUPLICATE, TOO_LONG = range(5)
REASONS = ("kept", "empty", "unreadable", "duplicate", "too long")


class Encoded(NamedTuple):
    """Consecutive items of the input, with the ids of those that are kept.

    ids: [T], each document's BOS first.
    status: [n] uint8: KEPT, or the reason for leaving it out.
    files, items: [n]: the position of each item.
    lengths, text_bytes: [m] int64: tokens, and bytes of UTF-8, of each document.
    hashes: [m, 2] uint64: of each document, for --deduplicate; None without it.
    done: amount of the input read after them (see RawBatch.done).
    mask: [T] bool: the tokens that are trained, for shards with a mask; None without one.
    """

    ids: np.ndarray
    status: np.ndarray
    files: np.ndarray
    items: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    hashes: np.ndarray | None
    done: int
    mask: np.ndarray | None = None


class ShardWriter:
    """Appends documents to the shards of a folder.

    Attributes:
        shards: entries of the finished shards in index.json.
        tokens: tokens written, in finished shards and in the current one.
    """

    def __init__(self, directory: Path, header: dict, shard_tokens: int, shards: list[dict]) -> None:
        """Continue after the finished `shards`.

        Args:
            directory: created if missing.
            header: the keys of index.json for all shards; vocab_size determines the type of the ids, and with
                deduplicate the hashes of each shard's texts are written beside it.
            shard_tokens: tokens at which a shard is full.
            shards: entries of the finished shards.
        """
        self.directory, self.header, self.shard_tokens = directory, header, shard_tokens
        self.shards = list(shards)
        self.tokens = sum(entry["tokens"] for entry in shards)
        self._dtype = token_dtype(header["vocab_size"])
        self._kinds = (*kinds_of(header), HASHES) if header.get("deduplicate") else kinds_of(header)
        self._skipped = np.zeros(len(REASONS), np.int64)
        self._open: _OpenShard | None = None
        make_folder(directory)
        self._save_progress()

    def add(self, ids: np.ndarray, text_bytes: int, position: Position) -> None:
        """Append one document, beginning with BOS; `position` is its place in the input."""
        files, items, lengths, sizes = (np.array([value]) for value in (*position, len(ids), text_bytes))
        status = np.array([KEPT], np.uint8)
        self.write(Encoded(ids, status, files, items, lengths, sizes, hashes=None, done=0))

    def write(self, encoded: Encoded) -> None:
        """Append the documents that are kept, and count the others."""
        rows_m = np.flatnonzero(encoded.status == KEPT)
        ends_m = np.cumsum(encoded.lengths)
        item_ends_m = _item_ends(encoded, rows_m)
        counted = document = token = 0
        while document < len(rows_m):
            used = self._open.tokens if self._open else 0
            last = int(np.searchsorted(ends_m, token + self.shard_tokens - used, side="right"))
            last = int(item_ends_m[np.searchsorted(item_ends_m, last, side="right") - 1])
            if self._open is None:
                self._open = _OpenShard(self.directory, len(self.shards), self._dtype, self._kinds)
                # an item longer than a shard has a shard of its own
                last = max(last, int(item_ends_m[np.searchsorted(item_ends_m, document, side="right")]))
            if last > document:
                end = int(ends_m[last - 1])
                self._open.add(encoded, rows_m, slice(document, last), slice(token, end))
                self.tokens += end - token
                document, token = last, end
            else:
                # Items left out count for the shard that is open when they are read, so a resumed run counts equally.
                row = rows_m[document]
                self._skip(encoded.status[counted:row])
                counted = row
                self._close(self._open, Position(int(encoded.files[row]), int(encoded.items[row])))
        self._skip(encoded.status[counted:])

    def finish(self, end: Position) -> dict:
        """Close the last shard and write index.json; returns its content."""
        if self._open is not None:
            self._close(self._open, end)
        sums = {key: sum(entry[key] for entry in self.shards) for key in ("documents", "tokens", "text_bytes")}
        if MASK in self._kinds:
            sums["trained"] = sum(entry["trained"] for entry in self.shards)
        skipped: Counter[str] = Counter()
        for entry in self.shards:
            skipped.update(entry["skipped"])
        index = {
            **self.header,
            **sums,
            "skipped": dict(sorted(skipped.items())),
            "document_lengths": _sum_histograms(entry["document_lengths"] for entry in self.shards),
            "input_documents": self._documents_of_inputs(),
            "shards": self.shards,
        }
        self._save("index.json", index)
        (self.directory / "progress.json").unlink()
        return index

    @property
    def left_out(self) -> dict[str, int]:
        """Reason → items left out since the last shard was finished."""
        return {reason: int(count) for reason, count in zip(REASONS[1:], self._skipped[1:]) if count}

    def _documents_of_inputs(self) -> list[int]:
        """Documents of each input, up to the last input that has any."""
        counts: Counter[int] = Counter()
        for entry in self.shards:
            counts.update(dict(entry["inputs"]))
        return [counts[number] for number in range(max(counts) + 1)]

    def _skip(self, status: np.ndarray) -> None:
        self._skipped += np.bincount(status, minlength=len(REASONS))

    def _close(self, shard: "_OpenShard", next_position: Position) -> None:
        entry = shard.close()
        entry["skipped"] = dict(sorted(self.left_out.items()))
        entry["next"] = list(next_position)
        self.shards.append(entry)
        self._open = None
        self._skipped[:] = 0
        self._save_progress()

    def _save_progress(self) -> None:
        self._save("progress.json", {**self.header, "shards": self.shards})

    def _save(self, name: str, content: dict) -> None:
        """Write JSON with a line for each key and for each shard: fast to write, and readable."""
        lines = [f"{to_json(key)}: {_as_lines(key, value)}" for key, value in content.items()]
        write_atomically(self.directory / name, ["{\n", ",\n".join(lines), "\n}\n"])


def _item_ends(encoded: Encoded, rows_m: np.ndarray) -> np.ndarray:
    """0, and the numbers of documents [m] after which an item of the input ends, ascending; the last is m."""
    positions_m2 = np.stack([encoded.files[rows_m], encoded.items[rows_m]], axis=1)
    last_m = np.append((positions_m2[1:] != positions_m2[:-1]).any(axis=1), [True] * (len(rows_m) > 0))
    return np.append(0, np.flatnonzero(last_m) + 1)


def _as_lines(key: str, value: Any) -> str:
    if key not in ("shards", "inputs"):
        return to_json(value)
    return "[\n" + ",\n".join(to_json(entry) for entry in value) + "\n]"


def _sum_histograms(histograms: Iterable[list[int]]) -> list[int]:
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, directory: Path, number: int, dtype: np.dtype, kinds: tuple[str, ...]) -> None:
        self.tokens = 0
        self._dtype = dtype
        self._paths = {kind: shard_path(directory, number, kind) for kind in kinds}
        self._files = {kind: _HashedFile(path) for kind, path in self._paths.items()}
        self._lengths: Counter[int] = Counter()
        self._inputs: Counter[int] = Counter()
        self._text_bytes = self._longest = self._trained = 0
        self._bits = np.empty(0, bool)  # of the mask, less than a byte
        self._files["documents"].write(np.zeros(1, OFFSET))

    def add(self, encoded: Encoded, rows_m: np.ndarray, documents: slice, tokens: slice) -> None:
        """Append some of the documents, which are the items rows_m [m]."""
        lengths = encoded.lengths[documents]
        self._files["tokens"].write(encoded.ids[tokens].astype(self._dtype, copy=False))
        self._files["documents"].write((self.tokens + np.cumsum(lengths)).astype(OFFSET))
        if HASHES in self._files:
            assert encoded.hashes is not None
            self._files[HASHES].write(encoded.hashes[documents])
        if MASK in self._files:
            assert encoded.mask is not None
            assert len(encoded.mask) == len(encoded.ids)  # a shorter one would shift all bits after it
            self._add_bits(encoded.mask[tokens])
        self.tokens += int(lengths.sum())
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        self._text_bytes += int(encoded.text_bytes[documents].sum())
        _count(self._lengths, np.frexp(lengths)[1] - 1)
        _count(self._inputs, encoded.files[rows_m[documents]])

    def _add_bits(self, mask: np.ndarray) -> None:
        """Append to the mask, and write its whole bytes."""
        self._trained += int(mask.sum())
        bits = np.concatenate([self._bits, mask])
        whole = len(bits) // 8 * 8
        self._files[MASK].write(np.packbits(bits[:whole], bitorder="little"))
        self._bits = bits[whole:]

    def close(self) -> dict:
        """Fsync and rename the files; returns the shard's entry."""
        entry = {
            "documents": self._lengths.total(),
            "tokens": self.tokens,
            "text_bytes": self._text_bytes,
            "document_lengths": [self._lengths[power] for power in range(max(self._lengths) + 1)],
            "inputs": [list(pair) for pair in sorted(self._inputs.items())],
        }
        if MASK in self._files:
            self._files[MASK].write(np.packbits(self._bits, bitorder="little"))
            entry["longest"], entry["trained"] = self._longest, self._trained
        for kind, file in self._files.items():
            entry[kind + "_bytes"], entry[kind + "_checksum"] = file.close()
        for path in self._paths.values():
            publish(path)
        return entry


def _count(counter: Counter[int], values: np.ndarray) -> None:
    numbers, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(numbers.tolist(), counts.tolist())))


class _HashedFile:
    """A temporary file with a running checksum."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(temporary_path(path), "wb")  # noqa: SIM115 (closed by close)
        self._hash = new_hash()

    def write(self, data: np.ndarray) -> None:
        self._file.write(data.tobytes())
        self._hash.update(data.tobytes())

    def close(self) -> tuple[int, str]:
        with self._file:
            sync(self._file)
            return self._file.tell(), self._hash.hexdigest()
