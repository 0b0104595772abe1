"""The sequences of a run, in an order independent of the number of ranks.

The data is a function of (seed, data config, k): the k-th sequence of the run comes from logical stream k mod V, and a
stream's sequences follow from its own state alone. Stream s belongs to rank s mod R; V is a multiple of R, so rank r
owns the sequences k with k mod R = r, and any number of ranks that divides V reads the same global batches.

A checkpoint holds one small vector for each logical stream, under the stream's own key, so that a resume may distribute
the streams over another number of ranks.

A run that rolls back after a loss spike continues after the sequences that it had read (`jump`). From there on, the
position of sequence k in the plan is k less the sequences that were skipped: steps, lengths and phases count positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from trinity.data.sources.source import Source
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.data.stream.collate import Batch, PackedSequence, collate, pad, read_pieces, weigh_examples
from trinity.data.stream.mixture import Phase
from trinity.data.stream.packing import LogicalStream, Piece
from trinity.data.stream.shuffle import DocumentOrder
from trinity.errors import UserError
from trinity_kernels.cross_entropy import IGNORE


class SequenceStream:
    """One rank's sequences, in the order of k, without end.

    Attributes:
        k: the rank's next sequence is the one it owns among k … k + R − 1; equal on ranks that have taken equally many.
        plan: which sequences make which step.
        sources: name → documents.
        order: of their documents.
        jumped: [begin, end) in k: sequences read before a rollback, which are not read again.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Sequence[Phase],
        *,
        streams: int,
        seed: int,
        bos_id: int,
        plan: BatchPlan,
        loss_on_document_start: bool = True,
        repeat: bool = True,
        masked: bool = False,
        weigh_examples: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Start before the first sequence.

        Args:
            sources: name → documents, all of one tokenizer.
            phases: how the documents of each phase of the plan are drawn and packed.
            streams: V, a multiple of every number of ranks that the run may use.
            seed: of the order of documents.
            bos_id: id that every document begins with.
            plan: which sequences make which step, their length and their phase.
            loss_on_document_start: BOS is the target of a document's last token; otherwise, and with best-fit packing
                or masks, it has no target.
            repeat: start the next epoch, in another order, when all documents of a source are taken.
            masked: only tokens that the sources' masks mark are targets.
            weigh_examples: give each target the weight 1/(targets of its example); with best-fit packing only.
            rank, ranks: r and R.
        Raises:
            UserError: V does not divide by R, or the sources are of several tokenizers.
        """
        if streams < 1 or streams % ranks:
            allowed = [count for count in range(1, streams + 1) if streams % count == 0]
            raise UserError(f"data.streams={streams} does not divide by {ranks} data ranks; use a number of {allowed}")
        _check_tokenizers(sources, bos_id)
        self.sources, self.phases, self.plan = dict(sources), list(phases), plan
        self.streams, self.rank, self.ranks = streams, rank, ranks
        self.k = 0
        self.jumped: list[tuple[int, int]] = []
        self._bos_id, self._masked, self._weigh_examples = bos_id, masked, weigh_examples
        self._after_document = bos_id if loss_on_document_start and not masked else IGNORE
        self.order = DocumentOrder(sources, seed, streams, repeat)
        self._own = self._fresh()

    def __iter__(self) -> Iterator[PackedSequence]:
        return self

    def __next__(self) -> PackedSequence:
        """This rank's next sequence."""
        row = self.row(self.next_own(self.k))
        self.k += self.ranks
        return row

    def row(self, k: int) -> PackedSequence:
        """Return sequence k of the run; its logical stream must be just before it, and moves to just after it.

        Raises:
            OutOfDocuments: a source has ended before it.
        """
        plan, pieces = self.plan.at_sequence(self._position(k)), self._pack(k)
        if not self.phases[plan.phase].best_fit_rows:
            return read_pieces(pieces, self.sources, self._after_document, self._masked)
        sequence = read_pieces(pieces, self.sources, IGNORE, self._masked)
        if self._weigh_examples:
            sequence = weigh_examples(sequence)
        return pad(sequence, plan.sequence_length, self._bos_id)

    def take(self, n: int) -> Batch:
        """This rank's next n sequences, as one batch; all must be of one length."""
        rows = [next(self) for _ in range(n)]
        return collate(rows, self.sequence_length(self.k))

    def sequence_length(self, k: int) -> int:
        """Tokens of sequence k."""
        return self.plan.at_sequence(self._position(k)).sequence_length

    def jump(self, position: int) -> None:
        """Give the next sequence an earlier position of the plan; the sequences read since then are not read again."""
        begin = self._k_of(position)
        assert begin <= self.k
        self.jumped.append((begin, self.k))

    def advance(self, n: int) -> list[list[Piece]]:
        """Pack the next n sequences of this rank without reading their tokens; returns the pieces of each."""
        pieces = []
        for _ in range(n):
            pieces.append(self._pack(self.next_own(self.k)))
            self.k += self.ranks
        return pieces

    def first_of(self, step: int) -> int:
        """The first sequence of a step of the plan, after all sequences that were skipped."""
        return self._k_of(self.plan.at(step).first)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of any step; the stream stays where it is."""
        first = self.first_of(step)
        end = first + self.plan.at(step).sequences
        position = self.state()
        try:
            self.seek(first)
            return self.take(len(range(self.next_own(first), end, self.ranks)))
        finally:
            self.restore(position)

    def seek(self, k: int) -> None:
        """Go to just before sequence k of the run, by replay from here, or from the start if k is earlier.

        No token is read: replay takes some microseconds a document.
        """
        assert k >= 0
        if k < self.k:
            self.k, self._own = 0, self._fresh()
        for at in range(self.next_own(self.k), k, self.ranks):
            self._pack(at)
        self.k = k

    def fork(self) -> "SequenceStream":
        """A copy of this stream, which moves independently, over the same sources."""
        other = copy(self)
        other.jumped, other.order = list(self.jumped), copy(self.order)
        other._own = other._fresh()
        other.restore(self.state())
        return other

    def state(self) -> tuple[int, dict[int, list[int]]]:
        """The stream's position: k, and the state of each of its logical streams (see LogicalStream.state)."""
        return self.k, {number: stream.state() for number, stream in self._own.items()}

    def restore(self, state: tuple[int, dict[int, list[int]]]) -> None:
        """Go back to where the stream was when state() was called."""
        k, states = state
        for number, values in states.items():
            self._own[number].restore(values)
        self.k = k

    def tokens_read(self) -> np.ndarray:
        """[sources] int64: tokens that this rank has read of each source since the run began."""
        return np.array([stream.tokens_read for stream in self._own.values()], np.int64).sum(axis=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The stream's position after the last sequence that was taken.

        Returns:
            "k" int64 scalar; "stream.00017" int64 [see LogicalStream.state] for each stream of this rank, whose length
            changes with the number of open documents; "jumped" int64 [1 + ranges, 2], zeros first; "source.NAME" uint8
            [16], the hash of each source's content.
        """
        state = {_key(number): torch.tensor(stream.state()) for number, stream in self._own.items()}
        state |= {f"source.{name}": _fingerprint(source) for name, source in self.sources.items()}
        return {"k": torch.tensor(self.k), "jumped": torch.tensor([(0, 0), *self.jumped]), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go to a saved position, saved by this or any other number of ranks.

        Args:
            state: holds at least "k", "jumped", the streams of this rank, and the hashes of the sources.
        Raises:
            UserError: a stream of this rank or a source that was read is missing, or a source's content has changed.
        """
        for name, source in self.sources.items():
            saved, now = state.get(f"source.{name}"), _fingerprint(source)
            if saved is not None and not torch.equal(saved, now):
                raise UserError(
                    f"data.train.{name} has changed since this run read it: its content's hash was "
                    f"{_hexadecimal(saved)} and is {_hexadecimal(now)}; give back what it was, or start another run"
                )
        for name in ("k", "jumped"):
            if name not in state:
                raise UserError(f"the saved data state has no {name}; use another checkpoint")
        for number in self._own:
            if _key(number) not in state:
                raise UserError(f"the saved data state has no stream {number}; set data.streams as it was then")
        self.restore((int(state["k"]), {number: state[_key(number)].tolist() for number in self._own}))
        self.jumped = [(begin, end) for begin, end in state["jumped"].tolist() if end]

    def _pack(self, k: int) -> list[Piece]:
        plan = self.plan.at_sequence(self._position(k))
        return self._own[k % self.streams].pack(plan.sequence_length, self.phases[plan.phase], plan.phase)

    def _position(self, k: int) -> int:
        """The position of sequence k in the plan."""
        return position_of(k, self.jumped)

    def _k_of(self, position: int) -> int:
        """The sequence at a position of the plan, after all sequences that were skipped."""
        k, skipped_until = position, 0
        for begin, end in sorted(self.jumped):
            if k >= begin:
                k += max(0, end - max(begin, skipped_until))
                skipped_until = max(skipped_until, end)
        return k

    def next_own(self, k: int) -> int:
        """The first sequence from k on that this rank owns."""
        return k + (self.rank - k) % self.ranks

    def _fresh(self) -> dict[int, LogicalStream]:
        return {number: LogicalStream(self.order, number) for number in range(self.rank, self.streams, self.ranks)}


def position_of(k: int, jumped: Sequence[tuple[int, int]]) -> int:
    """The position of sequence k in the plan: k less the sequences that were skipped before it.

    Args:
        jumped: [begin, end) in k, in the order of the rollbacks.
    """
    position, skipped_until = k, 0
    for begin, end in sorted(jumped):  # a later rollback may reach further back than an earlier one, and contain it
        if end <= k:
            position -= max(0, end - max(begin, skipped_until))
            skipped_until = max(skipped_until, end)
    return position


def _key(stream: int) -> str:
    return f"stream.{stream:05d}"


def _fingerprint(source: Source) -> Tensor:
    return torch.tensor(list(bytes.fromhex(source.fingerprint)), dtype=torch.uint8)


def _hexadecimal(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()


def _check_tokenizers(sources: Mapping[str, Source], bos_id: int) -> None:
    for name, source in sources.items():
        first, other = next(iter(sources.items()))
        if source.tokenizer_fingerprint != other.tokenizer_fingerprint:
            raise UserError(f"data.train.{name} was made with another tokenizer than {first}; prepare both with one")
        if source.bos_id != bos_id:
            raise UserError(
                f"data.train.{name} begins documents with id {source.bos_id}, not {bos_id}; prepare it again"
            )
