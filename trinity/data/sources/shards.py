"""Token shards: a folder of memory-mapped token ids, read by document. Format: ../prepare/README.md.

    index.json               format, vocabulary, totals, and one entry a shard with sizes and checksums
    shard_00000.tokens       ids one after the other, little-endian uint16 (uint32 from 65,537 ids on)
    shard_00000.documents    int64 offsets into them, one more than documents: document i is tokens [o[i], o[i+1])
    shard_00000.mask         with --chat: a bit for each token, a byte's lowest first: 1 where the loss trains it
    shard_00000.hashes       with --deduplicate: 128-bit hashes of its texts, which readers do not need
    progress.json            in place of index.json while a preparation is not finished

Every document begins with BOS, so none is empty. A document is in one shard only; one with more than --shard-tokens has
a shard of its own. Documents are numbered through all shards, in the order of the input.

A remote folder (s3://…, any fsspec URL) is read through a local cache: index.json is fetched when the folder is first
opened, a shard's files when one of its documents is first read. Each file is checked when it is fetched.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from trinity.errors import UserError
from trinity.io.checksum import content_hash, new_hash
from trinity.io.json_files import read_json
from trinity.io.remote import cache_folder_of, fetch, local_or_url

VERSION = 1
MASKED_VERSION = 2
"""Of shards with a mask, so that a release without masks refuses them rather than train on prompts."""
AUTO_VERIFY_BYTES = 256 << 20
OFFSET = np.dtype("<i8")
KINDS = ("tokens", "documents")
MASK = "mask"
TOTALS = ("documents", "tokens", "text_bytes")
HASHES = "hashes"
HINT = "run tools/prepare_data.py again with the same arguments"


def kinds_of(header: dict) -> tuple[str, ...]:
    """The kinds of file that readers of a folder with this header need."""
    return (*KINDS, MASK) if header.get("chat") else KINDS


def token_dtype(vocab_size: int) -> np.dtype:
    """The integer type of stored ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_path(directory: Path, shard: int, kind: str) -> Path:
    """File of a shard; kind is tokens, documents, mask or hashes."""
    return directory / f"shard_{shard:05d}.{kind}"


def why_damaged(
    directory: Path, shard: int, entry: dict, checksums: bool, kinds: tuple[str, ...] = KINDS, missing: bool = False
) -> str | None:
    """The damage of a shard's files, as a clause that names the file; None if there is none.

    Args:
        directory, shard, entry: the folder, the shard's number in it, and its entry in index.json.
        checksums: check checksums as well as sizes.
        kinds: the files to check.
        missing: files may be missing, as in a cache.
    """
    for kind in kinds:
        path, size = shard_path(directory, shard, kind), entry[kind + "_bytes"]
        try:
            present = os.stat(path).st_size
        except FileNotFoundError:
            if missing:
                continue
            return f"{path} is missing"
        if present != size:
            return f"{path} is {'cut short' if present < size else 'too long'} ({present} bytes of {size})"
        if checksums and content_hash(path) != entry[kind + "_checksum"]:
            return f"{path} has changed (its checksum is another)"
    return None


def small_enough(shards: list[dict]) -> bool:
    """Whether verify="auto" checks checksums: below 256 MiB in total, which takes about half a second."""
    return sum(entry[kind + "_bytes"] for entry in shards for kind in KINDS) < AUTO_VERIFY_BYTES


