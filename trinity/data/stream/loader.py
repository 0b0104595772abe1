"""The data loader: worker processes read sequences ahead of training; its state is that of the last one consumed.

Each logical stream of the rank belongs to one worker; the workers send sequences in turn, round robin. Workers start as
copies of the stream and never send their state: the training process packs each sequence again, without reading tokens,
when it is consumed. So a checkpoint does not depend on how far ahead the workers are, and the pieces of each sequence
are compared. The second packing costs 2 to 105 µs a sequence (README.md).

Each worker has its own pipe, which closes when the worker dies. (torch's DataLoader has one queue for all workers,
where the reader of a truncated message waits forever; it sends each tensor as its own file in shared memory, a
millisecond a sequence; and it raises a worker's death anywhere in the training process, even in the middle of a save.)
"""

import ctypes
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
from trinity.data.worker_process import CONTEXT, FORKS, exit_reason, start_worker
from trinity.errors import Failure, UserError


class Lengths(NamedTuple):
    """Lengths of documents [n] of a source that a worker has computed; both int64 [n]."""

    source: int
    documents: np.ndarray
    lengths: np.ndarray


Message = tuple[PackedSequence, list[Lengths]] | Exception | None
"""From a worker: a sequence with the lengths computed for it; the error met in reading it; or None at the data's end.
"""


class Loader:
    """One rank's batches.

    Attributes:
        stream: positioned just after the last sequence that was taken.
    """

    def __init__(self, stream: SequenceStream, workers: int, ahead: int, pin: bool = False) -> None:
        """Processes start with the first call of `take` or `ended`.

        Args:
            stream: the position to start from.
            workers: processes; 0 reads sequences in this process, on demand. The largest divisor of the rank's number
                of streams that is not above `workers` is used.
            ahead: sequences that all workers together read in advance.
            pin: allocate batches in pinned memory, from which copies to a GPU are asynchronous.
        """
        own = stream.streams // stream.ranks
        self.stream, self.pin = stream, pin
        self.workers = max((count for count in range(1, min(workers, own) + 1) if own % count == 0), default=0)
        self._ahead = max(2, -(-ahead // max(1, self.workers)))
        self._started: list[_Worker] = []
        self._messages: Iterator[Message] | None = None
        self._received: deque[tuple[PackedSequence, list[Lengths]]] = deque()
        self._at_end = False

    def take(self, n: int) -> Batch:
        """The rank's next n sequences as one batch.

        Raises:
            UserError: a source ends before them, or cannot be read.
            Failure: a worker has died.
        """
        if self.ended(n):
            raise UserError(
                "the data ends before the run does: a source has no more documents; "
                "set data.exhausted=repeat, or a shorter run"
            )
        sequences = []
        for _ in range(n):
            sequence, lengths = self._received.popleft()
            self._keep_lengths(lengths)
            pieces = self.stream.advance(1)[0]
            assert sequence.pieces == pieces, "a worker made another sequence than the stream has here"
            sequences.append(sequence)
        return collate(sequences, self.stream.sequence_length(self.stream.k), self.pin)

    def ended(self, n: int) -> bool:
        """Whether fewer than n sequences are left; never where sources are repeated (data.exhausted=repeat)."""
        if self._messages is None:
            self._messages = self._start()
        while len(self._received) < n and not self._at_end:
            message = next(self._messages)
            if isinstance(message, Exception):
                raise message
            if message is None:
                self._at_end = True
            else:
                self._received.append(message)
        return len(self._received) < n

    def state_dict(self) -> dict[str, Tensor]:
        """SequenceStream.state_dict after the last sequence that was taken."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """SequenceStream.load_state_dict; sequences that workers have read ahead are dropped."""
        self.close()
        self.stream.load_state_dict(state)

    def jump(self, position: int) -> None:
        """SequenceStream.jump; sequences that were read ahead are dropped, because their phase may change."""
        self.close()
        self.stream.jump(position)

    def close(self) -> None:
        """End the workers."""
        for worker in self._started:
            worker.close()
        self._started.clear()
        self._messages = None
        self._received.clear()
        self._at_end = False

    def _start(self) -> Iterator[Message]:
        if not self.workers:
            return _read_sequences(self.stream.fork(), 0, 1)
        for part in range(self.workers):
            self._started.append(_Worker(self.stream, part, self.workers, self._ahead, self._started))
        return self._round_robin()

    def _round_robin(self) -> Iterator[Message]:
        while True:
            for worker in self._started:
                yield worker.receive()

    def _keep_lengths(self, lengths: list[Lengths]) -> None:
        """Hand lengths to the sources that tokenise on demand, so that the second packing tokenises nothing."""
        for source, documents, values in lengths:
            keep_lengths = getattr(self.stream.order.sources[source], "keep_lengths", None)
            if keep_lengths is not None:
                keep_lengths(documents, values)


def _read_sequences(stream: SequenceStream, part: int, parts: int) -> Iterator[Message]:
    """Every `parts`-th sequence of the rank, from number `part` on; then None forever."""
    lengths: list[Lengths] = []
    stream.order.on_lengths = lambda *values: lengths.append(Lengths(*values))
    k = stream.next_own(stream.k) + part * stream.ranks
    while True:
        try:
            yield stream.row(k), list(lengths)
        except OutOfDocuments:
            yield None
        except (UserError, OSError) as error:
            yield error
        lengths.clear()
        k += parts * stream.ranks


class _Worker:
    """A process that reads sequences and sends them, a bounded number ahead of the receiver."""

    def __init__(self, stream: SequenceStream, part: int, parts: int, ahead: int, others: "list[_Worker]") -> None:
        self.pipe, sender = CONTEXT.Pipe(duplex=False)
        inherited = [worker.pipe for worker in [*others, self]] if FORKS else []
        arguments = (sender, inherited, stream, part, parts, ahead)
        self.process = start_worker(_run_worker, arguments, blocked=[signal.SIGINT, signal.SIGTERM])
        sender.close()
        # At its exit Python sends SIGTERM to daemon processes, which workers block.
        Finalize(self, self.process.kill, exitpriority=1)

    def receive(self) -> Message:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            reason = exit_reason(self.process)
            raise Failure(
                f"a process that prepares data {reason}, perhaps for want of memory; data.workers=0 does without them"
            ) from None

    def close(self) -> None:
        self.process.kill()  # it holds nothing that could be lost
        self.process.join()
        self.pipe.close()


def _run_worker(
    pipe: Connection, inherited: list[Connection], stream: SequenceStream, part: int, parts: int, ahead: int
) -> None:
    """The main function of a worker process, which runs until it is killed."""
    for end in inherited:
        end.close()  # otherwise a dead worker's pipe stays open in the others, and its death is not noticed
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    torch.set_num_threads(1)
    messages: queue.Queue[Message] = queue.Queue(ahead)
    threading.Thread(target=_send, args=(pipe, messages), daemon=True).start()
    for message in _read_sequences(stream, part, parts):
        messages.put(message)


def _send(pipe: Connection, messages: "queue.Queue[Message]") -> None:
    try:
        while True:
            pipe.send(messages.get())
    except OSError:  # the training process has ended
        os._exit(1)
