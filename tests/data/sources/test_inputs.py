"""Inputs: folders, patterns and URLs expand to the right files; data sets; errors name what is missing."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.data.small_files import TEXTS, decode_documents, read_folder, write_jsonl
from trinity.data.prepare import shard_writer
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources.inputs import Dataset, DatasetInput, expand_inputs
from trinity.errors import Failure, UserError
from trinity.io import local


def names(paths: list[Path | str], folder: Path | str) -> list[str]:
    return [str(path).removeprefix(f"{folder}/") for path in paths]


def test_folders_and_patterns(folder: Path) -> None:
    every = ["a.jsonl", "b/a.jsonl.gz", "b/deep/x.txt", "b/z.jsonl.zst", "c.parquet"]
    assert names(expand_inputs([folder], kind="all"), folder) == every
    assert names(expand_inputs([f"file://{folder}"], kind="all"), folder) == every
    assert names(expand_inputs([f"{folder}/*.jsonl", f"{folder}/b/*.jsonl*"]), folder) == [
        "a.jsonl", "b/a.jsonl.gz", "b/z.jsonl.zst"
    ]  # fmt: skip
    assert names(expand_inputs([f"{folder}/**/*.txt"]), folder) == ["b/deep/x.txt"]
    (folder / "[a].txt").write_text("a name like a pattern")
    assert names(expand_inputs([folder / "[a].txt"]), folder) == ["[a].txt"]


def test_a_folder_gives_the_shards_of_its_files(folder: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    index, _ = prepare_data([folder], tokenizer_dir, tmp_path / "folder_out", kind="all")
    files = [f"file://{folder}/*.jsonl", *expand_inputs([folder], kind="all")[1:]]
    prepare_data(files, tokenizer_dir, tmp_path / "files_out")
    assert read_folder(tmp_path / "folder_out") == read_folder(tmp_path / "files_out")
    assert decode_documents(tmp_path / "folder_out", tokenizer_dir) == TEXTS
    assert index["input_documents"] == [10, 10, 1, 9, 20]


def test_urls_give_the_same_shards(
    folder: Path, tmp_path: Path, tokenizer_dir: Path, memory: fsspec.AbstractFileSystem
) -> None:
    memory.put(f"{folder}/", "/web", recursive=True)
    expected = prepare_data([folder], tokenizer_dir, tmp_path / "local", kind="all")[0]["shards"]
    urls = names(expand_inputs(["memory://web"], kind="all"), "memory:///web")
    assert urls == ["a.jsonl", "b/a.jsonl.gz", "b/deep/x.txt", "b/z.jsonl.zst", "c.parquet"]
    for number, inputs in enumerate((["memory://web"], [f"memory://web/{name}" for name in urls])):
        for workers in (0, 2):
            out = tmp_path / f"out{number}{workers}"
            assert prepare_data(inputs, tokenizer_dir, out, workers=workers, kind="all")[0]["shards"] == expected
    assert expand_inputs(["memory://web/b/*.gz"]) == ["memory:///web/b/a.jsonl.gz"]


def test_a_url_that_changed_is_noticed(tmp_path: Path, tokenizer_dir: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/a.jsonl", b'{"text": "one"}\n')
    assert prepare_data(["memory://a.jsonl"], tokenizer_dir, tmp_path / "out")[1] is False
    assert prepare_data(["memory://a.jsonl"], tokenizer_dir, tmp_path / "out")[1] is True
    memory.pipe("/a.jsonl", b'{"text": "two"}\n')
    with pytest.raises(UserError, match="whose inputs differ"):
        prepare_data(["memory://a.jsonl"], tokenizer_dir, tmp_path / "out")


def test_urls_that_cannot_be_read(
    tmp_path: Path, tokenizer_dir: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("nowhere", "no_such_module.System", errtxt="Install nowherefs", clobber=True)
    memory.pipe("/folder/a.zip", b"PK")
    cases = {
        "nowhere://bucket/a": "needs a package that is not installed here.* Install nowherefs",
        "foo://bucket/a": "cannot be opened .*Protocol not known: foo.*; use a path or a protocol such as file, s3",
        "memory://a.jsonl": "--input memory://a.jsonl does not exist; check the address",
        "memory://a*.jsonl": "matches no file; check the pattern",
        "memory://folder": "holds no file that is read; give plain text",
    }
    for url, words in cases.items():
        with pytest.raises(UserError, match=words):
            prepare_data([url], tokenizer_dir, tmp_path / "out")
    memory.pipe("/a.jsonl", b'{"text": "one"}\n' * 100)

    def fail(self: object, length: int = -1) -> bytes:
        raise RuntimeError("no route\n to host")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail, raising=False)
    with pytest.raises(Failure, match=r"memory://a\.jsonl cannot be read \(no route to host\); run the same command"):
        prepare_data(["memory://a.jsonl"], tokenizer_dir, tmp_path / "out")


def dataset(folder: Path) -> Dataset:
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [*TEXTS, ""])
    write_jsonl(folder / "test.jsonl", TEXTS[:3])
    return Dataset(str(folder))


def test_a_data_set_gives_the_shards_of_its_file(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when its second shard is about to be recorded, and resumed."""
    source = dataset(tmp_path / "set")
    expected, _ = prepare_data([tmp_path / "set" / "train.jsonl"], tokenizer_dir, tmp_path / "file", shard_tokens=300)
    whole, _ = prepare_data(source, tokenizer_dir, tmp_path / "whole", shard_tokens=300, workers=2)
    kinds = ("tokens_checksum", "documents_checksum", "skipped", "documents")
    for entry, expected_entry in zip(whole["shards"], expected["shards"], strict=True):
        assert {kind: entry[kind] for kind in kinds} == {kind: expected_entry[kind] for kind in kinds}
    assert whole["dataset"] | {"version": ""} == {
        "name": source.name, "config": None, "split": "train", "version": ""
    }  # fmt: skip
    with monkeypatch.context() as patch:
        die_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(source, tokenizer_dir, tmp_path / "out", shard_tokens=300)
    assert len(json.loads((tmp_path / "out" / "progress.json").read_text())["shards"]) == 1
    assert prepare_data(source, tokenizer_dir, tmp_path / "out", shard_tokens=300) == (whole, False)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    test, _ = prepare_data(Dataset(source.name, split="test"), tokenizer_dir, tmp_path / "test")
    assert test["documents"] == 3


