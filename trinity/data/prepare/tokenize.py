"""From raw items to packed ids: what preparation does to each batch, in worker processes or in its own.

The library's encodings take some hundred bytes a token, so they are turned into arrays a megabyte of text at a time. A
huge document is cut for that, but only where the cut changes no id.

Shapes: as in shard_writer.
"""

import os
import re
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from trinity.data.prepare.shard_writer import EMPTY, KEPT, UNREADABLE, Encoded
from trinity.data.sources.documents import RawBatch, texts
from trinity.data.tokenizer.tokenizer import bos_id

PIECE_CHARACTERS = 1 << 18
GROUP_CHARACTERS = 1 << 20
# Between a word and the white space after it, a newline and what begins a line, CJK punctuation and a word.
CUT = re.compile(r"(?<=\w)(?=[ \n])|(?<=\n)(?=\S)|(?<=[。、，！？])(?=\w)")
CUT_CONTEXT = 256
CUT_TRIES = 16
IMPORTED_BY = os.getpid()


class Encoder:
    """Parses and encodes batches. Its call is what a worker process does."""

    def __init__(self, tok: Tokenizer, dtype: np.dtype, field: str, skip_bad: bool, hashed: bool) -> None:
        """
        Args:
            tok: the tokenizer. It is set to take special tokens that a text spells out for text like any other: a
                document is data.
            dtype: type of the ids.
            field: name of the text in a JSON line or row.
            skip_bad: mark what cannot be read, instead of raising.
            hashed: make the hash of each text.
        """
        self.tok, self.dtype, self.field, self.skip_bad, self.hashed = tok, dtype, field, skip_bad, hashed
        self.bos = bos_id(tok)
        tok.encode_special_tokens = True

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.tok.encode_special_tokens = True  # pickling forgets it

    def __call__(self, batches: list[RawBatch]) -> Encoded:
        """Encode the items of one or more batches, which follow one another.

        Raises:
            UserError: an item that cannot be read, unless skip_bad.
        """
        found = [text for batch in batches for text in texts(batch, self.field, self.skip_bad)]
        kept = [text for text in found if text]
        counts = [len(batch.items) for batch in batches]
        ids, lengths = self._ids(kept)
        return Encoded(
            ids=ids,
            status=np.array([KEPT if text else UNREADABLE if text is None else EMPTY for text in found], np.uint8),
            files=np.repeat([batch.place.file for batch in batches], counts),
            items=np.concatenate([np.arange(len(batch.items)) + batch.place.item for batch in batches]),
            lengths=lengths,
            text_bytes=np.array([len(text.encode()) for text in kept], np.int64),
            hashes=text_hashes(kept) if self.hashed else None,
            done=batches[-1].done,
        )

    def _ids(self, kept: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """([T] ids of all texts, each with BOS before it; [m] their numbers)."""
        pieces = [list(cut(text, self.tok)) for text in kept]
        encoded = self._encode(piece for of_one in pieces for piece in of_one)
        bos = np.array([self.bos], self.dtype)
        parts: list[np.ndarray] = [bos[:0]]
        lengths = np.ones(len(kept), np.int64)
        for document, of_one in enumerate(pieces):
            parts.append(bos)
            for ids in islice(encoded, len(of_one)):
                parts.append(ids)
                lengths[document] += len(ids)
        return np.concatenate(parts), lengths

    def _encode(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        """The ids of each piece; many short ones are encoded at once, few long ones."""
        if os.getpid() != IMPORTED_BY:
            # The library's threads do not live on in a forked process; unless told so, it would wait for them for ever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for group in _groups(pieces):
            for encoding in self.tok.encode_batch_fast(group, add_special_tokens=False):
                # From a list to an array: of all ways this takes the least time.
                yield np.frombuffer(array("I", encoding.ids), np.uint32).astype(self.dtype)


def text_hashes(kept: list[str]) -> np.ndarray:
    """[m, 2] uint64: blake2b of each text in UTF-8, 128 bits, which never meet by accident."""
    digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in kept)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def cut(text: str, tok: Tokenizer) -> Iterator[str]:
    """Pieces of a text, which have the ids of the whole one after the other; most texts are one piece.

    A text is cut where the pre-tokenizer cuts too, between a word and white space, about every PIECE_CHARACTERS. The
    tokenizer is asked at every place, with the text around it. One that does not cut there gets the text as it is.
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
    for place in islice(CUT.finditer(text, least), CUT_TRIES):
        before = text[place.start() - CUT_CONTEXT : place.start()]
        after = text[place.start() : place.start() + CUT_CONTEXT]
        parts = tok.pre_tokenizer.pre_tokenize_str(before + after)
        if any(span[0] == len(before) for _, span in parts) and _ids(tok, before + after) == [
            *_ids(tok, before),
            *_ids(tok, after),
        ]:
            return place.start()
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
