"""Pack documents into sequences: one logical stream, its open documents, and the three ways of packing.

Sequential: a document is read to its end, over as many sequences as that takes, before the next one is opened.
RSDB, the Random Sequential Document Buffer (report, section on data; Large's third phase): many documents are open,
each with a read head. To fill a sequence: pick one of them at random, read from its head until the document or the
sequence ends; if there is room left, pick another. Finished documents leave the buffer. When it has shrunk to
`rsdb_size` documents, it is filled to twice that.

Either way no token is dropped and each document is read in order.

Best fit, for fine-tuning: whole documents (examples) only. A window of documents is drawn, enough for some rows, and
put into rows by best-fit decreasing. The rows are used in random order and end in padding. The emptiest row is not
used: it is the first row of the next window, to be filled up there. So each document is used in its window or the next.
A window ends early where the next document begins another epoch of a source that the window has a document of; the
emptiest row is then used if it has one too. So a stream uses all of its documents of an epoch before it uses one
again, and no row holds an example twice.

A stream makes pieces (source, document, start,
length) and never reads a token, so that replaying millions of sequences to find a place in the data reads no file.
"""

from typing import NamedTuple

import numpy as np

from trinity.data.stream.best_fit import check_fits, pack_best_fit
from trinity.data.stream.mixture import Phase
from trinity.data.stream.shuffle import DocumentOrder, Page, random_bits, random_key
from trinity.errors import UserError

RANDOM_PAGE = 256
"""Random numbers that are computed at once."""
HEADER, PER_SOURCE, PER_DOCUMENT = 3, 4, 4
"""Integers of a state (see LogicalStream.state)."""
UNPLANNED = 0
"""In place of the row of a best-fit document that has none yet."""


class Piece(NamedTuple):
    """Part of a document: `length` tokens of document number `document` of a source, from token `start` on."""

    source: str
    document: int
    start: int
    length: int


class OutOfDocuments(Exception):
    """A source has ended (data.exhausted is `end`), and the stream has no open document left."""


