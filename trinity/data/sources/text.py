"""A source that tokenises text files on demand, without prepared shards.

Document i, its length and its ids equal those of the shards that prepare_data makes of the same files, so a run reads
the same batches from either. The first start indexes the files (text_index.py); the lengths of tokenised documents are
kept, and their ids as long as they fit, since a document is read in several pieces.

The cost against shards: each document is tokenised again in every epoch and after each start, and BPE makes about a
million tokens a second on a core. A Parquet row costs its whole row group: groups of a thousand rows are good, groups
of a hundred thousand are not. Compressed files (.gz, .zst) have no random access, so they are decompressed into the
cache.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trinity.data.prepare.tokenize import Encoder
from trinity.data.sources.documents import BEGINNING, RawBatch
from trinity.data.sources.file_formats import decompress_file, file_name, readable_kind
from trinity.data.sources.inputs import expand_inputs
from trinity.data.sources.shards import token_dtype
from trinity.data.sources.text_index import open_index, stamp
from trinity.data.sources.text_reader import LRUCache, TextReader
from trinity.data.tokenizer.tokenizer import bos_id, fingerprint, load_text_encoder, vocabulary_size
from trinity.errors import UserError
from trinity.io.checksum import new_hash
from trinity.io.json_files import read_json, write_json
from trinity.io.local import file_lock
from trinity.io.remote import cache_folder, fetch, remote_fingerprint

BATCH_CHARACTERS = 1 << 20
CACHE_BYTES = 512 << 20
COUNTED_BYTES = 8 << 20
"""Text whose tokens are counted to know a source's size; of more text, a sample of about this size is counted."""
COUNTED_CHARACTERS = 1 << 20
"""The most that is counted of one document."""


