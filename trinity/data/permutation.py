"""The order of documents in an epoch: a pseudo-random permutation of [0, n) that is computed, not stored.

A Feistel network permutes [0, 2^bits), where 2^bits is the next power of two: each round changes one half of the number
by a function of the other, which can be undone, whatever the function. A result that is not below n is put in again
until one is ("cycle walking", Black and Rogaway 2002), less than twice on average; that leaves a permutation of [0, n).
"""

import hashlib
from functools import lru_cache

ROUNDS = 8
MASK = 2**32 - 1


@lru_cache(maxsize=1024)
def permutation_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The round keys, 32 bits each, of one epoch of one source."""
    text = f"{seed} {epoch} {source}".encode()
    return tuple(
        int.from_bytes(hashlib.blake2b(text, digest_size=4, salt=bytes([round])).digest()) for round in range(ROUNDS)
    )


def permute(index: int, n: int, keys: tuple[int, ...]) -> int:
    """Where the permutation of [0, n) with these keys sends `index`, itself in [0, n); n is at most 2^64."""
    assert 0 <= index < n
    bits = (n - 1).bit_length()
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        high, low = index >> low_bits, index & low_mask
        for round in range(0, ROUNDS, 2):
            low ^= _mix(high ^ keys[round]) & low_mask
            high ^= _mix(low ^ keys[round + 1]) & high_mask
        index = high << low_bits | low
        if index < n:
            return index


def _mix(x: int) -> int:
    """The finalizer of MurmurHash3 (Appleby 2011), 32 bits: each bit of x flips any of the result half the time."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)
