"""The shuffled order of each source's documents, computed, not stored.

Each source has one endless order of documents j = 0, 1, 2, …: a new permutation every epoch. Of V streams, stream s
takes j = s, s + V, s + 2V, …, so each document is taken once an epoch without communication between streams. A
stream's documents are computed a page at a time, because one alone costs nearly as much as many.

The permutation of [0, n) is a Feistel network on [0, 2^bits), where 2^bits is the next power of two from n on. Each
round changes one half of the number by a function of the other half, which can be undone for any function. A
result of n or more is put through the network again until it is below n ("cycle walking", Black and Rogaway 2002), less
than twice on average; the result is a permutation of [0, n).

All other random numbers of the data are splitmix64 (Steele et al. 2014) of a counter; the counter is the whole state.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trinity.data.sources.source import Source

PAGE_EPOCHS = 4  # each epoch has its own keys, which take as long to make as some hundred documents
ROUNDS = 8
MASK = np.uint64(2**32 - 1)


class Page(NamedTuple):
    """Consecutive documents of a stream's order; shorter than a page, or empty, where the source ends.

    documents: their numbers.
    lengths: their tokens.
    chances: a random number in [0, 1) for each document, drawn again every epoch.
    """

    documents: list[int]
    lengths: list[int]
    chances: list[float]


class DocumentOrder:
    """The sources, and the order of documents in each; shared by all streams.

    Attributes:
        names, sources: in the order of the mapping.
        streams: V.
        on_lengths: called with (source, documents, lengths) whenever a page has requested lengths from a source.
    """

    def __init__(self, sources: Mapping[str, Source], seed: int, streams: int, repeat: bool = True) -> None:
        """
        Args:
            sources: name → documents; their order breaks ties.
            seed: of the order of documents.
            streams: V.
            repeat: start the next epoch, in another order, when all documents of a source are taken.
        """
        self.names, self.sources = list(sources), list(sources.values())
        self.seed, self.streams, self.repeat = seed, streams, repeat
        self.on_lengths: Callable[[int, np.ndarray, np.ndarray], None] | None = None

    def page_size(self, source: int) -> int:
        """Documents of a page: the source's lookahead, but at most what a stream takes in PAGE_EPOCHS epochs."""
        documents = self.sources[source]
        return max(1, min(documents.lookahead, PAGE_EPOCHS * documents.documents // self.streams))

    def epoch(self, source: int, stream: int, number: int) -> int:
        """The epoch of document `number` of a stream's order, from 0."""
        return (stream + self.streams * number) // self.sources[source].documents

    def page(self, source: int, stream: int, number: int) -> Page:
        """Documents number·size to (number + 1)·size − 1 of a stream's order, where size is page_size(source)."""
        name, documents, size = self.names[source], self.sources[source], self.page_size(source)
        n = documents.documents
        j = stream + self.streams * np.arange(number * size, (number + 1) * size)
        if not self.repeat:
            j = j[j < n]
        numbers, chances = np.empty_like(j), np.empty(len(j))
        epochs = j // n
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = permute(j[here] % n, n, permutation_keys(self.seed, name, epoch))
            bits = random_bits(random_key(self.seed, name, epoch, "chance"), numbers[here])
            chances[here] = (bits >> np.uint64(11)) / 2.0**53
        lengths = documents.lengths(numbers)
        if self.on_lengths is not None:
            self.on_lengths(source, numbers, lengths)
        return Page(numbers.tolist(), lengths.tolist(), chances.tolist())


@lru_cache(maxsize=1024)
def permutation_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The round keys, 32 bits each, of one epoch of one source."""
    text = f"{seed} {epoch} {source}".encode()
    return tuple(
        int.from_bytes(hashlib.blake2b(text, digest_size=4, salt=bytes([round])).digest()) for round in range(ROUNDS)
    )


def permute(indices: np.ndarray, n: int, keys: tuple[int, ...]) -> np.ndarray:
    """The images of `indices`, int64 in [0, n), under the permutation of [0, n) with these keys; n is at most 2^62."""
    assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < n)
    bits = (n - 1).bit_length()
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    images = indices.astype(np.uint64)
    walking = np.arange(len(images))
    while len(walking):
        x = images[walking]
        high, low = x >> low_bits, x & low_mask
        for round in range(0, ROUNDS, 2):
            low ^= _mix(high ^ np.uint64(keys[round])) & low_mask
            high ^= _mix(low ^ np.uint64(keys[round + 1])) & high_mask
        x = high << low_bits | low
        images[walking] = x
        walking = walking[x >= n]
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3 (Appleby 2011), 32 bits: each bit of x flips any of the result half the time."""
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & MASK
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & MASK
    return x ^ (x >> np.uint64(16))


def random_key(*parts: object) -> int:
    """64 bits that are a function of the parts' text: a key for `random_bits`, or a random number by itself."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def random_bits(key: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits, uint64, for each counter: splitmix64 started at `key`."""
    x = np.uint64(key) + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
