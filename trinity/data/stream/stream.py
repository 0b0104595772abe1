"""The sequences of a run, in an order that no machine has a say in.

The data is a function of (seed, data config, k): the k-th sequence of the run comes from logical stream k mod V, and a
stream's sequences follow from its own state alone. Stream s belongs to rank s mod R; V is a multiple of R, so rank r
owns the sequences k with k mod R = r, and any number of ranks that divides V sees the same global batches.

What is saved is one small vector a stream, under the stream's own key, so that ranks can be redealt.

A run that went back after a loss spike goes on behind the sequences that it read until then (`jump`). From there on
sequence k stands at another position of the plan: its steps, lengths and phases count what was not jumped over.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from trinity.data.stream.batch_schedule import BatchPlan
from trinity.data.stream.collate import Batch, PackedSequence, collate, read_pieces
from trinity.data.stream.mixture import Phase
from trinity.data.stream.packing import LogicalStream, Piece
from trinity.data.stream.shuffle import DocumentOrder, Source
from trinity.errors import UserError
from trinity_kernels.cross_entropy import IGNORE


class SequenceStream:
    """One rank's sequences, in the order of k, without end.

    Attributes:
        k: the rank's next sequence is the one it owns among k … k + R − 1; equal on ranks that have taken equally many.
        plan: which sequences make which step.
        sources: name → documents.
        order: of their documents.
        jumped: [begin, end) in k of what the run went back over and does not read again.
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
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Stand before the first sequence.

        Args:
            sources: name → documents, all of one tokenizer.
            phases: how each phase of the plan is drawn and packed.
            streams: V, a multiple of any number of ranks that the run may ever use.
            seed: of the order of documents.
            bos_id: id that every document begins with.
            plan: which sequences make which step, how long they are, and of which phase.
            loss_on_document_start: whether BOS is the target of a document's last token, or nothing.
            repeat: whether a source begins anew, in another order, when all its documents are taken.
            rank, ranks: r and R.
        Raises:
            UserError: streams that do not divide by ranks, or several tokenizers.
        """
        if streams < 1 or streams % ranks:
            allowed = [count for count in range(1, streams + 1) if streams % count == 0]
            raise UserError(f"data.streams={streams} does not divide by {ranks} data ranks; use a number of {allowed}")
        _check_tokenizers(sources, bos_id)
        self.sources, self.phases, self.plan = dict(sources), list(phases), plan
        self.streams, self.rank, self.ranks = streams, rank, ranks
        self.k = 0
        self.jumped: list[tuple[int, int]] = []
        self._after_document = bos_id if loss_on_document_start else IGNORE
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
        """Sequence k of the run; its stream must stand before it, and stands behind it then.

        Raises:
            OutOfDocuments: there is none, because a source has ended.
        """
        return read_pieces(self._pack(k), self.sources, self._after_document)

    def take(self, n: int) -> Batch:
        """This rank's next n sequences, as one batch; all must be of one length."""
        rows = [next(self) for _ in range(n)]
        return collate(rows, self.sequence_length(self.k))

    def sequence_length(self, k: int) -> int:
        """Tokens of sequence k."""
        return self.plan.at_sequence(self._position(k)).sequence_length

    def jump(self, position: int) -> None:
        """Go on from here as the sequence at an earlier position of the plan; what lies between is not read again."""
        begin = self._k_of(position)
        assert begin <= self.k
        self.jumped.append((begin, self.k))

    def pass_over(self, n: int) -> list[list[Piece]]:
        """Go on by n sequences of this rank without reading a token; what they are made of."""
        passed = []
        for _ in range(n):
            passed.append(self._pack(self.next_own(self.k)))
            self.k += self.ranks
        return passed

    def first_of(self, step: int) -> int:
        """The first sequence of a step of the plan, behind all that was jumped over."""
        return self._k_of(self.plan.at(step).first)

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of a step, wherever the stream stands; the stream stays there."""
        first = self.first_of(step)
        end = first + self.plan.at(step).sequences
        position = self.state()
        try:
            self.seek(first)
            return self.take(len(range(self.next_own(first), end, self.ranks)))
        finally:
            self.restore(position)

    def seek(self, k: int) -> None:
        """Go to before sequence k of the run, by replay from here, or from the start where that lies behind.

        No token is read: a sequence costs some microseconds a document.
        """
        assert k >= 0
        if k < self.k:
            self.k, self._own = 0, self._fresh()
        for at in range(self.next_own(self.k), k, self.ranks):
            self._pack(at)
        self.k = k

    def fork(self) -> "SequenceStream":
        """Another stream that stands where this one does, over the same sources."""
        other = copy(self)
        other.jumped, other.order = list(self.jumped), copy(self.order)
        other._own = other._fresh()
        other.restore(self.state())
        return other

    def state(self) -> tuple[int, dict[int, list[int]]]:
        """Where the stream stands: k, and the state of each of its logical streams (see LogicalStream.state)."""
        return self.k, {number: stream.state() for number, stream in self._own.items()}

    def restore(self, state: tuple[int, dict[int, list[int]]]) -> None:
        """Stand where the stream stood when state() was called."""
        self.k, states = state
        for number, values in states.items():
            self._own[number].restore(values)

    def tokens_read(self) -> np.ndarray:
        """[sources] int64: tokens read of each source by this rank since the run began."""
        return np.array([stream.read for stream in self._own.values()], np.int64).sum(axis=0)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands, after the last sequence that was taken.

        Returns:
            "k" int64 scalar; "stream.00017" int64 [see LogicalStream.state] for each stream of this rank, whose length
            changes with what is open; "jumped" int64 [1 + ranges, 2], zeros first; "source.NAME" uint8 [16], the hash
            of each source's content.
        """
        state = {_key(number): torch.tensor(stream.state()) for number, stream in self._own.items()}
        state |= {f"source.{name}": _fingerprint(source) for name, source in self.sources.items()}
        return {"k": torch.tensor(self.k), "jumped": torch.tensor([(0, 0), *self.jumped]), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go where a stream stood when its state was saved, by this or any other number of ranks.

        Args:
            state: holds at least "k", the streams of this rank, and the hashes of the sources.
        Raises:
            UserError: a stream of this rank or a source that was read is missing, or a source's content has changed.
        """
        for name, source in self.sources.items():
            then, now = state.get(f"source.{name}"), _fingerprint(source)
            if then is not None and not torch.equal(then, now):
                raise UserError(
                    f"data.train.{name} has changed since this run read it: its content's hash was "
                    f"{_hexadecimal(then)} and is {_hexadecimal(now)}; give back what it was, or start another run"
                )
        for name in ("k", "jumped"):
            if name not in state:
                raise UserError(f"the saved data state has no {name}; use another checkpoint")
        vectors = {number: state.get(_key(number)) for number in self._own}
        for number, vector in vectors.items():
            if vector is None:
                raise UserError(f"the saved data state has no stream {number}; set data.streams as it was then")
        for number, vector in vectors.items():
            self._own[number].restore(vector.tolist())
        self.k = int(state["k"])
        self.jumped = [(begin, end) for begin, end in state["jumped"].tolist() if end]

    def _pack(self, k: int) -> list[Piece]:
        plan = self.plan.at_sequence(self._position(k))
        return self._own[k % self.streams].pack(plan.sequence_length, self.phases[plan.phase], plan.phase)

    def _position(self, k: int) -> int:
        """Where sequence k stands in the plan."""
        return position_of(k, self.jumped)

    def _k_of(self, position: int) -> int:
        """The sequence that stands at a position of the plan, after all that was jumped over."""
        k, counted = position, 0
        for begin, end in sorted(self.jumped):
            if k >= begin:
                k += max(0, end - max(begin, counted))
                counted = max(counted, end)
        return k

    def next_own(self, k: int) -> int:
        """The first sequence from k on that this rank owns."""
        return k + (self.rank - k) % self.ranks

    def _fresh(self) -> dict[int, LogicalStream]:
        return {number: LogicalStream(self.order, number) for number in range(self.rank, self.streams, self.ranks)}


def position_of(k: int, jumped: Sequence[tuple[int, int]]) -> int:
    """Where sequence k stands in the plan: k less what was jumped over before it, and known then.

    Args:
        jumped: [begin, end) in k, in the order in which the run went back.
    """
    position, counted = k, 0
    for begin, end in sorted(jumped):  # a later way back may begin before an earlier one, and hold it
        if end <= k:
            position -= max(0, end - max(begin, counted))
            counted = max(counted, end)
    return position


def _key(stream: int) -> str:
    return f"stream.{stream:05d}"


def _fingerprint(source: Source) -> Tensor:
    return torch.tensor(list(bytes.fromhex(source.fingerprint)), dtype=torch.uint8)


def _hexadecimal(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()


def _check_tokenizers(sources: Mapping[str, Source], bos_id: int) -> None:
    first = next(iter(sources), None)
    for name, source in sources.items():
        if source.tokenizer_fingerprint != sources[first].tokenizer_fingerprint:
            raise UserError(f"data.train.{name} was made with another tokenizer than {first}; prepare both with one")
        if source.bos_id != bos_id:
            raise UserError(
                f"data.train.{name} begins documents with id {source.bos_id}, not {bos_id}; prepare it anew"
            )
