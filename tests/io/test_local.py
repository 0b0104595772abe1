"""Every file that a run or a tool writes goes through one writer: synced file and folder, the umask's mode."""

import ast
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trinity.checkpoint.checkpoint import Checkpoint
from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text_index import open_index
from trinity.data.tokenizer.tokenizer import load_tokenizer, save_tokenizer
from trinity.interop import export_hf
from trinity.io import local
from trinity.io.json_files import append_json_line, write_json
from trinity.io.local import atomic_path, copy_atomically, make_folder, temporary_path, write_atomically
from trinity.models import ModelConfig, Trinity
from trinity.monitor.loggers import JsonLines, _wandb_id
from trinity.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    vocab_size=512, width=8, layers=1, dense_layers=1, dense_width=8, heads=1, kv_heads=1, head_dim=8, window=4,
    max_positions=8,
)  # fmt: skip


class Synced:
    """What os.fsync was called with: files, and folders with the names that were in them then."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.names: dict[Path, set[str]] = {}

    def __call__(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.names[path] = set(os.listdir(path))
        else:
            self.files.append(path)

    def lasts(self, path: Path) -> bool:
        """Whether a file's content was synced under its temporary name, and then its name in the folder."""
        path = path.resolve()
        return temporary_path(path) in self.files and path.name in self.names.get(path.parent, ())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """What is synced while a test runs."""
    found = Synced()
    monkeypatch.setattr(os, "fsync", found)
    return found


