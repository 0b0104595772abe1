"""Both ways of packing: every token once an epoch and in order, on any number of ranks and after any stops."""

from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.data import BatchPlan, SequenceStream
from trinity.data.stream.mixture import LengthBias, Phase
from trinity.data.stream.packing import LogicalStream, OutOfDocuments
from trinity.data.stream.shuffle import permutation_keys, permute, random_bits, random_key

V, SEED = 48, 11


class ListedLengths:
    """Documents of given lengths, without tokens."""

    def __init__(self, lengths: list[int], lookahead: int = 8) -> None:
        self._lengths = np.array(lengths, np.int64)
        self.documents, self.lookahead = len(lengths), lookahead
        self.vocab_size, self.bos_id, self.tokenizer_fingerprint, self.fingerprint = 100, 0, "none", "00" * 16

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[documents]

    def length(self, document: int) -> int:
        return int(self._lengths[document])

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length)


def make_stream(
    lengths: list[int], length: int, phase: Phase, rank: int = 0, ranks: int = 1, **arguments: object
) -> SequenceStream:
    values = {"streams": V, "seed": SEED, "bos_id": 0, "plan": BatchPlan(V, [], length), **arguments}
    return SequenceStream({"all": ListedLengths(lengths)}, [phase], rank=rank, ranks=ranks, **values)


PHASES = [Phase((1.0,)), Phase((1.0,), rsdb_size=1), Phase((1.0,), rsdb_size=3)]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=200)


