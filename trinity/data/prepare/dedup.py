"""Which texts were seen before, by their hashes: a table of 128-bit numbers, 23 to 34 bytes a text, no objects.

Open addressing with linear probing, all numbers of a batch at once: each looks at its slot; if that holds the number it
was seen, if it is empty the number goes there, else it looks at the next one. The zero number marks an empty slot; no
text's hash will be it.
"""

import numpy as np

FULLEST = 0.7
GROWTH = 1.5


class SeenHashes:
    """A growing set of hashes."""

    def __init__(self, expected: int = 0) -> None:
        """`expected`: how many hashes will be added at least."""
        self.count = 0
        self._table = np.zeros((max(1024, int(expected / FULLEST)), 2), np.uint64)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes [m, 2]; returns [m] bool: which of them were new, of several equal ones the first."""
        if self.count + len(hashes) > FULLEST * len(self._table):
            self._grow(self.count + len(hashes))
        _, first = np.unique(hashes, axis=0, return_index=True)
        new = np.zeros(len(hashes), bool)
        new[first[self._insert(hashes[first])]] = True
        self.count += int(new.sum())
        return new

    def _insert(self, hashes: np.ndarray) -> np.ndarray:
        """Put distinct hashes [m, 2] into the table; returns [m] bool: which were not there."""
        new = np.zeros(len(hashes), bool)
        waiting = np.arange(len(hashes))
        slots = hashes[:, 0] % np.uint64(len(self._table))
        while len(waiting):
            keys, at = hashes[waiting], slots[waiting]
            empty = ~self._table[at].any(axis=1)
            # Of several that want one empty slot the last gets it; the others find it taken.
            self._table[at[empty]] = keys[empty]
            there = (self._table[at] == keys).all(axis=1)
            new[waiting[there & empty]] = True
            waiting = waiting[~there]
            slots[waiting] = (slots[waiting] + np.uint64(1)) % np.uint64(len(self._table))
        return new

    def _grow(self, wanted: int) -> None:
        old = self._table
        self._table = np.zeros((int(max(wanted / FULLEST, len(old)) * GROWTH), 2), np.uint64)
        for start in range(0, len(old), 1 << 20):
            part = old[start : start + (1 << 20)]
            self._insert(part[part.any(axis=1)])