def run_directory(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    run = RunDirectory(folder / "run")
    run.add_config(RunConfig())
    run.add_config(RunConfig())
    run.set_status("running", None, 0)
    run.forbid_restart("a mistake")
    _wandb_id(run.path)
    return [run.path / name for name in ("config.yaml", "config.1.yaml", "status.json", "STOP", "wandb_id")]


def checkpoint(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    step = folder / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    Checkpoint(step).mark_complete({})
    return [step / "COMPLETE", step.parent / "latest"]


def metrics(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    JsonLines(path, 1).close()
    return [path, folder / "metrics.tail.1.jsonl"]


def shards(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    from trinity.data.prepare.prepare import prepare_data

    (folder / "text.txt").write_text("some text")
    prepare_data([folder / "text.txt"], corpus.tokenizer, folder / "shards", workers=0)
    assert TokenSource(folder / "shards").documents == 1
    return [folder / "shards" / name for name in ("index.json", "shard_00000.tokens", "shard_00000.documents")]


def text_index(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    index = open_index([corpus.texts["held_out"]], "text", folder / "cache")
    return [index.folder / name for name in ("index.json", "offsets", "first")]


def tokenizer(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    save_tokenizer(load_tokenizer(corpus.tokenizer), folder / "tokenizer")
    return list((folder / "tokenizer").iterdir())


def results(folder: Path, corpus: SimpleNamespace) -> list[Path]:
    write_json(folder / "results.json", {"a": 1})
    return [folder / "results.json"]


WRITERS = (run_directory, checkpoint, metrics, shards, text_index, tokenizer, results)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_content_and_name_are_synced(write: Callable, tmp_path: Path, corpus: SimpleNamespace, synced: Synced) -> None:
    files = write(tmp_path, corpus)
    assert [path.name for path in files if not synced.lasts(path)] == []
    assert not list(tmp_path.rglob("*.tmp"))


def small_model() -> Trinity:
    model = Trinity(SMALL)
    model.init_weights(0)
    return model


def test_an_export_is_synced(tmp_path: Path, corpus: SimpleNamespace, synced: Synced) -> None:
    """Its files, in the folder that is renamed when all are there, and then that folder's own name."""
    folder = export_hf(small_model(), tmp_path / "hf", corpus.tokenizer, torch.float32, max_shard_bytes=10_000)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    partial = tmp_path / ".hf.partial"
    assert {path.name for path in synced.files} == {f"{name}.tmp" for name in names}
    assert synced.names[partial] == names
    assert synced.names[tmp_path] == {"hf"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_gives_the_mode(tmp_path: Path, corpus: SimpleNamespace, umask: int) -> None:
    """Of every writer's files, of a copy of a private file, and of what safetensors writes, which makes it 600."""
    before = os.umask(umask)
    try:
        files = [path for write in WRITERS for path in write(tmp_path / make_name(tmp_path, write), corpus)]
        export_hf(small_model(), tmp_path / "hf", corpus.tokenizer, torch.float32)
        append_json_line(tmp_path / "lines.jsonl", {})
        private = tmp_path / "private"
        private.touch(0o600)
        copy_atomically(private, tmp_path / "copy")
        with atomic_path(tmp_path / "by_name") as part:
            part.unlink()
            part.touch(0o600)
    finally:
        os.umask(before)
    files += [*(tmp_path / "hf").iterdir(), *(tmp_path / name for name in ("lines.jsonl", "copy", "by_name"))]
    assert {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == dict.fromkeys(files, oct(0o666 & ~umask))


def make_name(folder: Path, write: Callable) -> str:
    (folder / write.__name__).mkdir()
    return write.__name__


@pytest.mark.parametrize("content", ["new", ["ne", "w"], b"new"])
def test_written_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    """A write that fails leaves the old file and nothing else, and its error names the file that was meant."""
    path = tmp_path / "file"
    assert write_atomically(path, "old text\r\nö") == len("old text\r\nö".encode())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as failure:
            write_atomically(path, content)
        assert failure.value.filename == str(path)
        assert os.listdir(tmp_path) == ["file"]
        assert path.read_bytes() == "old text\r\nö".encode()
    assert write_atomically(path, content) == 3
    assert path.read_bytes() == b"new"


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_bytes_that_are_no_text_go_back_as_they_were(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"a\xffb".decode(errors="surrogateescape"))
    assert (tmp_path / "file").read_bytes() == b"a\xffb"


def test_a_new_folder_lasts_with_its_parents(tmp_path: Path, synced: Synced) -> None:
    make_folder(tmp_path / "a/b/c")
    assert synced.names == {tmp_path: {"a"}, tmp_path / "a": {"b"}, tmp_path / "a/b": {"c"}}


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local.os, "fsync", sync)
    if passes:
        write_atomically(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == "text"
    else:
        with pytest.raises(OSError, match="Input/output error"):
            write_atomically(tmp_path / "file", "text")


NOT_ATOMIC = {"write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", "copyfile", "dump"}
ALLOWED = {
    ("trinity/io/remote_path.py", "write_bytes"), ("trinity/checkpoint/checkpoint.py", "write_bytes"),
    ("trinity/checkpoint/file_systems.py", "write_bytes"), ("trinity/monitor/heartbeat.py", "write_bytes"),
}  # fmt: skip
"""An object store's put, and NCCL's record in the last second of a process that hangs."""


@pytest.mark.parametrize("name", ["trinity", "tools", "launch"])
def test_there_is_no_other_writer(name: str) -> None:
    """No call elsewhere renames a file, writes one in place, or makes JSON that may hold NaN."""
    found = set()
    for path in (ROOT / name).rglob("*.py"):
        where = str(path.relative_to(ROOT))
        if where.startswith("trinity/io/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                renames = of == "os" and node.func.attr in ("replace", "rename", "fsync")
                if renames or node.func.attr in NOT_ATOMIC or (of == "json" and node.func.attr == "dumps"):
                    found.add((where, node.func.attr))
    assert found <= ALLOWED


def test_json_that_every_parser_reads(tmp_path: Path) -> None:
    """null for what is not finite, at any depth; the rest to the last bit; old files with NaN are read."""
    from trinity.io.json_files import read_json, to_json

    value = {"a": float("nan"), "b": [1e-300, (float("inf"), -float("inf"))], "c": {"d": 0.1}, "e": None, "f": True}
    expected = {"a": None, "b": [1e-300, [None, None]], "c": {"d": 0.1}, "e": None, "f": True}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected
    (tmp_path / "old.json").write_text('{"a": NaN, "b": Infinity}')
    old = read_json(tmp_path / "old.json")
    assert old["a"] != old["a"]
    assert old["b"] == float("inf")


def test_every_log_is_json(tmp_path: Path) -> None:
    """What a run writes of a step whose loss is not finite, read by a parser that knows no NaN."""
    from trinity.monitor.events import Events

    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr_muon": 0.1})
    log.close()
    Events(tmp_path, 0, 1).note("evaluation", "a sentence", loss=-float("inf"), layers=[float("nan"), 1.5])
    RunDirectory(tmp_path / "run").set_status("stopped", 3, 1, "NaN")
    read = [json.loads(path.read_text(), parse_constant=pytest.fail) for path in sorted(tmp_path.rglob("*.json*"))]
    (event, record, status) = read
    assert record == {"step": 1, "loss": None, "grad_norm": None, "lr_muon": 0.1}
    assert (event["loss"], event["layers"]) == (None, [None, 1.5])
    assert status["reason"] == "NaN"


def test_numbers_come_back() -> None:
    from trinity.io.json_files import number, to_json

    values = [1.5, float("nan"), -float("inf"), 2]
    back = [number(value) for value in json.loads(to_json(values))]
    assert [back[0], back[3]] == [1.5, 2]
    assert back[1] != back[1]
    assert back[2] != back[2]
