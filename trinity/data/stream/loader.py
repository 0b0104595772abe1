"""Rows made ahead of training by worker processes, beside the state as of the last row that was used.

A rank's streams are dealt whole to its workers, row by row in turn. Workers start as copies of the stream and tell
nothing of their state: the stream here goes over the same pieces, without reading tokens, when a row is used. So what a
checkpoint holds does not depend on how far the workers have come, and each row is checked against what it should be
made of.

Each worker has a pipe of its own, which ends with it, at whatever moment it dies. (torch's DataLoader has one queue for
all, on which a message cut short is waited for without end; sends each tensor as a file of its own in shared memory, a
millisecond a row; and raises a worker's death wherever the training process happens to be, in the middle of a save.)
"""

import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.stream.collate import Batch, PackedSequence, collate
from trinity.data.stream.packing import OutOfDocuments
from trinity.data.stream.stream import SequenceStream
from trinity.errors import Failure, UserError


class Lengths(NamedTuple):
    """Lengths of documents [n] of a source, int64 both, that a worker asked for."""

    source: int
    documents: np.ndarray
    lengths: np.ndarray


Made = tuple[PackedSequence, list[Lengths]] | Exception | None
"""What a worker sends: a sequence and the lengths it asked for; why it cannot be read; or None at the data's end."""


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
        self._started: list[_Worker] = []
        self._items: Iterator[Made] | None = None
        self._waiting: deque[tuple[PackedSequence, list[Lengths]]] = deque()
        self._at_end = False

    def take(self, n: int) -> Batch:
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
        sequences = []
        for _ in range(n):
            sequence, lengths = self._waiting.popleft()
            self._learn(lengths)
            pieces = self.stream.pass_over(1)[0]
            assert sequence.pieces == pieces, "a worker made another sequence than the stream has here"
            sequences.append(sequence)
        return collate(sequences, self.stream.sequence_length(self.stream.k), self.pin)

    def ended(self, n: int) -> bool:
        """Whether fewer than n rows are left, of which there are endlessly many where sources are repeated."""
        if self._items is None:
            self._items = self._start()
        while len(self._waiting) < n and not self._at_end:
            item = next(self._items)
            if isinstance(item, Exception):
                raise item
            if item is None:
                self._at_end = True
            else:
                self._waiting.append(item)
        return len(self._waiting) < n

    def state_dict(self) -> dict[str, Tensor]:
        """As SequenceStream.state_dict, after the last row that was taken."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As SequenceStream.load_state_dict; what workers have made ahead is thrown away."""
        self.close()
        self.stream.load_state_dict(state)

    def jump(self, position: int) -> None:
        """As SequenceStream.jump; what workers have made ahead is made again, for it may be of another phase."""
        self.close()
        self.stream.jump(position)

    def close(self) -> None:
        """End the workers."""
        for worker in self._started:
            worker.close()
        self._started.clear()
        self._items = None
        self._waiting.clear()
        self._at_end = False

    def _start(self) -> Iterator[Made]:
        if not self.workers:
            return _make_rows(self.stream.fork(), 0, 1)
        for part in range(self.workers):
            self._started.append(_Worker(self.stream, part, self.workers, self._ahead, self._started))
        return self._in_turn()

    def _in_turn(self) -> Iterator[Made]:
        while True:
            for worker in self._started:
                yield worker.receive()

    def _learn(self, lengths: list[Lengths]) -> None:
        for source, documents, found in lengths:
            learn = getattr(self.stream.order.sources[source], "learn", None)
            if learn is not None:
                learn(documents, found)


def _make_rows(stream: SequenceStream, part: int, parts: int) -> Iterator[Made]:
    """Row number `part` of the rank and every so many'th after it; None without end where there are no more."""
    heard: list[Lengths] = []
    stream.order.heard = lambda *lengths: heard.append(Lengths(*lengths))
    k = stream.next_own(stream.k) + part * stream.ranks
    while True:
        try:
            yield stream.row(k), list(heard)
        except OutOfDocuments:
            yield None
        except (UserError, OSError) as error:
            yield error
        heard.clear()
        k += parts * stream.ranks


class _Worker:
    """A process that makes rows and sends them, some ahead of those that are received."""

    def __init__(self, stream: SequenceStream, part: int, parts: int, ahead: int, others: "list[_Worker]") -> None:
        # A fork takes no time and no second copy of what is imported; elsewhere than on Linux it is not safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        ends = [worker.pipe for worker in [*others, self]] if context.get_start_method() == "fork" else []
        self.process = context.Process(target=_work, args=(theirs, ends, stream, part, parts, ahead), daemon=True)
        # What a terminal or a job system sends to all processes is the training process's to answer.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        # Python ends what is left at its own end by SIGTERM, which a worker does not hear.
        Finalize(self, self.process.kill, exitpriority=1)

    def receive(self) -> Made:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise Failure(
                f"a process that prepares data {how}, perhaps for want of memory; data.workers=0 does without them"
            ) from None

    def close(self) -> None:
        self.process.kill()  # it holds nothing that could be lost
        self.process.join()
        self.pipe.close()


def _work(
    pipe: Connection, inherited: list[Connection], stream: SequenceStream, part: int, parts: int, ahead: int
) -> None:
    """What a worker does until it is ended."""
    for end in inherited:
        end.close()  # else a pipe would live as long as any worker, and its end would tell nothing
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    torch.set_num_threads(1)
    made: queue.Queue = queue.Queue(ahead)
    threading.Thread(target=_send, args=(pipe, made), daemon=True).start()
    for item in _make_rows(stream, part, parts):
        made.put(item)


def _send(pipe: Connection, made: queue.Queue) -> None:
    try:
        while True:
            pipe.send(made.get())
    except OSError:  # the training process is gone
        os._exit(1)
