"""Remote shards: read through the cache they equal local ones; each file is fetched once and checked."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from trinity.data.sources.shards import TokenSource
from trinity.errors import UserError
from trinity.io import remote
from trinity.io.remote import cache_folder_of

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRINITY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def local_shards(make_source: Callable, random_documents: Callable) -> TokenSource:
    """Several shards."""
    source = make_source("s", random_documents(40, 30, 2))
    assert len(source._shards) > 4
    return source


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def tokens(source: TokenSource) -> list[list[int]]:
    return [source.read(number, 0, source.length(number)).tolist() for number in range(source.documents)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_longest_document(local_shards: TokenSource, memory: fsspec.AbstractFileSystem) -> None:
    """Exact of local shards; of remote ones a lower bound, for which no shard is fetched."""
    memory.put(f"{local_shards.directory}/", "/shards", recursive=True)
    longest = int(local_shards.lengths(np.arange(local_shards.documents)).max())
    power = 1 << longest.bit_length() - 1
    for tokens in (1, power - 1, power, longest - 1, longest, 2 * power - 1, 2 * power):
        assert local_shards.longer_than(tokens) == (longest if longest > tokens else None)
        source = TokenSource("memory://shards/")
        assert source.longer_than(tokens) == (power if power > tokens else None)
        assert names(source.directory) == {"index.json"}


def test_remote_shards_equal_local_ones(
    local_shards: TokenSource, memory: fsspec.AbstractFileSystem, cache: Path
) -> None:
    """Only index.json is fetched before it is needed; once all is cached, the remote folder is not needed."""
    memory.put(f"{local_shards.directory}/", "/shards", recursive=True)
    source = TokenSource("memory://shards/")
    assert source.directory == cache_folder_of("memory://shards")
    assert source.directory.parent == cache / "shards"
    assert names(source.directory) == {"index.json"}
    assert (source.documents, source.tokens, source.fingerprint) == (
        local_shards.documents,
        local_shards.tokens,
        local_shards.fingerprint,
    )
    source.length(0)
    assert names(source.directory) == {"index.json", "shard_00000.tokens", "shard_00000.documents"}
    assert tokens(source) == tokens(local_shards)
    assert source.lengths(np.arange(40)).tolist() == local_shards.lengths(np.arange(40)).tolist()
    assert names(source.directory) == names(local_shards.directory)
    memory.store.clear()
    assert tokens(TokenSource("memory://shards", "always")) == tokens(local_shards)


def test_a_file_url_is_a_local_path(local_shards: TokenSource, cache: Path) -> None:
    source = TokenSource(f"file://{local_shards.directory}")
    assert source.directory == local_shards.directory
    assert tokens(source) == tokens(local_shards)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda raw: raw[:-1],
            r"shard_00001\.tokens is not what .*index\.json names \(\d+ bytes of \d+\); fix it there",
        ),
        (lambda raw: bytes([raw[0] ^ 1]) + raw[1:], r"\(its checksum is another\)"),
        (None, r"memory://shards/shard_00001\.tokens does not exist; check the address"),
    ],
    ids=["cut short", "changed", "missing"],
)
def test_fetched_files_are_checked(
    local_shards: TokenSource, memory: fsspec.AbstractFileSystem, harm: Callable | None, words: str
) -> None:
    """A refused file does not stay in the cache: once repaired at its source, it is fetched again."""
    memory.put(f"{local_shards.directory}/", "/shards", recursive=True)
    source = TokenSource("memory://shards")
    good = memory.cat("/shards/shard_00001.tokens")
    memory.rm("/shards/shard_00001.tokens") if harm is None else memory.pipe("/shards/shard_00001.tokens", harm(good))
    with pytest.raises(UserError, match=words):
        tokens(source)
    assert "shard_00001.tokens" not in names(source.directory)
    memory.pipe("/shards/shard_00001.tokens", good)
    assert tokens(source) == tokens(local_shards)


def test_damage_in_the_cache_is_named(local_shards: TokenSource, memory: fsspec.AbstractFileSystem) -> None:
    memory.put(f"{local_shards.directory}/", "/shards", recursive=True)
    source = TokenSource("memory://shards")
    tokens(source)
    path = source.directory / "shard_00001.documents"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        UserError, match=r"documents is cut short .*; remove it, and it is fetched from memory://shards"
    ):
        TokenSource("memory://shards")
    path.unlink()
    assert tokens(TokenSource("memory://shards")) == tokens(local_shards)


def test_a_folder_without_an_index(memory: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(UserError, match=r"memory://nothing/index\.json does not exist; check the address"):
        TokenSource("memory://nothing")


def test_a_killed_fetch_starts_again(local_shards: TokenSource, memory: fsspec.AbstractFileSystem) -> None:
    memory.put(f"{local_shards.directory}/", "/shards", recursive=True)
    source = TokenSource("memory://shards")
    (source.directory / "shard_00000.tokens.tmp").write_bytes(b"half")
    assert tokens(source) == tokens(local_shards)
    assert not list(source.directory.glob("*.tmp"))


def test_many_processes_fetch_each_file_once(
    local_shards: TokenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """local:// is another fsspec name for local files, treated as remote."""
    url, log, real = f"local://{local_shards.directory}", tmp_path / "log", remote.open_input
    expected = tokens(local_shards)

    def logged(path: str) -> object:
        with open(log, "a") as file:
            file.write(path + "\n")
        return real(path)

    def read() -> None:
        assert tokens(TokenSource(url)) == expected

    monkeypatch.setattr(remote, "open_input", logged)
    processes = [FORK.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    fetched = log.read_text().splitlines()
    assert sorted(fetched) == sorted(f"{url}/{name}" for name in names(local_shards.directory))
