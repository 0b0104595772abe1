"""The documents of each source in the order in which a stream takes them.

Each source has one endless order of documents, j = 0, 1, 2, …, a new permutation every epoch; of V streams, stream s
takes j = s, s + V, s + 2V, …. So each document is taken once an epoch, and no stream asks another. The t-th document
of a stream is worked out by the page, many at once, because one alone costs nearly as much.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from trinity.data.stream.permutation import permutation_keys, permute, random_bits, random_key

PAGE_EPOCHS = 4  # each has keys of its own, which take as long to make as some hundred documents


class Source(Protocol):
    """Documents as token ids: prepared (shards.TokenSource) or tokenised when asked for (text_source.TextSource).

    Attributes:
        documents, tokens: how many; BOS counts as a token.
        lookahead: documents whose lengths are asked for at once.
        vocab_size, bos_id, tokenizer_fingerprint: of the tokenizer.
        fingerprint: hash of the content.
    """

    documents: int
    tokens: int
    lookahead: int
    vocab_size: int
    bos_id: int
    tokenizer_fingerprint: str
    fingerprint: str

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """[n] int64: tokens of each of the documents [n], BOS counted."""

    def length(self, document: int) -> int:
        """Tokens of one document."""

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """[length] ids of a document, from token `start` on."""


class Page(NamedTuple):
    """Consecutive documents of a stream's order; shorter than a page, or empty, where the source ends.

    documents: their numbers.
    lengths: their tokens.
    chances: a random number in [0, 1) for each, another one every epoch.
    """

    documents: list[int]
    lengths: list[int]
    chances: list[float]


class DocumentOrder:
    """What all streams share: the sources, and the order of documents in each.

    Attributes:
        names, sources: in the order of the mapping.
        streams: V.
    """

    def __init__(self, sources: Mapping[str, Source], seed: int, streams: int, repeat: bool = True) -> None:
        """Take the sources.

        Args:
            sources: name → documents; their order breaks ties.
            seed: of the order of documents.
            streams: V.
            repeat: whether a source begins anew, in another order, when all its documents are taken.
        """
        self.names, self.sources = list(sources), list(sources.values())
        self.seed, self.streams, self.repeat = seed, streams, repeat
        self.heard: Callable[[int, np.ndarray, np.ndarray], None] | None = None
        """Called with (source, documents, lengths) whenever a page has asked a source for lengths."""

    def page_size(self, source: int) -> int:
        """Documents of a page: the source's lookahead, but no more than a stream takes in some epochs."""
        documents = self.sources[source]
        return max(1, min(documents.lookahead, PAGE_EPOCHS * documents.documents // self.streams))

    def page(self, source: int, stream: int, number: int) -> Page:
        """Documents number·size to (number + 1)·size − 1 of a stream's order, where size is page_size(source)."""
        name, documents, size = self.names[source], self.sources[source], self.page_size(source)
        n = documents.documents
        j = stream + self.streams * np.arange(number * size, (number + 1) * size)
        if not self.repeat:
            j = j[j < n]
        found, chances = np.empty_like(j), np.empty(len(j))
        epochs = j // n
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = permute(j[here] % n, n, permutation_keys(self.seed, name, epoch))
            bits = random_bits(random_key(self.seed, name, epoch, "chance"), found[here])
            chances[here] = (bits >> np.uint64(11)) / 2.0**53
        lengths = documents.lengths(found)
        if self.heard is not None:
            self.heard(source, found, lengths)
        return Page(found.tolist(), lengths.tolist(), chances.tolist())
