"""Tokenise raw items into arrays of ids: the part of preparation that runs in worker processes.

The library's encodings take some hundred bytes a token, so they are turned into arrays a megabyte of text at a time.
For that a huge document is cut into pieces, but only where the cut changes no id.

Shapes: as in shard_writer.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from trinity.data.prepare.shard_writer import EMPTY, KEPT, UNREADABLE, Encoded
from trinity.data.sources.documents import RawBatch, texts
from trinity.data.tokenizer.tokenizer import bos_id

PIECE_CHARACTERS = 1 << 18
GROUP_CHARACTERS = 1 << 20
# Between a word and the white space after it, a newline and the beginning of a line, CJK punctuation and a word.
CUT = re.compile(r"(?<=\w)(?=[ \n])|(?<=\n)(?=\S)|(?<=[。、，！？])(?=\w)")
CUT_CONTEXT = 256
CUT_TRIES = 16
IMPORTED_BY = os.getpid()


class Encoder:
    """Parses and encodes batches; worker processes call it."""

    def __init__(self, tok: Tokenizer, dtype: np.dtype, field: str, skip_bad: bool, hashed: bool) -> None:
        """
        Args:
            tok: the tokenizer. It is set to encode special tokens that a document spells out as ordinary text.
            dtype: type of the ids.
            field: name of the text in a JSON line or row.
            skip_bad: mark items that cannot be read, instead of raising.
            hashed: compute the hash of each text.
        """
        self.tok, self.dtype, self.field, self.skip_bad, self.hashed = tok, dtype, field, skip_bad, hashed
        self.bos = bos_id(tok)
        tok.encode_special_tokens = True

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.tok.encode_special_tokens = True  # pickling does not keep it

    def __call__(self, batches: list[RawBatch]) -> Encoded:
        """Encode the items of one or more consecutive batches.

        Raises:
            UserError: an item that cannot be read, unless skip_bad.
        """
        parsed = [text for batch in batches for text in texts(batch, self.field, self.skip_bad)]
        kept = [text for text in parsed if text]
        counts = [len(batch.items) for batch in batches]
        ids, lengths = self._ids(kept)
        return Encoded(
            ids=ids,
            status=np.array([KEPT if text else UNREADABLE if text is None else EMPTY for text in parsed], np.uint8),
            files=np.repeat([batch.position.file for batch in batches], counts),
            items=np.concatenate([np.arange(len(batch.items)) + batch.position.item for batch in batches]),
            lengths=lengths,
            text_bytes=np.array([len(text.encode()) for text in kept], np.int64),
            hashes=hashes_of(text.encode() for text in kept) if self.hashed else None,
            done=batches[-1].done,
        )

    def _ids(self, kept: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """([T] ids of all texts, each with BOS before it; [m] their lengths)."""
        pieces = [list(cut(text, self.tok)) for text in kept]
        encoded = self._encode(piece for of_text in pieces for piece in of_text)
        bos = np.array([self.bos], self.dtype)
        parts: list[np.ndarray] = [bos[:0]]
        lengths = np.ones(len(kept), np.int64)
        for document, of_text in enumerate(pieces):
            parts.append(bos)
            for ids in islice(encoded, len(of_text)):
                parts.append(ids)
                lengths[document] += len(ids)
        return np.concatenate(parts), lengths

    def _encode(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        """The ids of each piece; pieces are encoded in groups of about GROUP_CHARACTERS."""
        if os.getpid() != IMPORTED_BY:
            # The library's threads do not exist in a forked process; without this it would wait for them forever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for group in _groups(pieces):
            for encoding in self.tok.encode_batch_fast(group, add_special_tokens=False):
                # The fastest way from a list of ids to an array.
                yield np.frombuffer(array("I", encoding.ids), np.uint32).astype(self.dtype)


def hashes_of(kept: Iterable[bytes]) -> np.ndarray:
    """[m, 2] uint64: blake2b of each content, 128 bits, which do not collide by chance."""
    digests = b"".join(blake2b(content, digest_size=16).digest() for content in kept)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def cut(text: str, tok: Tokenizer) -> Iterator[str]:
    """Cut a text into pieces whose ids, concatenated, are those of the whole text; most texts are one piece.

    A text is cut about every PIECE_CHARACTERS, at a boundary of the pre-tokenizer between a word and white space. Each
    cut is checked by tokenising the text around it. If the tokenizer has no boundary there, the text stays whole.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = _cut_after(text, begin + PIECE_CHARACTERS, tok)
        if end is None:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _cut_after(text: str, least: int, tok: Tokenizer) -> int | None:
    if tok.pre_tokenizer is None or tok.normalizer is not None:
        return None
    for match in islice(CUT.finditer(text, least), CUT_TRIES):
        before = text[match.start() - CUT_CONTEXT : match.start()]
        after = text[match.start() : match.start() + CUT_CONTEXT]
        parts = tok.pre_tokenizer.pre_tokenize_str(before + after)
        if any(span[0] == len(before) for _, span in parts) and _ids(tok, before + after) == [
            *_ids(tok, before),
            *_ids(tok, after),
        ]:
            return match.start()
    return None


def _ids(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text, add_special_tokens=False).ids


def _groups(pieces: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
