"""The sequences of a run, in an order that no machine has a say in.

The data is a function of (seed, data config, k): the k-th sequence of the run comes from logical stream k mod V, and a
stream's sequences follow from its own state alone. Stream s belongs to rank s mod R; V is a multiple of R, so rank r
owns the sequences k with k mod R = r, and any number of ranks that divides V sees the same global batches.

What is saved is one small vector a stream, under the stream's own key, so that ranks can be redealt.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trinity.data.batches import BatchPlan
from trinity.data.mixture import DocumentOrder
from trinity.data.packing import Piece, SequentialPacker
from trinity.data.sequences import IGNORE, Sequence, SequenceBatch, materialise, stack
from trinity.data.shards import TokenSource
from trinity.errors import UserError


class SequenceStream:
    """One rank's sequences, in the order of k, without end.

    Attributes:
        k: the rank's next sequence is the one it owns among k … k + R − 1; equal on ranks that have taken equally many.
        plan: which sequences make which step.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        mixture: Mapping[str, float],
        *,
        sequence_length: int,
        streams: int,
        seed: int,
        bos_id: int,
        plan: BatchPlan,
        loss_on_document_start: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Stand before the first sequence.

        Args:
            sources: name → documents, all of one tokenizer.
            mixture: name → weight by tokens, one for each source.
            sequence_length: S, tokens of a sequence.
            streams: V, a multiple of any number of ranks that the run may ever use.
            seed: of the order of documents.
            bos_id: id that every document begins with.
            plan: which sequences make which step.
            loss_on_document_start: whether BOS is the target of a document's last token, or nothing.
            rank, ranks: r and R.
        Raises:
            UserError: a length below 1, streams that do not divide by ranks, several tokenizers, an unfitting mixture.
        """
        if sequence_length < 1:
            raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
        if streams < 1 or streams % ranks:
            allowed = [count for count in range(1, streams + 1) if streams % count == 0]
            raise UserError(f"data.streams={streams} does not divide by {ranks} data ranks; use a number of {allowed}")
        _check_tokenizers(sources, bos_id)
        self.sources, self.plan = dict(sources), plan
        self.sequence_length, self.streams, self.rank, self.ranks = sequence_length, streams, rank, ranks
        self.k = 0
        self._after_document = bos_id if loss_on_document_start else IGNORE
        self._order = DocumentOrder(sources, mixture, seed, streams)
        self._packers = self._fresh_packers()

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        """This rank's next sequence."""
        return materialise(self._next_pieces(), self.sources, self._after_document)

    def take(self, n: int) -> SequenceBatch:
        """This rank's next n sequences, as one batch."""
        return stack([next(self) for _ in range(n)], self.sequence_length)

    def batch(self, step: int) -> SequenceBatch:
        """This rank's part of the global batch of a step, wherever the stream stands; the stream stays there."""
        first, sequences = self.plan.at(step)
        here = self.k, {stream: packer.state() for stream, packer in self._packers.items()}
        try:
            self.seek(first)
            count = len(range(first + self._until_own(first), first + sequences, self.ranks))
            return self.take(count)
        finally:
            self.k = here[0]
            for stream, state in here[1].items():
                self._packers[stream].restore(state)

    def seek(self, k: int) -> None:
        """Go to before sequence k of the run, by replay from here, or from the start where that lies behind.

        No token is read: a sequence costs some microseconds.
        """
        assert k >= 0
        if k < self.k:
            self.k, self._packers = 0, self._fresh_packers()
        for stream, packer in self._packers.items():
            for _ in range(self._dealt(stream, k) - self._dealt(stream, self.k)):
                packer.pack(self.sequence_length)
        self.k = k

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands, after the last sequence that was taken.

        Returns:
            "k" int64 scalar, and "stream.00017" int64 [2·sources + 3] for each stream of this rank
            (see SequentialPacker.state). Keys and shapes never change, so a new stream's dict can be loaded into.
        """
        vectors = {_key(stream): torch.tensor(packer.state()) for stream, packer in self._packers.items()}
        return {"k": torch.tensor(self.k), **vectors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go where a stream stood when its state was saved, by this or any other number of ranks.

        Args:
            state: holds at least "k" and the streams of this rank.
        Raises:
            UserError: a stream of this rank is missing, or was saved with another number of sources.
        """
        for stream, packer in self._packers.items():
            vector, known = state.get(_key(stream)), len(packer.state())
            if vector is None:
                raise UserError(f"the saved data state has no stream {stream}; set data.streams as it was then")
            if vector.shape != (known,):
                raise UserError("the saved data state is of another number of sources; set data.train as it was then")
        for stream, packer in self._packers.items():
            packer.restore(state[_key(stream)].tolist())
        self.k = int(state["k"])

    def _next_pieces(self) -> list[Piece]:
        own = self.k + self._until_own(self.k)
        self.k += self.ranks
        return self._packers[own % self.streams].pack(self.sequence_length)

    def _until_own(self, k: int) -> int:
        """How far the first sequence from k on lies that this rank owns."""
        return (self.rank - k) % self.ranks

    def _dealt(self, stream: int, k: int) -> int:
        """Sequences below k that come from a stream: those k' with k' mod V = stream."""
        return (k - stream + self.streams - 1) // self.streams

    def _fresh_packers(self) -> dict[int, SequentialPacker]:
        return {stream: SequentialPacker(self._order, stream) for stream in range(self.rank, self.streams, self.ranks)}


def _key(stream: int) -> str:
    return f"stream.{stream:05d}"


def _check_tokenizers(sources: Mapping[str, TokenSource], bos_id: int) -> None:
    first = next(iter(sources), None)
    for name, source in sources.items():
        if source.tokenizer_fingerprint != sources[first].tokenizer_fingerprint:
            raise UserError(f"data.train.{name} was made with another tokenizer than {first}; prepare both with one")
        if source.bos_id != bos_id:
            raise UserError(
                f"data.train.{name} begins documents with id {source.bos_id}, not {bos_id}; prepare it anew"
            )