def die_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    moves: Iterator[int] = iter(range(moment))
    real = local.publish

    def move(path: Path) -> None:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        real(path)

    patch.setattr(local, "publish", move)
    patch.setattr(shard_writer, "publish", move)


def test_data_sets_that_do_not_fit(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = dataset(tmp_path / "set")
    out = tmp_path / "out"
    cases = {
        Dataset(str(tmp_path / "none")): r"--dataset .*none --split train cannot be opened \(.*\); check --dataset",
        source._replace(split="dev"): r"--split dev cannot be opened \(Bad split: dev\. Available splits",
        source._replace(config="en"): r"--config en --split train cannot be opened",
    }
    for wrong, words in cases.items():
        with pytest.raises(UserError, match=words):
            prepare_data(wrong, tokenizer_dir, out)
    with pytest.raises(UserError, match=r"has no column body; set --field .*to one of: id, text"):
        prepare_data(source, tokenizer_dir, out, field="body")
    with pytest.raises(UserError, match=r"--split train:1 holds int where text should be"):
        prepare_data(source, tokenizer_dir, out, field="id")
    prepare_data(source, tokenizer_dir, out)
    with pytest.raises(UserError, match="whose dataset differ"):
        prepare_data(source._replace(split="test"), tokenizer_dir, out)
    with pytest.raises(UserError, match="whose inputs, dataset differ"):
        prepare_data([tmp_path / "set" / "train.jsonl"], tokenizer_dir, out)
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS[:4])
    with pytest.raises(UserError, match="whose dataset differ"):
        prepare_data(source, tokenizer_dir, out)


def test_the_total_of_a_data_set(tmp_path: Path) -> None:
    """Unknown for plain files; then the bar shows no percentage."""
    assert DatasetInput(dataset(tmp_path / "set")).total is None
