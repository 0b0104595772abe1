"""Documents into rows, sequentially: a stream reads a document to its end, over as many rows as that takes.

A packer deals in pieces (source, document, start, length) and never sees a token, so that replaying millions of rows
to find a place in the data costs no reading.
"""

from typing import NamedTuple

from trinity.data.mixture import DocumentOrder


class Piece(NamedTuple):
    """Part of a document: `length` tokens of document number `document` of a source, from token `start` on."""

    source: str
    document: int
    start: int
    length: int


class SequentialPacker:
    """One logical stream: a document at a time, the rest of it first in the next row."""

    def __init__(self, order: DocumentOrder, stream: int) -> None:
        """Stand at the beginning of stream number `stream`."""
        self.order, self.stream = order, stream
        self._taken = [0] * len(order.sources)
        self._drawn = order.head_start(stream)
        # The document that is being read: source, number, tokens already dealt out, and its length.
        self._source, self._document, self._offset, self._length = 0, 0, 0, 0

    def pack(self, tokens: int) -> list[Piece]:
        """The pieces of the next row of exactly so many tokens."""
        pieces = []
        while tokens:
            if self._offset == self._length:
                self._next_document()
            length = min(tokens, self._length - self._offset)
            pieces.append(Piece(self.order.names[self._source], self._document, self._offset, length))
            self._offset += length
            tokens -= length
        return pieces

    def state(self) -> list[int]:
        """Where the stream stands: per source documents taken, then tokens drawn (head start included); then source,
        document, offset."""
        return [*self._taken, *self._drawn, self._source, self._document, self._offset]

    def restore(self, state: list[int]) -> None:
        """Stand where the stream stood when state() was called."""
        count = len(self.order.sources)
        self._taken, self._drawn = state[:count], state[count : 2 * count]
        self._source, self._document, self._offset = state[2 * count :]
        begun = any(self._taken)
        self._length = self.order.sources[self._source].length(self._document) if begun else 0

    def _next_document(self) -> None:
        source = self.order.furthest_behind(self._drawn)
        j = self.stream + self.order.streams * self._taken[source]
        self._source, self._document, self._offset = source, self.order.document(source, j), 0
        self._length = self.order.sources[source].length(self._document)
        self._taken[source] += 1
        self._drawn[source] += self._length
