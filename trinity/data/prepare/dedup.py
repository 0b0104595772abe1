"""A set of 128-bit text hashes, to find duplicates: an array of 23 to 34 bytes a text, without Python objects.

Open addressing with linear probing, for all hashes of a batch at once: if a hash's slot holds the hash, it was seen; if
the slot is empty, the hash is stored there; otherwise the next slot is tried. Zero marks an empty slot; that a text's
hash is zero has a probability of 2⁻¹²⁸.
"""

import numpy as np

MAX_LOAD = 0.7
GROWTH = 1.5


class SeenHashes:
    """A growing set of hashes."""

    def __init__(self, expected: int = 0) -> None:
        """`expected`: number of hashes that will be added at least."""
        self.count = 0
        self._table = np.zeros((max(1024, int(expected / MAX_LOAD)), 2), np.uint64)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes [m, 2]; returns [m] bool: which were new; of equal hashes, the first."""
        if self.count + len(hashes) > MAX_LOAD * len(self._table):
            self._grow(self.count + len(hashes))
        _, first = np.unique(hashes, axis=0, return_index=True)
        new = np.zeros(len(hashes), bool)
        new[first[self._insert(hashes[first])]] = True
        self.count += int(new.sum())
        return new

    def _insert(self, hashes: np.ndarray) -> np.ndarray:
        """Put distinct hashes [m, 2] into the table; returns [m] bool: which were new."""
        new = np.zeros(len(hashes), bool)
        waiting = np.arange(len(hashes))
        slots = hashes[:, 0] % np.uint64(len(self._table))
        while len(waiting):
            keys, at = hashes[waiting], slots[waiting]
            empty = ~self._table[at].any(axis=1)
            # Of several hashes with the same empty slot the last one is stored; the others try the next slot.
            self._table[at[empty]] = keys[empty]
            stored = (self._table[at] == keys).all(axis=1)
            new[waiting[stored & empty]] = True
            waiting = waiting[~stored]
            slots[waiting] = (slots[waiting] + np.uint64(1)) % np.uint64(len(self._table))
        return new

    def _grow(self, count: int) -> None:
        old = self._table
        self._table = np.zeros((int(max(count / MAX_LOAD, len(old)) * GROWTH), 2), np.uint64)
        for start in range(0, len(old), 1 << 20):
            part = old[start : start + (1 << 20)]
            self._insert(part[part.any(axis=1)])