class TextSource:
    """The documents of some text files, as token ids. Can be pickled, and used after a fork; one thread at a time.

    Attributes:
        files: in the order of their documents.
        directory: the deepest folder that contains all of them.
        documents: how many have text.
        tokens: of all documents; the first access may tokenise a sample of them.
        vocab_size, bos_id, tokenizer_fingerprint: of the tokenizer.
        fingerprint: hash of the files' identities, the field and the tokenizer, independent of the files' folder.
        lookahead: documents whose lengths are requested at once: few, because each is tokenised for its length.
        masked, template: there is no loss mask and no chat template (see Source).
    """

    lookahead = 8
    masked: bool = False
    template: str | None = None

    def __init__(
        self,
        inputs: Sequence[Path | str],
        tokenizer: Path | str,
        *,
        field: str = "text",
        cache: Path | None = None,
        kind: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        option: str = "data.train",
        progress: bool = False,
    ) -> None:
        """Open the files, and index them if there is no index yet.

        Args:
            inputs: files, folders, patterns and URLs, in this order (see expand_inputs).
            tokenizer: folder with tokenizer.json.
            field: name of the text in a JSON line or Parquet row.
            cache: folder for indexes, decompressed files and copies of remote files; by default $TRINITY_CACHE, or
                ~/.cache/trinity.
            kind: of files in folders and of patterns, if they are mixed (see expand_inputs).
            cache_bytes: of token ids to keep, in each process.
            option: the inputs' name in messages.
            progress: draw a bar on stderr while files are indexed.
        Raises:
            UserError: bad inputs (see read_documents), no document with text, or an unfit tokenizer.
        """
        cache = cache or cache_folder()
        files = expand_inputs([*inputs], option, kind)
        self.files = [path if isinstance(path, Path) else _local_copy(path, cache) for path in files]
        self.directory = Path(os.path.commonpath([path.resolve().parent for path in self.files]))
        self._tokenizer, self._field, self._cache_bytes = Path(tokenizer), field, cache_bytes
        tok = load_text_encoder(self._tokenizer)
        self.vocab_size, self.bos_id = vocabulary_size(tok), bos_id(tok)
        self.tokenizer_fingerprint = fingerprint(self._tokenizer)
        self._index = open_index(self.files, field, cache, progress)
        self.documents = self._index.documents
        readable = [_decompressed(*indexed, cache) for indexed in zip(self.files, self._index.stamps)]
        self._readable_files, self._stamps = readable, [stamp(path) for path in readable]
        content = new_hash()
        content.update(f"{self._index.content} {self.tokenizer_fingerprint}".encode())
        self.fingerprint = content.hexdigest()
        self._set_caches(tok)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents, BOS counted: exact for up to COUNTED_BYTES of text.

        Of more text, about COUNTED_BYTES spread evenly over the documents are counted, and the rest is assumed to have
        as many tokens per byte. The number is kept in the cache, so all processes have the same.
        """
        path = self._index.folder / f"tokens.{self.tokenizer_fingerprint}.json"
        with file_lock(self._index.folder / "lock"):
            try:
                return int((read_json(path) or {})["tokens"])
            except (UserError, TypeError, KeyError, ValueError):  # missing or damaged
                tokens = self._count_tokens()
                write_json(path, {"tokens": tokens})
                return tokens

    def _count_tokens(self) -> int:
        every = -(-self._index.text_bytes // COUNTED_BYTES)
        tokens = text_bytes = 0
        for batch in self._batches([*range(0, self.documents, every)]):
            texts = [text[:COUNTED_CHARACTERS] for text in batch.values()]
            tokens += sum(len(ids) - 1 for ids in _encode(self._encoder, texts))
            text_bytes += sum(len(text.encode()) for text in texts)
        return self.documents + tokens * self._index.text_bytes // text_bytes

    def length(self, document: int) -> int:
        """Tokens of a document, BOS counted."""
        return int(self._lengths[document]) or len(self._ids(document))

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64: tokens of each of the documents [n]; those of unknown length are tokenised together."""
        # In the order of the files, so that a Parquet row group is decoded once.
        unknown = np.unique(documents[self._lengths[documents] == 0])
        for batch in self._batches(unknown.tolist()):
            self._tokenise(batch)
        return self._lengths[documents].astype(np.int64)

    def longer_than(self, tokens: int) -> int | None:
        """Tokens of the longest document where it has more than `tokens`; else None.

        Of more than COUNTED_BYTES of text, the longest of documents with about as many bytes, spread evenly.
        """
        every = -(-self._index.text_bytes // COUNTED_BYTES)
        longest = int(self.lengths(np.arange(0, self.documents, every)).max(initial=0))
        return longest if longest > tokens else None

    def keep_lengths(self, documents: np.ndarray, lengths: np.ndarray) -> None:
        """Remember lengths [n] of documents [n] that another process has tokenised, so that this one need not."""
        self._lengths[documents] = lengths

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] uint16 or uint32: a read-only view of a document's tokens from `start` on."""
        ids = self._ids(document)
        assert 0 <= start <= start + length <= len(ids)
        return ids[start : start + length]

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] True: text has no loss mask, so every token is a target."""
        return np.ones(length, bool)

    def _ids(self, document: int) -> np.ndarray:
        ids = self._ids_cache.get(document)
        return self._tokenise({document: self._text(document)})[0] if ids is None else ids

    def _text(self, document: int) -> str:
        return self._reader.text(*self._index.locate(document))

    def _batches(self, documents: list[int]) -> Iterator[dict[int, str]]:
        """Document → text, about a megabyte at a time."""
        batch: dict[int, str] = {}
        size = 0
        for document in documents:
            batch[document] = self._text(document)
            size += len(batch[document])
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = {}, 0
        if batch:
            yield batch

    def _tokenise(self, batch: dict[int, str]) -> list[np.ndarray]:
        """The ids of documents, which are kept in the cache."""
        encoded = _encode(self._encoder, [*batch.values()])
        for document, ids in zip(batch, encoded):
            ids.flags.writeable = False
            self._lengths[document] = len(ids)
            self._ids_cache.put(document, ids, ids.nbytes)
        return encoded

    def _set_caches(self, tok: Tokenizer) -> None:
        """Set the attributes that are not pickled."""
        self._encoder = Encoder(tok, token_dtype(self.vocab_size), self._field, skip_bad=False, hashed=False)
        # 0 is unknown, because every document has BOS. Pages of zeros take no memory until they are written.
        self._lengths = np.zeros(self.documents, np.uint32)
        self._ids_cache: LRUCache[int, np.ndarray] = LRUCache(self._cache_bytes)
        self._reader = TextReader(self._readable_files, self._stamps, self._field)

    def __getstate__(self) -> dict:
        caches = ("_lengths", "_ids_cache", "_reader", "_encoder")
        return {key: value for key, value in self.__dict__.items() if key not in caches}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if fingerprint(self._tokenizer) != self.tokenizer_fingerprint:
            raise UserError(f"{self._tokenizer} has changed since this run began; put it back, or start again")
        self._set_caches(load_text_encoder(self._tokenizer))


def _local_copy(url: str, cache: Path) -> Path:
    """A local copy of a remote file, fetched once, and again when the remote file has changed."""
    name = new_hash()
    name.update(f"{url} {remote_fingerprint(url)}".encode())
    path = cache / "copies" / name.hexdigest() / file_name(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch(url, path)
    return path


def _decompressed(path: Path, indexed: tuple[int, int], cache: Path) -> Path:
    """The file itself if it is not compressed, or its decompressed copy in the cache, written once.

    Raises:
        UserError: it has changed since it was indexed.
    """
    compression = readable_kind(path).compression
    if compression is None:
        return path
    name = new_hash()
    name.update(f"{path.resolve()} {indexed}".encode())
    target = cache / "unpacked" / name.hexdigest() / (path.name.partition(".")[0] + ".jsonl")
    decompress_file(path, compression, target)
    if stamp(path) != indexed:
        raise UserError(f"{path} was written to while it was read; start again when it is finished")
    return target


def _encode(encoder: Encoder, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, BOS first, by the encoder of prepare_data."""
    encoded = encoder([RawBatch("text", BEGINNING, 0, "value", texts, 0)])
    # Copies, because a view would keep the whole batch in memory.
    return [ids.copy() for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]
