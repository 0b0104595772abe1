"""Every file that a run or a tool writes is written atomically: file and folder fsynced, with the umask's mode."""

import ast
import errno
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
from trinity.errors import UserError, explain
from trinity.interop import export_hf
from trinity.io import local
from trinity.io.json_files import append_json_line, write_json
from trinity.io.local import (
    atomic_path,
    copy_atomically,
    make_folder,
    resolve_path,
    temporary_path,
    write_atomically,
)
from trinity.models import ModelConfig, Trinity
from trinity.monitor.loggers import JsonLines, _wandb_id
from trinity.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    vocab_size=512, width=8, layers=1, dense_layers=1, dense_width=8, heads=1, kv_heads=1, head_dim=8, window=4,
    max_positions=8,
)  # fmt: skip


class SyncRecorder:
    """Records calls of os.fsync: files, and folders with the names that were in them then."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.names: dict[Path, set[str]] = {}

    def __call__(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.names[path] = set(os.listdir(path))
        else:
            self.files.append(path)

    def is_durable(self, path: Path) -> bool:
        """Whether a file's content was synced under its temporary name, and then its name in the folder."""
        path = path.resolve()
        return temporary_path(path) in self.files and path.name in self.names.get(path.parent, ())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> SyncRecorder:
    """The os.fsync calls during a test."""
    calls = SyncRecorder()
    monkeypatch.setattr(os, "fsync", calls)
    return calls


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
def test_content_and_name_are_synced(
    write: Callable, tmp_path: Path, corpus: SimpleNamespace, synced: SyncRecorder
) -> None:
    files = write(tmp_path, corpus)
    assert [path.name for path in files if not synced.is_durable(path)] == []
    assert not list(tmp_path.rglob("*.tmp"))


def small_model() -> Trinity:
    model = Trinity(SMALL)
    model.init_weights(0)
    return model


def test_export_is_synced(tmp_path: Path, corpus: SimpleNamespace, synced: SyncRecorder) -> None:
    """Its files, the partial folder that holds them, and the name that this folder is renamed to."""
    folder = export_hf(small_model(), tmp_path / "hf", corpus.tokenizer, torch.float32, max_shard_bytes=10_000)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    partial = tmp_path / ".hf.partial"
    assert {path.name for path in synced.files} == {f"{name}.tmp" for name in names}
    assert synced.names[partial] == names
    assert synced.names[tmp_path] == {"hf"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_umask_gives_the_mode(tmp_path: Path, corpus: SimpleNamespace, umask: int) -> None:
    """For every writer's files, a copy of a private file, and a file of safetensors, which sets mode 600."""
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
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    """Only the old file is left, and the error names the target, not the temporary file."""
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


def test_surrogateescape_round_trip(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"a\xffb".decode(errors="surrogateescape"))
    assert (tmp_path / "file").read_bytes() == b"a\xffb"


def test_make_folder_syncs_all_parents(tmp_path: Path, synced: SyncRecorder) -> None:
    make_folder(tmp_path / "a/b/c")
    assert synced.names == {tmp_path: {"a"}, tmp_path / "a": {"b"}, tmp_path / "a/b": {"c"}}


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_file_system_without_folder_fsync(
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
def test_no_other_module_writes_files(name: str) -> None:
    """No call outside of trinity/io renames a file, writes one in place, or makes JSON that may hold NaN."""
    writes = set()
    for path in (ROOT / name).rglob("*.py"):
        where = str(path.relative_to(ROOT))
        if where.startswith("trinity/io/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                renames = of == "os" and node.func.attr in ("replace", "rename", "fsync")
                if renames or node.func.attr in NOT_ATOMIC or (of == "json" and node.func.attr == "dumps"):
                    writes.add((where, node.func.attr))
    assert writes <= ALLOWED


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    """Directly, through another, or above the path; every other path is what the operating system says."""
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "here").symlink_to("there")
    (tmp_path / "there").symlink_to("here")
    for place in ("self", "here", "self/out", "here/../there/x.html"):
        with pytest.raises(UserError, match="a symbolic link that leads to itself; remove the link"):
            resolve_path(tmp_path / place)
        with pytest.raises(OSError) as refused:
            make_folder(tmp_path / place)
        assert explain(refused.value) is not None
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("folder/new")
    for place in ("link", "link/new/file", "dangling", "none/../folder"):
        assert resolve_path(tmp_path / place) == Path(os.path.realpath(tmp_path / place))
