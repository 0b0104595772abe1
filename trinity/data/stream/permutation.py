"""The order of documents in an epoch: a pseudo-random permutation of [0, n) that is computed, not stored.

A Feistel network permutes [0, 2^bits), where 2^bits is the next power of two: each round changes one half of the number
by a function of the other, which can be undone, whatever the function. A result that is not below n is put in again
until one is ("cycle walking", Black and Rogaway 2002), less than twice on average; that leaves a permutation of [0, n).

Other random numbers of the data are splitmix64 (Steele et al. 2014) of a counter: state is the counter, nothing else.
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 8
MASK = np.uint64(2**32 - 1)


@lru_cache(maxsize=1024)
def permutation_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The round keys, 32 bits each, of one epoch of one source."""
    text = f"{seed} {epoch} {source}".encode()
    return tuple(
        int.from_bytes(hashlib.blake2b(text, digest_size=4, salt=bytes([round])).digest()) for round in range(ROUNDS)
    )


def permute(indices: np.ndarray, n: int, keys: tuple[int, ...]) -> np.ndarray:
    """Where the permutation of [0, n) with these keys sends `indices`, int64 in [0, n); n is at most 2^62."""
    assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < n)
    bits = (n - 1).bit_length()
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    found = indices.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        x = found[walking]
        high, low = x >> low_bits, x & low_mask
        for round in range(0, ROUNDS, 2):
            low ^= _mix(high ^ np.uint64(keys[round])) & low_mask
            high ^= _mix(low ^ np.uint64(keys[round + 1])) & high_mask
        x = high << low_bits | low
        found[walking] = x
        walking = walking[x >= n]
    return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3 (Appleby 2011), 32 bits: each bit of x flips any of the result half the time."""
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & MASK
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & MASK
    return x ^ (x >> np.uint64(16))


def random_key(*parts: object) -> int:
    """64 bits that are a function of the parts' text: a key for `random_bits`, or a number of its own."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def random_bits(key: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits, uint64, for each counter: splitmix64 begun at `key`."""
    x = np.uint64(key) + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
