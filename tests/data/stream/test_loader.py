"""The workers' sequences are those of the stream, and the state is that of the last consumed sequence."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trinity.data import BatchPlan, SequenceStream, TokenSource
from trinity.data.stream.loader import Loader
from trinity.data.stream.mixture import Phase
from trinity.errors import Failure, UserError

S, V = 16, 48
PLAN = BatchPlan(96, [], S)
RSDB = Phase((0.3, 0.7), rsdb_size=2)


@pytest.fixture(scope="module")
def sources(make_source: Callable, random_documents: Callable) -> dict[str, TokenSource]:
    return {"a": make_source("a", random_documents(300, 60, 1)), "b": make_source("b", random_documents(2000, 9, 2))}


@pytest.fixture
def make_loader(sources: dict) -> Iterator[Callable[..., Loader]]:
    """A loader over the sources, closed in the end."""
    loaders = []

    def make(workers: int, rank: int = 0, ranks: int = 1, **arguments: object) -> Loader:
        loaders.append(Loader(make_stream(sources, rank, ranks, **arguments), workers, ahead=8))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def make_stream(sources: dict, rank: int = 0, ranks: int = 1, **arguments: object) -> SequenceStream:
    values = {"streams": V, "seed": 2, "bos_id": 0, "plan": PLAN, "rank": rank, "ranks": ranks, **arguments}
    return SequenceStream(sources, [RSDB], **values)


def assert_same_batch(batch: object, expected: object) -> None:
    assert batch.pieces == expected.pieces
    for name in ("tokens_BS", "targets_BS", "document_ids_BS"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert getattr(batch, name).dtype == getattr(expected, name).dtype


def assert_same_state(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (8, 5)])
def test_batches_and_states_equal_the_streams(
    make_loader: Callable, sources: dict, workers: int, ranks: int, rank: int
) -> None:
    """Also after loading an earlier state, which the workers have passed."""
    loader, stream = make_loader(workers, rank, ranks), make_stream(sources, rank, ranks)
    share = 96 // ranks
    for _ in range(3):
        assert_same_batch(loader.take(share), stream.take(share))
        assert_same_state(loader.state_dict(), stream.state_dict())
    state = loader.state_dict()
    expected = stream.take(share)
    loader.take(share)
    loader.load_state_dict(state)
    assert_same_batch(loader.take(share), expected)
    assert_same_state(loader.state_dict(), stream.state_dict())


def test_a_stream_pickles_without_its_tokens(sources: dict) -> None:
    """As it is sent to a spawned worker: at the same position, with its own maps."""
    stream = make_stream(sources)
    stream.take(100)
    assert any(maps is not None for maps in sources["a"]._maps)
    assert all(maps is None for maps in pickle.loads(pickle.dumps(sources["a"]))._maps)
    assert_same_batch(pickle.loads(pickle.dumps(stream)).take(50), stream.take(50))


def test_workers_that_do_not_divide_the_streams(make_loader: Callable, sources: dict) -> None:
    """48 streams on 16 ranks are 3 a rank: of 2 workers one is used, of 100 three."""
    assert [make_loader(workers, 3, 16).workers for workers in (0, 1, 2, 3, 100)] == [0, 1, 1, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_of_the_data(make_loader: Callable, sources: dict, workers: int) -> None:
    """All whole batches are the stream's; at the end the state does not move."""
    loader, stream = make_loader(workers, repeat=False), make_stream(sources, repeat=False)
    batches = 0
    while not loader.ended(V):
        assert_same_batch(loader.take(V), stream.take(V))
        batches += 1
    assert batches >= 1
    state = stream.state_dict()
    with pytest.raises(UserError, match=r"the data ends before the run does.*data\.exhausted=repeat"):
        loader.take(V)
    assert_same_state(loader.state_dict(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_source_is_one_sentence(
    make_loader: Callable, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def broken(self: TokenSource, document: int, start: int, length: int) -> np.ndarray:
        raise UserError("the shard is gone; bring it back")

    monkeypatch.setattr(TokenSource, "read", broken)
    with pytest.raises(UserError, match=r"^the shard is gone; bring it back$"):
        make_loader(workers).take(1)


def test_a_worker_that_dies_is_noticed(make_loader: Callable) -> None:
    loader = make_loader(1)
    loader.take(1)
    worker = loader._started[0].process
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(Failure, match=r"a process that prepares data was killed by signal 9"):
        loader.take(10_000)


def test_workers_leave_signals_to_the_run_and_end_with_it(make_loader: Callable) -> None:
    """SIGINT and SIGTERM, sent to every process by a terminal or a job system, do not end a worker."""
    loader = make_loader(1)
    loader.take(1)
    worker = loader._started[0].process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    time.sleep(0.1)
    loader.take(200)
    assert worker.is_alive()
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has")
def test_workers_end_when_the_run_is_killed(sources: dict) -> None:
    """A separate process starts them and is killed by SIGKILL."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def train() -> None:
        loader = Loader(make_stream(sources), 2, 8)
        loader.take(4)
        sender.send([worker.process.pid for worker in loader._started])
        time.sleep(60)

    run = context.Process(target=train)
    run.start()
    pids = receiver.recv()
    run.kill()
    run.join()
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlived its run")


def test_an_open_loader_ends_with_its_process(sources: dict) -> None:
    """Its workers block SIGTERM, which Python sends to daemon processes at exit: the process would wait forever."""
    kept: list[Loader] = []

    def read() -> None:
        kept.append(Loader(make_stream(sources), 2, 8))
        kept[0].take(4)

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(30)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def test_the_random_state_is_unchanged(make_loader: Callable) -> None:
    before = torch.get_rng_state()
    make_loader(1).take(1)
    assert torch.equal(torch.get_rng_state(), before)