def rows_to_the_end(stream: SequenceStream) -> dict[int, list]:
    """k → pieces of every row until each of the rank's streams has ended."""
    rows, ended, k = {}, set(), stream.next_own(0)
    own = len(range(stream.rank, stream.streams, stream.ranks))
    while len(ended) < own:
        if k % V not in ended:
            try:
                rows[k] = stream.row(k).pieces
            except OutOfDocuments:
                ended.add(k % V)
        k += stream.ranks
    return rows


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lengths=LENGTHS, length=st.integers(1, 50), phase=st.sampled_from(PHASES))
def test_every_token_once_an_epoch_and_in_order(lengths: list[int], length: int, phase: Phase) -> None:
    """Except the last, unfilled row of each stream: less than a row is left in each."""
    rows = rows_to_the_end(make_stream(lengths, length, phase, repeat=False))
    heads: Counter[int] = Counter()
    seen_in: dict[int, set[int]] = {}
    for k in sorted(rows):
        assert sum(piece.length for piece in rows[k]) == length
        for piece in rows[k]:
            assert piece.start == heads[piece.document]
            heads[piece.document] += piece.length
            seen_in.setdefault(piece.document, set()).add(k % V)
    assert all(heads[document] <= size for document, size in enumerate(lengths))
    assert all(len(streams) == 1 for streams in seen_in.values())
    remaining = Counter()
    order = permute(np.arange(len(lengths)), len(lengths), permutation_keys(SEED, "all", 0))
    for j, document in enumerate(order.tolist()):
        remaining[j % V] += lengths[document] - heads[document]
    assert all(count < length for count in remaining.values())


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    lengths=LENGTHS, length=st.integers(1, 50), phase=st.sampled_from(PHASES),
    before=st.sampled_from([1, 2, 3, 4, 8]), after=st.sampled_from([1, 2, 3, 4, 8]), steps=st.integers(0, 6),
)  # fmt: skip
def test_killed_and_resumed_on_another_number_of_ranks(
    lengths: list[int], length: int, phase: Phase, before: int, after: int, steps: int
) -> None:
    """A step is 48 sequences; the state is what the ranks had after some steps, in any of their packers."""
    undisturbed = make_stream(lengths, length, phase).advance(V * (steps + 4))
    state: dict = {}
    for rank in range(before):
        stream = make_stream(lengths, length, phase, rank, before)
        passed = stream.advance(V * steps // before)
        assert passed == undisturbed[rank : V * steps : before]
        state |= stream.state_dict()
        stream.advance(5)
    for rank in range(after):
        stream = make_stream(lengths, length, phase, rank, after)
        stream.advance(3)
        stream.load_state_dict(state)
        assert stream.advance(V * 4 // after) == undisturbed[V * steps + rank :: after]


def rsdb(lengths: list[int], stream: int, size: int, length: int, rows: int) -> list[list[tuple[int, int, int]]]:
    """The report's algorithm on lists of tokens (document, position): buffers of whole documents, each with a head."""
    n, taken, draws = len(lengths), 0, 0
    buffer: list[dict] = []

    def next_document() -> int:
        nonlocal taken
        epoch, j = divmod(stream + V * taken, n)
        taken += 1
        return int(permute(np.array([j]), n, permutation_keys(SEED, "all", epoch))[0])

    packed = []
    for _ in range(rows):
        tokens: list[tuple[int, int]] = []
        while len(tokens) < length:
            if len(buffer) <= size:  # shrunk to the user's size: refilled, in bulk, to twice that
                while len(buffer) < 2 * size:
                    document = next_document()
                    buffer.append({"tokens": [(document, place) for place in range(lengths[document])], "head": 0})
            draws += 1
            bits = int(random_bits(random_key(SEED, stream, "rsdb"), np.array([draws - 1]))[0])
            picked = bits * len(buffer) // 2**64
            read = buffer[picked]["tokens"][buffer[picked]["head"] :][: length - len(tokens)]
            tokens += read
            buffer[picked]["head"] += len(read)
            if buffer[picked]["head"] == len(buffer[picked]["tokens"]):  # purged; the last one takes its place
                buffer[picked] = buffer[-1]
                del buffer[-1]
        packed.append(tokens)
    return packed


@settings(deadline=None, derandomize=True, max_examples=20)
@given(lengths=LENGTHS, length=st.integers(1, 50), size=st.integers(1, 9), number=st.integers(0, V - 1))
def test_rsdb_against_a_transcription_of_the_report(lengths: list[int], length: int, size: int, number: int) -> None:
    phase = Phase((1.0,), rsdb_size=size)
    packed = make_stream(lengths, length, phase).advance(12 * V)[number::V]
    as_tokens = [[(p.document, p.start + at) for p in pieces for at in range(p.length)] for pieces in packed]
    assert as_tokens == rsdb(lengths, number, size, length, 12)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(lengths=LENGTHS, size=st.integers(1, 9), stops=st.lists(st.integers(0, 15), max_size=4))
def test_the_buffer_is_bounded_and_its_state_is_restored(lengths: list[int], size: int, stops: list[int]) -> None:
    phase, stream = Phase((1.0,), rsdb_size=size), make_stream(lengths, 7, Phase((1.0,)))
    one, other = (LogicalStream(stream.order, 5) for _ in range(2))
    for row in range(16):
        if row in stops:
            state = one.state()
            other.restore(state)
            assert other.state() == state
            other, one = one, other
        one.pack(7, phase, 0)
        assert 0 <= len(one.open) <= 2 * size
        assert all(0 <= document[2] < document[3] for document in one.open)


def test_long_documents_come_more_often() -> None:
    """Of 20,000 documents of each length, the share that is taken is within 5σ = 0.018 of its probability."""
    bias = LengthBias(100, 0.1, 0.9)
    sizes = [1, 50, 100, 400]
    lengths = sizes * 20_000
    stream = make_stream(lengths, 1000, Phase((1.0,), bias=bias), repeat=False)
    rows = rows_to_the_end(stream)
    taken = Counter(lengths[document] for document in {piece.document for row in rows.values() for piece in row})
    for size, chance in zip(sizes, (0.108, 0.5, 0.9, 0.9)):
        assert taken[size] / 20_000 == pytest.approx(chance, abs=0.018)


@pytest.mark.parametrize("bias", [None, LengthBias(30, 0.1, 0.9)])
def test_tokens_read_are_the_packed_ones(bias: LengthBias | None) -> None:
    """On any number of ranks, and after a stop: not those of opened documents, nor of documents left out."""
    lengths = list(range(1, 401))
    phase = Phase((1.0,), rsdb_size=20, bias=bias)
    alone = make_stream(lengths, 16, phase)
    for turn in range(1, 4):
        alone.advance(2 * V)
        assert alone.tokens_read().tolist() == [turn * 2 * V * 16]
    ranks = [make_stream(lengths, 16, phase, rank, 3) for rank in range(3)]
    for stream in ranks:
        stream.load_state_dict(alone.state_dict())
        stream.advance(V // 3)
    assert sum(stream.tokens_read() for stream in ranks).tolist() == [7 * V * 16]


def test_a_length_bias_draws_again_every_epoch() -> None:
    stream = make_stream([5] * 960, 5, Phase((1.0,), bias=LengthBias(10, 0.2, 0.2)))
    rows = stream.advance(10 * V)
    drawn = [piece.document for row in rows for piece in row]
    assert len(drawn) == 480
    assert len(set(drawn)) > 300  # the same fifth each time would be 192


@pytest.mark.parametrize("phase", PHASES, ids=["sequential", "rsdb 1", "rsdb 3"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_worker_packs_every_nth_row(phase: Phase, workers: int, random_documents: Callable) -> None:
    lengths = [len(ids) for ids in random_documents(70, 40, 3)]
    rows = make_stream(lengths, 16, phase, rank=1, ranks=2).advance(200)
    parts = max(1, workers)
    for part in range(parts):
        stream = make_stream(lengths, 16, phase, rank=1, ranks=2)
        own = [stream.row(1 + 2 * part + 2 * parts * turn).pieces for turn in range(20)]
        assert own == rows[part::parts][:20]


def test_streams_begin_with_different_sources() -> None:
    """Of two sources of equal weight and long documents, about half of the streams read each, row after row."""
    sources = {"a": ListedLengths([1000] * 500), "b": ListedLengths([1000] * 500)}
    stream = SequenceStream(sources, [Phase((0.5, 0.5))], streams=400, seed=1, bos_id=0, plan=BatchPlan(400, [], 100))
    for _ in range(30):
        reads = Counter(row[0].source for row in islice(stream.advance(400), 400))
        assert abs(reads["a"] - 200) < 50  # 5σ