class TokenSource:
    """The documents of one folder of shards, as token ids: read-only views of memory-mapped files.

    Attributes:
        directory: the folder, or that of the cache.
        documents, tokens, text_bytes: totals; BOS counts as a token.
        vocab_size, bos_id, tokenizer_fingerprint: of the tokenizer the shards were made with.
        fingerprint: hash of all content, masks included, independent of the folder.
        masked: whether there is a loss mask.
        template: hash of the chat template that the documents were rendered with; None without one.
        longest: tokens of the longest document, where index.json has it, as for chat data; else None.
        lookahead: documents whose lengths are requested at once.
    """

    lookahead = 256

    def __init__(self, directory: Path | str, verify: Literal["auto", "always", "never"] = "auto") -> None:
        """Open the folder; sizes are always checked.

        Args:
            directory: the folder, or its URL.
            verify: whether to check checksums (auto: below 256 MiB in total); of a URL, those of the files in the
                cache. Fetched files are always checked.
        Raises:
            UserError: not a folder of complete shards; the sentence names the missing or damaged file.
            Failure: the URL cannot be reached.
        """
        folder = local_or_url(directory)
        self._url = folder.rstrip("/") if isinstance(folder, str) else None
        self.directory = cache_folder_of(folder) if isinstance(folder, str) else folder
        if self._url:
            fetch(f"{self._url}/index.json", self.directory / "index.json")
        index = _read_index(self.directory)
        self._kinds = kinds_of(index)
        self._shards: list[dict] = index["shards"]
        checksums = verify == "always" or (verify == "auto" and small_enough(self._shards))
        for number, entry in enumerate(self._shards):
            wrong = why_damaged(self.directory, number, entry, checksums, self._kinds, missing=self._url is not None)
            if wrong and self._url:
                raise UserError(f"{wrong}; remove it, and it is fetched from {self._url} again")
            if wrong:
                raise UserError(f"{wrong}; remove it and {HINT} to make it again")
        self.documents, self.tokens, self.text_bytes = index["documents"], index["tokens"], index["text_bytes"]
        self.vocab_size, self.bos_id, self.tokenizer_fingerprint = (
            index["vocab_size"],
            index["bos_id"],
            index["tokenizer"],
        )
        self.masked = MASK in self._kinds
        self.template: str | None = index["chat"]["template"] if self.masked else None
        self.longest: int | None = max((e["longest"] for e in self._shards), default=None) if self.masked else None
        self._document_lengths: list[int] | None = index.get("document_lengths")
        self._dtype = np.dtype(index["dtype"])
        self._first = [0, *accumulate(entry["documents"] for entry in self._shards)]
        self._first_shard = np.array(self._first[:-1])
        self._maps: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(self._shards)
        self._masks: list[np.ndarray | None] = [None] * len(self._shards)
        content = new_hash()
        for entry in self._shards:
            content.update("".join(entry[kind + "_checksum"] for kind in self._kinds).encode())
        self.fingerprint = content.hexdigest()

    def __getstate__(self) -> dict:
        """The attributes without the maps, which each process opens for itself."""
        return self.__dict__ | {"_maps": [None] * len(self._maps), "_masks": [None] * len(self._masks)}

    def length(self, document: int) -> int:
        """Tokens of a document, BOS counted."""
        _, offsets, row = self._locate(document)
        return int(offsets[row + 1]) - int(offsets[row])

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64: tokens of each of the documents [n]; for large n, some nanoseconds each."""
        shards = np.searchsorted(self._first_shard, documents, side="right") - 1
        lengths = np.empty(len(documents), np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            _, offsets = self._maps[shard] or self._map(shard)
            rows = documents[here] - self._first[shard]
            lengths[here] = offsets[rows + 1] - offsets[rows]
        return lengths

    def longer_than(self, tokens: int) -> int | None:
        """Tokens of the longest document where it has more than `tokens`; else None.

        The index has it of chat data, and else the powers of two between which it lies. Where that leaves it open, the
        offsets are read; not of a remote folder, where this would fetch every shard: then None.
        """
        longest = self.longest
        if longest is None and self._document_lengths:
            power = len(self._document_lengths) - 1  # 2^power to 2^(power + 1) − 1 tokens
            if 1 << power + 1 <= tokens + 1 or (self._url and 1 << power <= tokens):
                return None
            longest = 1 << power if self._url else None
        if longest is None and not self._url:
            maps = (self._maps[shard] or self._map(shard) for shard in range(len(self._shards)))
            longest = max((int(np.diff(offsets).max(initial=0)) for _, offsets in maps), default=0)
        return longest if longest is not None and longest > tokens else None

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] uint16 or uint32: a read-only view of a document's tokens from `start` on."""
        tokens, offsets, row = self._locate(document)
        begin, end = offsets[row : row + 2].tolist()
        begin += start
        assert start >= 0 <= length
        assert begin + length <= end
        return tokens[begin : begin + length]

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] bool: whether the loss is to train each of a document's tokens from `start` on; needs a mask."""
        assert self.masked
        _, offsets, row = self._locate(document)
        begin = int(offsets[row]) + start
        assert start >= 0 <= length
        assert begin + length <= offsets[row + 1]
        shard = bisect_right(self._first, document) - 1
        mask = self._masks[shard]
        if mask is None:
            mask = self._masks[shard] = _mapped(shard_path(self.directory, shard, MASK))
        bits = np.unpackbits(mask[begin // 8 : -(-(begin + length) // 8)], bitorder="little")
        return bits[begin % 8 : begin % 8 + length].astype(bool)

    def chunks(self, tokens: int) -> Iterator[np.ndarray]:
        """All ids in order, as views of at most `tokens` of them."""
        for shard in range(len(self._shards)):
            ids, _ = self._map(shard)
            for start in range(0, len(ids), tokens):
                yield ids[start : start + tokens]

    def _locate(self, document: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(the shard's tokens, its offsets, the document's row in it)."""
        assert 0 <= document < self.documents
        # For one number, bisect is ten times as fast as searchsorted.
        shard = bisect_right(self._first, document) - 1
        tokens, offsets = self._maps[shard] or self._map(shard)
        return tokens, offsets, document - self._first[shard]

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shard's tokens, its offsets), mapped on first use."""
        maps = self._maps[shard]
        if maps is None:
            self._fetch(shard)
            tokens = _mapped(shard_path(self.directory, shard, "tokens")).view(self._dtype)
            offsets = _mapped(shard_path(self.directory, shard, "documents")).view(OFFSET)
            if offsets[0] or offsets[-1] != len(tokens) or (offsets[1:] <= offsets[:-1]).any():
                path = shard_path(self.directory, shard, "documents")
                raise UserError(f"{path} does not cut {len(tokens)} tokens into documents; remove it and {HINT}")
            maps = self._maps[shard] = (tokens, offsets)
        return maps

    def _fetch(self, shard: int) -> None:
        """Fetch a shard's files into the cache if the folder is remote."""
        for kind in self._kinds if self._url else ():
            path, entry = shard_path(self.directory, shard, kind), self._shards[shard]
            fetch(f"{self._url}/{path.name}", path, entry[kind + "_bytes"], entry[kind + "_checksum"])


def _mapped(path: Path) -> np.ndarray:
    # numpy's memmap keeps a file descriptor open per map, and a process may have 1024; torch's map closes it.
    array = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    array.flags.writeable = False
    return array


def _read_index(directory: Path) -> dict:
    index = read_json(directory / "index.json")
    if index is None:
        if (directory / "progress.json").exists():
            raise UserError(f"{directory} is not finished; {HINT} to finish it")
        raise UserError(f"{directory} holds no index.json; make token shards there with tools/prepare_data.py")
    version = MASKED_VERSION if index.get("chat") else VERSION
    if index.get("version") != version:
        raise UserError(f"{directory} has shard format {index.get('version')}, this reads {version}; prepare it again")
    wrong = _wrong(index)
    if wrong:
        raise UserError(f"{directory / 'index.json'} is damaged ({wrong}); remove it and {HINT} to make it again")
    return index


def _wrong(index: dict) -> str | None:
    """The first impossible value in an index, as a clause; None if there is none."""
    kinds = {"vocab_size": int, "bos_id": int, "tokenizer": str, "shards": list} | dict.fromkeys(TOTALS, int)
    for key, kind in kinds.items():
        if type(index.get(key)) is not kind:
            return f"{key} is {index.get(key)!r:.60}"
    if not 0 <= index["bos_id"] < index["vocab_size"] <= 1 << 32:
        return f"bos_id is {index['bos_id']} and vocab_size is {index['vocab_size']}"
    dtype = token_dtype(index["vocab_size"])
    if index.get("dtype") != dtype.str:
        return f"dtype is {index.get('dtype')!r:.60}, of {index['vocab_size']} ids it is {dtype.str}"
    chat = index.get("chat")
    if chat and (not isinstance(chat, dict) or type(chat.get("template")) not in (str, type(None))):
        return f"chat is {chat!r:.60}"
    for number, entry in enumerate(index["shards"]):
        wrong = _wrong_entry(entry, dtype.itemsize, kinds_of(index))
        if wrong:
            return f"of shard {number}, {wrong}"
    for key in TOTALS:
        total = sum(entry[key] for entry in index["shards"])
        if index[key] != total:
            return f"{key} is {index[key]}, of all shards it is {total}"
    return None


def _wrong_entry(entry: dict, token_bytes: int, kinds: tuple[str, ...]) -> str | None:
    if not isinstance(entry, dict):
        return f"the entry is {entry!r:.60}"
    for key in (*TOTALS, "longest") if MASK in kinds else TOTALS:
        if type(entry.get(key)) is not int or entry[key] < 0:
            return f"{key} is {entry.get(key)!r:.60}"
    tokens, documents = entry["tokens"], entry["documents"]
    sizes = {"tokens": token_bytes * tokens, "documents": OFFSET.itemsize * (documents + 1), MASK: -(-tokens // 8)}
    for kind in kinds:
        if entry.get(kind + "_bytes") != sizes[kind]:
            of = f"{documents} documents" if kind == "documents" else f"{tokens} tokens"
            return f"{kind}_bytes is {entry.get(kind + '_bytes')!r:.60}, of {of} it is {sizes[kind]}"
        if not isinstance(entry.get(kind + "_checksum"), str):
            return f"{kind}_checksum is {entry.get(kind + '_checksum')!r:.60}"
    return None