class LogicalStream:
    """One of the run's logical streams (data.streams).

    Attributes:
        open: documents that are being read: [source, document, tokens read, its length] each. Best fit has in place of
            tokens read the number of the row that the document is in, from 1, in the order in which rows are used;
            or UNPLANNED.
        documents_taken: by source, documents of its order that were drawn, or left out by a length bias.
        tokens_read: by source, tokens packed since the run began.
    """

    def __init__(self, order: DocumentOrder, number: int) -> None:
        """Start at the beginning of stream number `number`."""
        self.order, self.number = order, number
        count = len(order.names)
        self.open: list[list[int]] = []
        self.documents_taken, self.tokens_read = [0] * count, [0] * count
        self._tokens_drawn = [0] * count  # in this phase, head start included
        self._phase = -1
        self._randoms_used = 0
        self._random_page: tuple[int, list[int]] = (-1, [])
        self._random_key = random_key(order.seed, number, "rsdb")
        self._page_sizes = [order.page_size(source) for source in range(count)]
        self._pages: list[tuple[int, Page]] = [(0, Page([], [], []))] * count  # with the index of their first document

    def pack(self, tokens: int, phase: Phase, phase_number: int) -> list[Piece]:
        """The pieces of the next sequence.

        Args:
            tokens: length of the sequence.
            phase: how to draw and pack; documents that an earlier phase left open are read on.
            phase_number: 0 for the start of the run.
        Raises:
            OutOfDocuments: the sequence cannot be filled; the stream must not be used afterwards.
            UserError: with best fit, a document is longer than the sequence.
        """
        if phase_number != self._phase:
            self._begin_phase(phase, phase_number)
        if phase.best_fit_rows:
            return self._whole_documents(tokens, phase)
        names, size, pieces = self.order.names, phase.rsdb_size, []
        while tokens:
            if len(self.open) <= size:
                self._fill(phase, 2 * size or 1)  # sequential packing has size 0: one open document
            at = self._random_below(len(self.open)) if size else 0
            document = self.open[at]
            source, index, start, length = document
            take = min(tokens, length - start)
            pieces.append(Piece(names[source], index, start, take))
            self.tokens_read[source] += take
            tokens -= take
            if start + take < length:
                document[2] = start + take
            elif size:
                self.open[at] = self.open[-1]  # documents are picked at random, so their order does not matter
                self.open.pop()
            else:
                self.open.pop(0)
        return pieces

    def _whole_documents(self, tokens: int, phase: Phase) -> list[Piece]:
        """The documents of the next best-fit row."""
        if not self.open or self.open[0][2] == UNPLANNED:
            self._plan_window(tokens, phase)
        row = self.open[0][2]
        count = next((at for at, document in enumerate(self.open) if document[2] != row), len(self.open))
        taken, self.open = self.open[:count], self.open[count:]
        for source, _, _, length in taken:
            self.tokens_read[source] += length
        return [Piece(self.order.names[source], index, 0, length) for source, index, _, length in taken]

    def _plan_window(self, tokens: int, phase: Phase) -> None:
        """Draw documents for some rows of `tokens` tokens, and put all open ones into rows in random order."""
        carried, tokens_carried = len(self.open), sum(length for *_, length in self.open)
        if tokens_carried > tokens:  # the rest of a phase with other rows
            carried = 0
        room, more = tokens * phase.best_fit_rows - tokens_carried, True
        while more and room > 0:
            more = self._draw(phase)
            room -= self.open[-1][3] if more else 0
        if not self.open:
            raise OutOfDocuments
        for source, index, _, length in self.open:
            check_fits(self.order.names[source], index, length, tokens)
        rows = pack_best_fit([length for *_, length in self.open], tokens, carried)
        late = rows[bool(carried) :]  # no row is left over twice
        rest = min(late, key=lambda row: sum(self.open[at][3] for at in row)) if len(rows) > 1 and late else []
        if any(self._begins_epoch(self.open[at][0]) for at in rest):
            rest = []
        used = [row for row in rows if row is not rest]
        for last in range(len(used) - 1, 0, -1):  # Fisher-Yates: best fit makes rows of the longest documents first
            at = self._random_below(last + 1)
            used[at], used[last] = used[last], used[at]
        ordered = [(at, number) for number, row in enumerate(used, 1) for at in row] + [(at, UNPLANNED) for at in rest]
        self.open = [[*self.open[at][:2], number, self.open[at][3]] for at, number in ordered]

    def _fill(self, phase: Phase, count: int) -> None:
        """Fill the buffer to `count` documents, or until the source ends."""
        while len(self.open) < count and self._draw(phase):
            pass
        if not self.open:
            raise OutOfDocuments

    def _random_below(self, n: int) -> int:
        """The stream's next random number in [0, n): its next 64 random bits, times n, shifted down by 64."""
        page, at = divmod(self._randoms_used, RANDOM_PAGE)
        if self._random_page[0] != page:
            counters = np.arange(page * RANDOM_PAGE, (page + 1) * RANDOM_PAGE)
            self._random_page = page, random_bits(self._random_key, counters).tolist()
        self._randoms_used += 1
        return self._random_page[1][at] * n >> 64

    def _begin_phase(self, phase: Phase, phase_number: int) -> None:
        self._phase = phase_number
        if phase.best_fit_rows:  # rows may have another length now
            self.open = [[source, index, UNPLANNED, length] for source, index, _, length in self.open]
        lengths = [self._next_length(source) if weight else 0 for source, weight in enumerate(phase.weights)]
        begin, self._tokens_drawn = phase.head_start(
            self.order.names, lengths, self.order.seed, phase_number, self.number
        )
        self._draw(phase, begin)

    def _draw(self, phase: Phase, source: int | None = None) -> bool:
        """Open the next document of a source, by default of the one furthest behind.

        Returns:
            False if that source has ended, or, with best fit, if the document begins another epoch than the open ones.
        """
        if source is None:
            source = phase.furthest_behind(self._tokens_drawn)
        while True:
            if phase.best_fit_rows and self._begins_epoch(source) and any(source == other for other, *_ in self.open):
                return False
            first, page = self._pages[source]
            at = self.documents_taken[source] - first
            if not 0 <= at < len(page.lengths):
                if not self._load_page(source):
                    return False
                continue
            self.documents_taken[source] += 1
            length = page.lengths[at]
            if phase.bias is None or page.chances[at] < phase.bias.keep(length):
                break
        self._tokens_drawn[source] += length
        self.open.append([source, page.documents[at], 0, length])
        return True

    def _begins_epoch(self, source: int) -> bool:
        """Whether the source's next document is of another epoch than the one before it in this stream."""
        taken = self.documents_taken[source]
        return taken > 0 and self.order.epoch(source, self.number, taken) != self.order.epoch(
            source, self.number, taken - 1
        )

    def _load_page(self, source: int) -> bool:
        """Get the page that holds the source's next document; False if there is none."""
        size = self._page_sizes[source]
        number = self.documents_taken[source] // size
        page = self.order.page(source, self.number, number)
        self._pages[source] = number * size, page
        return self.documents_taken[source] - number * size < len(page.lengths)

    def _next_length(self, source: int) -> int:
        """Tokens of the source's next document, 0 if there is none."""
        if not self._load_page(source):
            return 0
        first, page = self._pages[source]
        return page.lengths[self.documents_taken[source] - first]

    def state(self) -> list[int]:
        """The stream's position as integers: phase, random numbers drawn, number of sources; for each source its key,
        documents taken, tokens drawn in this phase, tokens read; for each open document the index of its source, its
        number, tokens read (best fit: its row), tokens in all."""
        state = [self._phase, self._randoms_used, len(self.order.names)]
        for name, *counts in zip(self.order.names, self.documents_taken, self._tokens_drawn, self.tokens_read):
            state += [source_key(name), *counts]
        for document in self.open:
            state += document
        return state

    def restore(self, state: list[int]) -> None:
        """Go to the position that state() returned; sources may have been added since.

        Raises:
            UserError: the state has drawn from a source that this stream does not have.
        """
        self._phase, self._randoms_used, count = state[:HEADER]
        begin = HEADER + count * PER_SOURCE
        indices = {source_key(name): index for index, name in enumerate(self.order.names)}
        self.documents_taken, self._tokens_drawn, self.tokens_read = ([0] * len(indices) for _ in range(3))
        new_index: dict[int, int] = {}  # index of a source in the state → here
        for old, at in enumerate(range(HEADER, begin, PER_SOURCE)):
            key, *counts = state[at : at + PER_SOURCE]
            index = indices.get(key)
            if index is None and any(counts):
                raise UserError(
                    "the saved data state has drawn from a source that data.train does not name; "
                    "name all that it named then (a weight of 0 leaves one out)"
                )
            if index is not None:
                self.documents_taken[index], self._tokens_drawn[index], self.tokens_read[index] = counts
                new_index[old] = index
        self.open = [
            [new_index[state[at]], *state[at + 1 : at + PER_DOCUMENT]] for at in range(begin, len(state), PER_DOCUMENT)
        ]


def source_key(name: str) -> int:
    """63 bits that identify a source's name in a state of integers."""
    return random_key("source", name) >> 1
