"""Rows made ahead of training by worker processes, beside the state as of the last row that was used.

A rank's streams are dealt whole to its workers, row by row in turn; torch's DataLoader keeps their order, notices a
worker that died, and ends them. Workers start as copies of the stream and tell nothing of their state: the stream here
goes over the same pieces, without reading tokens, when a row is used. So what a checkpoint holds does not depend on how
far the workers have come, and each row is checked against what it should be made of.
"""

import ctypes
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trinity.data.packing import OutOfDocuments, Piece
from trinity.data.sequences import Sequence, SequenceBatch, stack
from trinity.data.stream import SequenceStream
from trinity.errors import Failure, UserError


class Lengths(NamedTuple):
    """Lengths of documents [n] of a source, int64 both, that a worker asked for."""

    source: int
    documents: np.ndarray
    lengths: np.ndarray


class _Item(NamedTuple):
    """A row on its way: tokens, targets and document ids as int32 [3, S], which is one block of shared memory."""

    row_3S: Tensor
    pieces: list[Piece]
    lengths: list[Lengths]


class Loader:
    """A rank's batches.

    Attributes:
        stream: stands behind the last row that was taken.
    """

    def __init__(self, stream: SequenceStream, workers: int, ahead: int, pin: bool = False) -> None:
        """Start no process yet.

        Args:
            stream: where to begin.
            workers: processes; 0 makes rows when they are asked for. The largest divisor of the rank's streams that is
                no larger is used.
            ahead: rows that workers make in advance, in all.
            pin: whether batches lie in pinned memory, from which a GPU copies by itself.
        """
        own = stream.streams // stream.ranks
        self.stream, self.pin = stream, pin
        self.workers = max((count for count in range(1, min(workers, own) + 1) if own % count == 0), default=0)
        self._ahead = max(2, -(-ahead // max(1, self.workers)))
        self._items: Iterator[_Item | Exception | None] | None = None
        self._waiting: deque[_Item] = deque()
        self._at_end = False

    def take(self, n: int) -> SequenceBatch:
        """The rank's next n rows.

        Raises:
            UserError: a source has ended before them, or cannot be read.
            Failure: a worker has died.
        """
        if self.ended(n):
            raise UserError(
                "the data ends before the run does: a source has no more documents; "
                "set data.exhausted=repeat, or a shorter run"
            )
        items = [self._waiting.popleft() for _ in range(n)]
        for item in items:
            self._learn(item.lengths)
            pieces = self.stream.pass_over(1)[0]
            assert item.pieces == pieces, "a worker made another row than the stream has here"
        length = self.stream.plan.at_sequence(self.stream.k).sequence_length
        return stack([Sequence(*item.row_3S, item.pieces) for item in items], length, self.pin)

    def ended(self, n: int) -> bool:
        """Whether fewer than n rows are left, of which there are endlessly many where sources are repeated."""
        if self._items is None:
            self._items = self._start()
        while len(self._waiting) < n and not self._at_end:
            item = self._next_item()
            if isinstance(item, Exception):
                raise item
            if item is None:
                self._at_end = True
            else:
                self._waiting.append(item)
        return len(self._waiting) < n

    def _next_item(self) -> "_Item | Exception | None":
        try:
            return next(self._items)
        except (RuntimeError, OSError, EOFError) as error:  # as torch tells of a worker that died
            raise Failure(
                f"a process that prepares data has ended ({str(error).splitlines()[0]}); "
                "if memory is short, data.workers=0 does without them"
            ) from error

    def state_dict(self) -> dict[str, Tensor]:
        """As SequenceStream.state_dict, after the last row that was taken."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As SequenceStream.load_state_dict; what workers have made ahead is thrown away."""
        self.close()
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End the workers."""
        self._items = None
        self._waiting.clear()
        self._at_end = False

    def _start(self) -> Iterator:
        rows = _Rows(self.stream)
        if not self.workers:
            return iter(rows)
        loader = DataLoader(
            rows,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self._ahead,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # the workers' seeds are drawn from it; the run's own is left alone
        )
        return iter(loader)

    def _learn(self, lengths: list[Lengths]) -> None:
        for source, documents, found in lengths:
            learn = getattr(self.stream.order.sources[source], "learn", None)
            if learn is not None:
                learn(documents, found)


class _Rows(IterableDataset):
    """What one worker, or the training process itself, makes: every so many'th row of the rank."""

    def __init__(self, stream: SequenceStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[_Item | Exception | None]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        stream = self.stream.fork()
        heard: list[Lengths] = []
        stream.order.heard = lambda *lengths: heard.append(Lengths(*lengths))
        k = stream.next_own(stream.k) + part * stream.ranks
        while True:
            try:
                row = stream.row(k)
                parts_of_row = (row.tokens, row.targets, row.document_ids)
                item = _Item(torch.stack([part.int() for part in parts_of_row]), row.pieces, list(heard))
            except OutOfDocuments:
                item = None
            except (UserError, OSError) as error:
                item = error  # DataLoader would wrap it in a traceback
            yield item
            heard.clear()
            k += parts * stream.ranks


def _begin_worker(worker: int) -> None:
    """A signal is the training process's to answer; whatever ends that one, even SIGKILL, ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
