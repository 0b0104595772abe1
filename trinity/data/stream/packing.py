"""Documents into rows: one logical stream, what it has open, and the two ways in which it reads on.

Sequential: a document is read to its end, over as many rows as that takes, before another is begun.
RSDB, the Random Sequential Document Buffer (report, section on data; Large's third phase): many documents are open,
each with a read head. To fill a row: pick one of them at random, read on from its head until the document or the row
ends; if there is room left, pick another. Finished documents leave. When the buffer has shrunk to the size that was
asked for, it is filled in bulk to twice that.

Either way no token is dropped and each document is read in order. A stream deals in pieces (source, document, start,
length) and never sees a token, so that replaying millions of rows to find a place in the data costs no reading.
"""

from typing import NamedTuple

import numpy as np

from trinity.data.stream.mixture import Phase
from trinity.data.stream.permutation import random_bits, random_key
from trinity.data.stream.shuffle import DocumentOrder, Page
from trinity.errors import UserError

CHOICES = 256
HEADER, PER_SOURCE, PER_DOCUMENT = 3, 4, 4


class Piece(NamedTuple):
    """Part of a document: `length` tokens of document number `document` of a source, from token `start` on."""

    source: str
    document: int
    start: int
    length: int


class OutOfDocuments(Exception):
    """A source has ended (data.exhausted is `end`), and with it what the stream has open."""


class LogicalStream:
    """One of the V streams.

    Attributes:
        open: documents that are being read: [source, document, tokens read, its length] each.
        taken: by source, documents of its order that lie behind, those among them that a length bias left out.
        read: by source, tokens dealt out since the run began.
    """

    def __init__(self, order: DocumentOrder, number: int) -> None:
        """Stand at the beginning of stream number `number`."""
        self.order, self.number = order, number
        count = len(order.names)
        self.open: list[list[int]] = []
        self.taken, self.read = [0] * count, [0] * count
        self._drawn = [0] * count  # in this phase, head start included
        self._phase = -1
        self._choices_made = 0
        self._choices: tuple[int, list[int]] = (-1, [])
        self._choice_key = random_key(order.seed, number, "rsdb")
        self._page_sizes = [order.page_size(source) for source in range(count)]
        self._pages: list[tuple[int, Page]] = [(0, Page([], [], []))] * count  # with the place of their first document

    def pack(self, tokens: int, phase: Phase, number: int) -> list[Piece]:
        """The pieces of the next row.

        Args:
            tokens: exactly so many.
            phase: how to draw and pack; what an earlier phase left open is read on with.
            number: of the phase.
        Raises:
            OutOfDocuments: the row cannot be filled; the stream is of no more use then.
        """
        if number != self._phase:
            self._enter(phase, number)
        names, size, pieces = self.order.names, phase.rsdb_size, []
        while tokens:
            if len(self.open) <= size:
                self._fill(phase, 2 * size or 1)
            at = self._random_below(len(self.open)) if size else 0
            document = self.open[at]
            source, which, start, length = document
            take = min(tokens, length - start)
            pieces.append(Piece(names[source], which, start, take))
            self.read[source] += take
            tokens -= take
            if start + take < length:
                document[2] = start + take
            elif size:
                self.open[at] = self.open[-1]  # the order of a buffer that is picked from at random does not matter
                self.open.pop()
            else:
                self.open.pop(0)
        return pieces

    def _fill(self, phase: Phase, count: int) -> None:
        """Open documents until there are so many, or as many as there are."""
        while len(self.open) < count and self._draw(phase):
            pass
        if not self.open:
            raise OutOfDocuments

    def _random_below(self, n: int) -> int:
        """The stream's next random number in [0, n): its next 64 random bits, times n, shifted down by 64."""
        page, at = divmod(self._choices_made, CHOICES)
        if self._choices[0] != page:
            counters = np.arange(page * CHOICES, (page + 1) * CHOICES)
            self._choices = page, random_bits(self._choice_key, counters).tolist()
        self._choices_made += 1
        return self._choices[1][at] * n >> 64

    def _enter(self, phase: Phase, number: int) -> None:
        self._phase = number
        lengths = [self._next_length(source) if weight else 0 for source, weight in enumerate(phase.weights)]
        begin, self._drawn = phase.head_start(self.order.names, lengths, self.order.seed, number, self.number)
        self._draw(phase, begin)

    def _draw(self, phase: Phase, source: int | None = None) -> bool:
        """Open the next document of a source, by default the one furthest behind; False where that source has ended."""
        if source is None:
            source = phase.furthest_behind(self._drawn)
        while True:
            first, page = self._pages[source]
            at = self.taken[source] - first
            if not 0 <= at < len(page.lengths):
                if not self._turn_page(source):
                    return False
                continue
            self.taken[source] += 1
            length = page.lengths[at]
            if phase.bias is None or page.chances[at] < phase.bias.keep(length):
                break
        self._drawn[source] += length
        self.open.append([source, page.documents[at], 0, length])
        return True

    def _turn_page(self, source: int) -> bool:
        """Get the page that holds the source's next document; False where there is none."""
        size = self._page_sizes[source]
        number = self.taken[source] // size
        page = self.order.page(source, self.number, number)
        self._pages[source] = number * size, page
        return self.taken[source] - number * size < len(page.lengths)

    def _next_length(self, source: int) -> int:
        """Tokens of the source's next document, 0 where there is none."""
        if not self._turn_page(source):
            return 0
        first, page = self._pages[source]
        return page.lengths[self.taken[source] - first]

    def state(self) -> list[int]:
        """Where the stream stands: phase, random choices made, number of sources; for each source its key, documents
        taken, tokens drawn in this phase, tokens read; for each open document its source's place among them, its
        number, tokens read, tokens in all."""
        state = [self._phase, self._choices_made, len(self.order.names)]
        for name, *counts in zip(self.order.names, self.taken, self._drawn, self.read):
            state += [source_key(name), *counts]
        for document in self.open:
            state += document
        return state

    def restore(self, state: list[int]) -> None:
        """Stand where a stream stood when state() was called; sources may have been added since.

        Raises:
            UserError: the state has drawn from a source that is not there.
        """
        self._phase, self._choices_made, count = state[:HEADER]
        begin = HEADER + count * PER_SOURCE
        places = {source_key(name): place for place, name in enumerate(self.order.names)}
        self.taken, self._drawn, self.read = ([0] * len(places) for _ in range(3))
        place_then: list[int | None] = []
        for at in range(HEADER, begin, PER_SOURCE):
            key, *counts = state[at : at + PER_SOURCE]
            place = places.get(key)
            if place is None and any(counts):
                raise UserError(
                    "the saved data state has drawn from a source that data.train does not name; "
                    "name all that it named then (a weight of 0 leaves one out)"
                )
            if place is not None:
                self.taken[place], self._drawn[place], self.read[place] = counts
            place_then.append(place)
        self.open = [
            [place_then[state[at]], *state[at + 1 : at + PER_DOCUMENT]] for at in range(begin, len(state), PER_DOCUMENT)
        ]


def source_key(name: str) -> int:
    """63 bits that stand for a source's name in a state of integers."""
    return random_key("source", name) >> 1
