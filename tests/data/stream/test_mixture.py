"""A change of phase: its effects, what it leaves unchanged, and the state before, at and after it."""

from collections import Counter
from collections.abc import Callable

import pytest

from trinity.data import BatchPlan, SequenceStream, TokenSource
from trinity.data.stream.mixture import LengthBias, Phase

S, V, SEED = 16, 12, 5
SWITCH = 3 * V * S  # tokens: after three rows of every stream
FIRST = Phase((0.5, 0.5, 0.0))
OTHERS = {
    "another mixture": (Phase((0.0, 0.2, 0.8)), S),
    "rsdb": (Phase((0.5, 0.5, 0.0), rsdb_size=3), S),
    "longer rows": (Phase((0.5, 0.5, 0.0)), 50),
    "long documents": (Phase((0.5, 0.5, 0.0), bias=LengthBias(60, 0.1, 0.9)), S),
    "all of it": (Phase((0.1, 0.2, 0.7), rsdb_size=2, bias=LengthBias(60, 0.5, 1.0)), 7),
}


@pytest.fixture(scope="module")
def sources(make_source: Callable, random_documents: Callable) -> dict[str, TokenSource]:
    return {name: make_source(name, random_documents(count, 60, count)) for name, count in zip("abc", (400, 600, 900))}


@pytest.fixture(scope="module")
def make_stream(sources: dict) -> Callable[..., SequenceStream]:
    def make(phases: list[Phase], lengths: list[int], **arguments: object) -> SequenceStream:
        switches = [(SWITCH * number, length) for number, length in enumerate(lengths[1:], 1)]
        plan = BatchPlan(V, [], lengths[0], switches)
        return SequenceStream(sources, phases, streams=V, seed=SEED, bos_id=0, plan=plan, **arguments)

    return make


@pytest.mark.parametrize("name", OTHERS)
def test_history_does_not_change_with_a_later_phase(make_stream: Callable, name: str) -> None:
    later, length = OTHERS[name]
    plain = make_stream([FIRST], [S]).advance(8 * V)
    switched = make_stream([FIRST, later], [S, length]).advance(8 * V)
    assert switched[: 3 * V] == plain[: 3 * V]
    assert switched[3 * V :] != plain[3 * V :]
    assert all(sum(piece.length for piece in row) == length for row in switched[3 * V :])


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_lost_or_doubled_over_a_switch(make_stream: Callable, sources: dict, name: str, back: bool) -> None:
    """Over more than an epoch of one source: documents are read on from their heads, in their own stream."""
    later, length = OTHERS[name]
    phases, lengths = ([FIRST, later, FIRST], [S, length, S]) if back else ([FIRST, later], [S, length])
    rows = make_stream(phases, lengths).advance(40 * V)
    heads: dict[tuple, int] = {}
    for number, row in enumerate(rows):
        for piece in row:
            key = (number % V, piece.source, piece.document)
            assert piece.start == heads.get(key, 0)
            end = piece.start + piece.length
            heads[key] = 0 if end == sources[piece.source].length(piece.document) else end
    left_open = Counter(stream for (stream, _, _), head in heads.items() if head)
    assert max(left_open.values()) <= (2 * later.rsdb_size if later.rsdb_size else 1)


def test_the_new_weights_hold_from_the_switch_on(make_stream: Callable, sources: dict) -> None:
    """Over the phase, each source's tokens stay within a document of its weight, except for the open document."""
    rows = make_stream([FIRST, Phase((0.0, 0.2, 0.8))], [S, S]).advance(300 * V)[3 * V :]
    for stream in range(V):
        read = Counter()
        for row in rows[stream::V]:
            for piece in row:
                read[piece.source] += piece.length
        for name, weight in {"a": 0.0, "b": 0.2, "c": 0.8}.items():
            assert abs(read[name] - weight * read.total()) <= 60 + 60


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rows", [2, 3, 4, 9])
def test_resume_around_a_switch(make_stream: Callable, name: str, rows: int) -> None:
    """Saved before, at and after it; and the later phase may be edited while it has not begun."""
    later, length = OTHERS[name]
    undisturbed = make_stream([FIRST, later], [S, length]).advance(14 * V)
    state: dict = {}
    for rank in range(2):
        stream = make_stream([FIRST, later], [S, length], rank=rank, ranks=2)
        stream.advance(rows * V // 2)
        state |= stream.state_dict()
    stream = make_stream([FIRST, later], [S, length])
    stream.load_state_dict(state)
    assert stream.advance((14 - rows) * V) == undisturbed[rows * V :]
    if rows <= 3:
        edited, long = OTHERS["all of it"]
        stream = make_stream([FIRST, edited], [S, long])
        stream.load_state_dict(state)
        whole = make_stream([FIRST, edited], [S, long]).advance(14 * V)
        assert stream.advance((14 - rows) * V) == whole[rows * V :]


def test_a_step_of_another_length_by_replay(make_stream: Callable) -> None:
    stream = make_stream([FIRST, *OTHERS["longer rows"][:1]], [S, 50])
    for step, length in ((0, S), (2, S), (3, 50), (7, 50)):
        batch = stream.batch(step)
        assert batch.tokens_BS.shape == (V, length)
    resumed = make_stream([FIRST, *OTHERS["longer rows"][:1]], [S, 50])
    for _ in range(7):
        resumed.take(V)
    assert resumed.take(V).pieces == stream.batch(7).pieces
