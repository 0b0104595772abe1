"""The stream against a transcription of its rules on whole token lists, and against itself on other ranks."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as checkpoint

from trinity.checkpoint.load import empty_tensors
from trinity.data import BatchPlan, SequenceStream, TokenSource
from trinity.data.stream.mixture import Phase, normalised
from trinity.data.stream.shuffle import permutation_keys, permute
from trinity.errors import UserError

S, V, SEED = 16, 12, 5
# One that is never read, one with fewer documents than streams, and one with more.
COUNTS = {"unread": 3, "few": 7, "many": 40}
MIXTURE = {"unread": 0.0, "few": 1.0, "many": 2.0}
PLAN = BatchPlan(12, [(12 * 2 * S, 24)], S)


@pytest.fixture(scope="module")
def documents(random_documents: Callable) -> dict[str, list[list[int]]]:
    """Ids of every document, of 1 to 60 tokens: shorter and longer than a sequence."""
    return {name: random_documents(count, 60, seed) for seed, (name, count) in enumerate(COUNTS.items())}


@pytest.fixture(scope="module")
def sources(make_source: Callable, documents: dict) -> dict[str, TokenSource]:
    return {name: make_source(name, ids) for name, ids in documents.items()}


@pytest.fixture(scope="module")
def make_stream(sources: dict) -> Callable[..., SequenceStream]:
    """A stream over the sources; any argument can be another."""

    def make(mixture: dict = MIXTURE, **arguments: object) -> SequenceStream:
        values = {"sources": sources, "streams": V, "seed": SEED, "bos_id": 0, "plan": PLAN, **arguments}
        own = values.pop("sources")
        return SequenceStream(own, [Phase(normalised(own, mixture))], **values)

    return make


def chance(*key: object) -> float:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def document_at(documents: dict, name: str, j: int) -> list[int]:
    """The j-th document of a source's endless order."""
    n = len(documents[name])
    return documents[name][permute(np.array([j % n]), n, permutation_keys(SEED, name, j // n))[0]]


def head_start(documents: dict, stream: int, mixture: dict) -> tuple[str, Counter]:
    """The source a stream begins with, and the tokens counted as drawn: up to the first document of each other one."""
    first, left = None, chance(SEED, 0, stream, "begin") * sum(mixture.values())
    for name in documents:
        left -= mixture[name]
        if first is None and left < 0:
            first = name
    others = [name for name in documents if mixture[name] and name != first]
    return first, Counter({
        name: int(chance(SEED, 0, stream, name) * len(document_at(documents, name, stream))) for name in others
    })  # fmt: skip


def transcribed_rows(documents: dict, stream: int, mixture: dict, count: int) -> list[tuple[list, list, list]]:
    """(tokens, targets, documents begun before) of a stream's first rows, cut from one long list of tokens."""
    tokens, targets, numbers = [], [], []
    name, drawn = head_start(documents, stream, mixture)
    taken, total_weight = Counter(), sum(mixture.values())
    while len(tokens) < count * S:
        ids = document_at(documents, name, stream + V * taken[name])
        taken[name] += 1
        drawn[name] += len(ids)
        tokens += ids
        targets += [*ids[1:], 0]
        numbers += [taken.total()] * len(ids)
        behind = {
            name: weight / total_weight * drawn.total() - drawn[name] for name, weight in mixture.items() if weight > 0
        }
        name = next(name for name in behind if behind[name] == max(behind.values()))
    return [(tokens[at : at + S], targets[at : at + S], numbers[at : at + S]) for at in range(0, count * S, S)]


def test_against_the_transcription(make_stream: Callable, documents: dict) -> None:
    rows = list(islice(make_stream(), 30 * V))
    for stream in range(V):
        for row, (tokens, targets, numbers) in zip(rows[stream::V], transcribed_rows(documents, stream, MIXTURE, 30)):
            assert row.tokens.tolist() == tokens
            assert row.targets.tolist() == targets
            assert row.document_ids.tolist() == [number - numbers[0] for number in numbers]
            assert (row.tokens.dtype, row.targets.dtype, row.document_ids.dtype) == (
                torch.int64,
                torch.int64,
                torch.int32,
            )


def test_every_document_once_an_epoch_and_in_order(make_stream: Callable, documents: dict) -> None:
    """Pieces alone: each stream reads its documents from the first token to the last, and its t-th is j = s + V·t."""
    rows = list(islice(make_stream(), 120 * V))
    read = {name: {} for name in documents}
    for stream in range(V):
        taken, at = Counter(), None
        for row in rows[stream::V]:
            begin = 0
            for name, document, start, length in row.pieces:
                assert (name, document, start) == at or (start == 0 and at is None)
                ids = documents[name][document]
                assert row.tokens[begin : begin + length].tolist() == ids[start : start + length]
                begin += length
                at = (name, document, start + length)
                if start + length == len(ids):
                    read[name][stream + V * taken[name]] = document
                    taken[name] += 1
                    at = None
            assert begin == S
    for name in ("few", "many"):
        n = len(documents[name])
        epochs = next(j for j in range(10**6) if j not in read[name]) // n
        assert epochs >= 3
        orders = [[read[name][j] for j in range(epoch * n, epoch * n + n)] for epoch in range(epochs)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert len(set(map(tuple, orders))) > 1
    assert not read["unread"]


def test_ends_of_documents_without_a_target(make_stream: Callable, documents: dict) -> None:
    """Only the targets that follow a document's last token change, from BOS to -100."""
    for with_loss, without in islice(zip(make_stream(), make_stream(loss_on_document_start=False)), 200):
        assert torch.equal(with_loss.tokens, without.tokens)
        begin = 0
        ends = torch.zeros(S, dtype=torch.bool)
        for name, document, start, length in without.pieces:
            begin += length
            ends[begin - 1] = start + length == len(documents[name][document])
        assert (with_loss.targets[ends] == 0).all()
        assert (with_loss.targets[~ends] != 0).all()
        assert torch.equal(without.targets, with_loss.targets.masked_fill(ends, -100))


def shares(rows: list, mixture: dict, longest: int) -> Iterator[tuple[float, float]]:
    """(most ahead of its weight, furthest behind it) of any source where a document ends, in longest documents."""
    total_weight, drawn, open_document = sum(mixture.values()), Counter(), None
    for row in rows:
        for piece in row.pieces:
            if open_document not in (None, piece[:2]) or (open_document and piece.start == 0):
                ahead = [drawn[name] - weight / total_weight * drawn.total() for name, weight in mixture.items()]
                yield max(ahead) / longest, -min(ahead) / longest
            open_document = piece[:2]
            drawn[piece.source] += piece.length


@pytest.mark.parametrize("weight", [0.5, 0.9, 0.03])
def test_two_sources_stay_within_a_document_of_their_weights(make_stream: Callable, weight: float) -> None:
    mixture = {"few": weight, "many": 1 - weight, "unread": 0.0}
    for seed in range(5):
        rows = list(islice(make_stream(mixture=mixture, streams=1, seed=seed), 1000))
        distances = list(shares(rows, mixture, 60))
        assert len(distances) > 300
        assert max(map(max, distances)) <= 1


def test_three_sources_stay_close_to_their_weights(make_stream: Callable) -> None:
    """Within a document each; where one is behind, the two others may be ahead."""
    mixture = {"few": 0.2, "many": 0.3, "unread": 0.5}
    for seed in range(5):
        distances = list(shares(list(islice(make_stream(mixture=mixture, streams=1, seed=seed), 1000)), mixture, 60))
        assert max(ahead for ahead, _ in distances) <= 1
        assert max(behind for _, behind in distances) <= 2


def test_the_first_rows_hold_all_sources(make_stream: Callable) -> None:
    """Streams begin with a source drawn by weight: of 600, the share of each is within 5σ = 0.1 of its weight."""
    mixture = {"few": 0.2, "many": 0.3, "unread": 0.5}
    rows = list(islice(make_stream(mixture=mixture, streams=600), 600))
    begun = Counter(row.pieces[0].source for row in rows)
    for name, weight in mixture.items():
        assert begun[name] / 600 == pytest.approx(weight, abs=0.1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_same_global_batches_on_any_number_of_ranks(make_stream: Callable, ranks: int) -> None:
    alone = make_stream()
    streams = [make_stream(rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(12):
        first, sequences = PLAN.at(step)[:2]
        parts = [stream.take(sequences // ranks) for stream in streams]
        whole = alone.take(sequences)
        for k in range(sequences):
            part, row = parts[(first + k) % ranks], k // ranks
            assert torch.equal(part.tokens_BS[row], whole.tokens_BS[k])
            assert torch.equal(part.targets_BS[row], whole.targets_BS[k])
            assert torch.equal(part.document_ids_BS[row], whole.document_ids_BS[k])
            assert part.pieces[row] == whole.pieces[k]


@pytest.mark.parametrize("step", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_by_replay_is_the_step_of_the_run(make_stream: Callable, step: int, rank: int) -> None:
    """From before it, at it and after it; the stream stays where it is."""
    run = make_stream(rank=rank, ranks=3)
    batches = [run.take(PLAN.at(number)[1] // 3) for number in range(step + 1)]
    stream = make_stream(rank=rank, ranks=3)
    for already in (0, 5, 40):
        stream.take(already)
        before = stream.state_dict()
        batch = stream.batch(step)
        assert torch.equal(batch.tokens_BS, batches[step].tokens_BS)
        assert torch.equal(batch.targets_BS, batches[step].targets_BS)
        assert batch.pieces == batches[step].pieces
        after = stream.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("target", [0, 1, 11, 12, 13, 100, 501])
def test_seek_reads_no_tokens(make_stream: Callable, monkeypatch: pytest.MonkeyPatch, target: int) -> None:
    rows = list(islice(make_stream(), 520))
    stream = make_stream()
    stream.take(90)
    with monkeypatch.context() as patch:
        patch.setattr(TokenSource, "read", None)
        stream.seek(target)
    for row, expected in zip(islice(stream, 15), rows[target:]):
        assert row.pieces == expected.pieces
        assert torch.equal(row.tokens, expected.tokens)


@pytest.mark.parametrize("taken", [0, 1, 5, 17, 100, 333])
@pytest.mark.parametrize(("ranks", "later"), [(1, 1), (2, 2), (2, 3), (3, 4), (4, 1), (1, 12)])
def test_a_saved_state_resumes_on_any_number_of_ranks(
    make_stream: Callable, taken: int, ranks: int, later: int
) -> None:
    """Also where k does not divide by the later ranks: each owns one of any `later` consecutive sequences."""
    state: dict = {}
    for rank in range(ranks):
        stream = make_stream(rank=rank, ranks=ranks)
        stream.take(taken)
        saved = stream.state_dict()
        assert state.get("k", saved["k"]) == saved["k"] == taken * ranks
        state |= saved
        stream.take(9)  # what is taken after saving does not show in what was saved
    expected = list(islice(make_stream(), taken * ranks + 60))[taken * ranks :]
    rows = {}
    for rank in range(later):
        stream = make_stream(rank=rank, ranks=later)
        stream.take(4)
        stream.load_state_dict(state)
        own = [k for k in range(taken * ranks, taken * ranks + 60) if k % later == rank]
        rows |= dict(zip(own, stream))
    assert [rows[k].pieces for k in sorted(rows)] == [row.pieces for row in expected]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_through_the_distributed_checkpoint(make_stream: Callable, tmp_path: object) -> None:
    """The loaded tensors have the saved shapes."""
    stream = make_stream()
    stream.take(77)
    saved = {f"data.{key}": value for key, value in stream.state_dict().items()}
    checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    other = make_stream()
    state = empty_tensors(tmp_path, "data.")
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict({key.removeprefix("data."): value for key, value in state.items()})
    assert [row.pieces for row in islice(other, 50)] == [row.pieces for row in islice(stream, 50)]


def test_seed_changes_the_order(make_stream: Callable) -> None:
    assert [row.pieces for row in islice(make_stream(seed=6), 20)] != [row.pieces for row in islice(make_stream(), 20)]


def test_random_access_pattern(make_stream: Callable) -> None:
    """Any mixture of take, seek, state_dict, load_state_dict and batch leaves the stream at k."""
    numbers, stream, rows = random.Random(3), make_stream(rank=1, ranks=4), list(islice(make_stream(), 700))
    saved = stream.state_dict()
    for _ in range(60):
        action = numbers.randrange(5)
        if action == 0:
            stream.take(numbers.randrange(10))
        elif action == 1:
            stream.seek(numbers.randrange(400))
        elif action == 2:
            saved = stream.state_dict()
        elif action == 3:
            stream.load_state_dict(saved)
        else:
            stream.batch(numbers.randrange(10))
        own = next(k for k in range(stream.k, stream.k + 4) if k % 4 == 1)
        assert next(stream).pieces == rows[own].pieces


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ranks": 5}, r"data\.streams=12 does not divide by 5 data ranks; use a number of \[1, 2, 3, 4, 6, 12\]"),
        ({"streams": 0}, r"data\.streams=0"),
        ({"mixture": {**MIXTURE, "web": 1}}, r"data\.mixture names web, which is no source; known: unread, few, many"),
        ({"mixture": {**MIXTURE, "few": -1}}, "must hold weights of at least 0"),
        ({"mixture": {**MIXTURE, "few": float("nan")}}, "must hold weights of at least 0"),
        ({"mixture": dict.fromkeys(MIXTURE, 0)}, "one of them above 0"),
        ({"bos_id": 3}, r"data\.train\.unread begins documents with id 0, not 3"),
    ],
)
def test_mistakes_are_named(make_stream: Callable, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_stream(**arguments)


def test_sources_of_two_tokenizers(make_stream: Callable, make_source: Callable) -> None:
    sources = {"a": make_source("a", [[0, 1]]), "b": make_source("b", [[0, 1]], tokenizer="another")}
    with pytest.raises(UserError, match=r"data\.train\.b was made with another tokenizer than a"):
        make_stream(sources=sources, mixture={"a": 1, "b": 1})


def test_states_that_do_not_fit(make_stream: Callable, sources: dict) -> None:
    stream = make_stream()
    half = make_stream(rank=1, ranks=2).state_dict()
    with pytest.raises(UserError, match=r"no stream 0; set data\.streams"):
        stream.load_state_dict(half)
    changed = stream.state_dict() | {"source.few": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"data\.train\.few has changed .* hash was 0{32} and"):
        stream.load_state_dict(changed)
    stream.take(3 * V)
    with pytest.raises(UserError, match=r"drawn from a source that data\.train does not name"):
        make_stream(sources={"many": sources["many"]}, mixture={"many": 1}).load_state_dict(stream.state_dict())


def test_a_source_is_added_or_an_unread_one_removed(make_stream: Callable, make_source: Callable) -> None:
    """A saved state resumes where sources were added, removed unread, or reordered."""
    stream = make_stream()
    stream.take(50)
    sources = {"new": make_source("new", [[0, 5, 6]]), "many": stream.sources["many"], "few": stream.sources["few"]}
    other = make_stream(sources=sources, mixture={"few": 1, "many": 2})
    other.load_state_dict(stream.state_dict())
    assert [row.pieces for row in islice(other, 100)] == [row.pieces for row in islice(stream, 100)]
