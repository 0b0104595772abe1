"""Malformed run directories: a resume and the tools refuse damaged checkpoints and configs, and ignore other files."""

import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from tests.malformed.refusals import DAMAGE_FOUND, REFUSED_START, refusal, train
from tests.training.run_files import MEASURED
from trinity.monitor.loggers import JsonLines
from trinity.training.load_run import load_model

STEPS = (3, 6)


def folder(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def update_complete(run: Path, step: int) -> None:
    """Rewrite COMPLETE with the present sizes and checksums of the files."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in folder(run, step).iterdir()
        if path.name != "COMPLETE"
    }
    (folder(run, step) / "COMPLETE").write_text(json.dumps({"files": files}))


def refusal_of_tool_and_resume(run: Path, resumed: dict, may_change: set[str] = REFUSED_START) -> str:
    """The error message of a tool that loads the model; a resume must fail with the same message."""
    sentence = refusal(lambda: load_model(run), run)
    assert refusal(lambda: train(resumed), run, may_change=may_change) == sentence
    assert str(run) in sentence
    return sentence


MALFORMED_COMPLETE = [
    "", "[]", "null", "{}", '{"files": 5}', '{"files": {}}', '{"files": {"a": {}}}', "\0", "[" * 10**5,
    '{"files": {"../../x": {"bytes": 1, "crc32": "0"}}}', '{"files": {".metadata": {"bytes": null, "crc32": "0"}}}',
    '{"files": {".metadata": {"bytes": 1e999, "crc32": "0"}}}', '{"files": {".metadata": {"bytes": -1, "crc32": "0"}}}',
    '{"files": {".metadata": {"bytes": %s, "crc32": "0"}}}' % ("9" * 5000),
    '{"files": {".metadata": {"bytes": 1}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED_COMPLETE, ids=range(len(MALFORMED_COMPLETE)))
def test_malformed_complete(run: Path, text: str) -> None:
    """Both checkpoints are named if their COMPLETE is malformed. A resume calls the same function (next test)."""
    for step in STEPS:
        (folder(run, step) / "COMPLETE").write_text(text)
    sentence = refusal(lambda: load_model(run), run)
    assert sentence.startswith(f"every checkpoint in {run} is damaged: step_00000006 (")
    assert ", step_00000003 (" in sentence


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "COMPLETE"])
def test_a_folder_in_place_of_a_file(run: Path, resumed: dict, name: str) -> None:
    for step in STEPS:
        (folder(run, step) / name).unlink()
        (folder(run, step) / name).mkdir()
    assert f"every checkpoint in {run} is damaged" in refusal_of_tool_and_resume(run, resumed, DAMAGE_FOUND)


def with_tensor(kind: str, change: Callable[[TensorStorageMetadata], object]) -> Callable[[Metadata], object]:
    """A change of the metadata of the first tensor whose name begins with `kind`."""
    return lambda metadata: change(next(t for name, t in metadata.state_dict_metadata.items() if name.startswith(kind)))


def with_files(**values: object) -> Callable[[Metadata], object]:
    return lambda metadata: [info.__dict__.update(values) for info in metadata.storage_data.values()]


def shrink(tensor: TensorStorageMetadata) -> None:
    tensor.size = torch.Size([7])


def grow(tensor: TensorStorageMetadata) -> None:
    tensor.size = torch.Size([2**40, 2**10])


def remove_tensor(kind: str) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[next(name for name in metadata.state_dict_metadata if name.startswith(kind))]

    return change


MALFORMED_METADATA = {
    "a number": (lambda metadata: 5, "does not describe a checkpoint"),
    "a dictionary": (lambda metadata: {}, "does not describe a checkpoint"),
    "no files": (lambda metadata: setattr(metadata, "storage_data", None), "does not describe a checkpoint"),
    "no tensors": (lambda metadata: setattr(metadata, "state_dict_metadata", None), "does not describe a checkpoint"),
    "bytes": (lambda metadata: metadata.state_dict_metadata.update({"model.embed.weight": BytesStorageMetadata()}),
              "where all of model.embed.weight is stored"),
    "a tensor that is a number": (lambda metadata: metadata.state_dict_metadata.update({"model.embed.weight": 5}),
                                  "where all of model.embed.weight is stored"),
    "a tensor without chunks": (with_tensor("model.embed", lambda t: t.chunks.clear()), "model.embed.weight is stored"),
    "a tensor twice": (with_tensor("model.embed", lambda t: t.chunks.extend(t.chunks)), "model.embed.weight is stored"),
    "a smaller tensor": (with_tensor("model.embed", shrink), "where all of model.embed.weight is stored"),
    "an enormous tensor": (with_tensor("model.embed", grow), "where all of model.embed.weight is stored"),
    "enormous data": (with_tensor("data.k", grow), "where all of data.k is stored"),
    "a missing tensor": (remove_tensor("model."), "Missing key in checkpoint state_dict: model.embed.weight"),
    "a missing storage entry": (lambda metadata: metadata.storage_data.pop(
                         MetadataIndex("model.embed.weight", torch.Size([0, 0]), 0)),
                     "does not fit this run's config: KeyError: MetadataIndex(fqn='model.embed.weight'"),
    "a path out of the folder": (with_files(relative_path="../../../nowhere"), "No such file or directory"),
    "a file without a name": (with_files(relative_path=5), "does not fit this run's config: TypeError"),
    "beyond the end of the file": (with_files(offset=10**9), "step_00000006 "),
    "too short": (with_files(length=3), "step_00000006 "),
    "a negative offset": (with_files(offset=-5), "step_00000006 "),
    "no offset": (with_files(offset=None), "step_0000"),
}  # fmt: skip


def rewrite_metadata(run: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite .metadata of both checkpoints, and its checksum in COMPLETE, as an attacker could."""
    for step in STEPS:
        path = folder(run, step) / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        replacement = change(metadata)
        path.write_bytes(pickle.dumps(replacement if isinstance(replacement, int | dict) else metadata))
        update_complete(run, step)


@pytest.mark.parametrize("name", MALFORMED_METADATA)
def test_malformed_metadata(run: Path, resumed: dict, name: str, limited_memory: None) -> None:
    """Metadata with which the library would raise a traceback, exhaust memory, or leave weights unset."""
    change, expected = MALFORMED_METADATA[name]
    rewrite_metadata(run, change)
    sentence = refusal_of_tool_and_resume(run, resumed)
    assert expected in sentence
    assert "step_00000006" in sentence
    assert 'File "' not in sentence


@pytest.mark.parametrize("kind", ["optim.", "data.k", "data.jumped", "data.stream", "run.step", "run.random", "run.sp"])
def test_missing_state(run: Path, resumed: dict, kind: str) -> None:
    """Tensors that no tool reads but a resume needs."""
    rewrite_metadata(run, remove_tensor(kind))
    sentence = refusal(lambda: train(resumed), run, may_change=REFUSED_START)
    assert f"Missing key in checkpoint state_dict: {kind}" in sentence or "the saved data state has no " in sentence


@pytest.mark.parametrize("content", [b"", b"x" * 999, b"\x80\x02.", b"PK\x03\x04"])
def test_malformed_tensor_files(run: Path, resumed: dict, content: bytes) -> None:
    for step in STEPS:
        (folder(run, step) / "__0_0.distcp").write_bytes(content)
        update_complete(run, step)
    sentence = refusal_of_tool_and_resume(run, resumed)
    assert f"{folder(run, 6)} " in sentence
    assert "weights_only" not in sentence  # the library's advice is to trust the file


@pytest.mark.parametrize("name", ["config.yaml", "config.5.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"[1", b"5", b"run: {stepz: 1}", b"\0", b"\xff\xfe", b"run: {steps: w}", None]
)
def test_malformed_configs(run: Path, resumed: dict, name: str, content: bytes | None) -> None:
    """The newest config is malformed or a folder: it is not ignored in favour of an older one, and not overwritten."""
    (run / name).unlink(missing_ok=True)
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    for sentence in (
        refusal(lambda: load_model(run), run),
        refusal(lambda: train(resumed), run, may_change=REFUSED_START),
    ):
        assert name in sentence or "run.steps or run.tokens" in sentence


def test_config_of_another_model(run: Path, resumed: dict) -> None:
    """config.yaml is valid but has other model sizes: the tool and the resume both refuse, with different messages."""
    (run / "config.yaml").write_text("run: {steps: 1}")
    assert "Size mismatch between saved" in refusal(lambda: load_model(run), run)
    assert "model.width was 256 and is 32" in refusal(lambda: train(resumed), run, may_change=REFUSED_START)


def replace_by_folder(path: Path) -> None:
    if path.is_file():
        path.unlink()
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine")


OBSTACLES = {
    "STOP": (replace_by_folder, set()), "lock": (replace_by_folder, set()), "checkpoints": (replace_by_file, set()),
    "metrics.jsonl": (replace_by_folder, REFUSED_START | {"config.1.yaml"}),
    "router.jsonl": (replace_by_folder, REFUSED_START | {"config.1.yaml"}),
    "events.jsonl": (replace_by_folder, REFUSED_START | {"config.1.yaml"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_folder_or_file_in_the_way(run: Path, resumed: dict, name: str) -> None:
    obstruct, may_change = OBSTACLES[name]
    obstruct(run / name)
    sentence = refusal(lambda: train(resumed, "run.steps=7"), run, may_change=may_change)
    assert str(run if name == "lock" else run / name) in sentence


def test_no_run_directory(run: Path, resumed: dict, tmp_path: Path) -> None:
    replace_by_file(run)
    assert f"{run} is not a run directory" in refusal(lambda: load_model(run), tmp_path)
    assert f"the run directory {run} cannot be written" in refusal(lambda: train(resumed), tmp_path)
    assert "is not a run directory" in refusal(lambda: load_model(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("text", ["because", "", "\n\n", "two\nlines"])
def test_stop(run: Path, resumed: dict, text: str) -> None:
    (run / "STOP").write_text(text)
    assert f"{run / 'STOP'} says: " in refusal(lambda: train(resumed), run)


ODD_FOLDERS = [
    "step_",
    "step_x",
    "step_²",
    "step_-1",
    "step_٣",
    "step_9999999999999999999999",
    "step_1.5",
    "step_7",
    "Step_9",
]
SLOW = [b"", b"nonsense\n", b"[]\n5\nnull\n"]
NONSENSE = [b"", b"nonsense\n", b"\xff\xfe\n", b"[]\n5\nnull\n", b'{"step": "x"}\n', b"[" * 20000 + b"\n"]


def last_metrics(run: Path) -> dict:
    """The last record of metrics.jsonl, without measurements."""
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in record.items() if key not in MEASURED}


@pytest.fixture(scope="module")
def metrics_of_step_7(finished: Path, recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The record of step 7 of a resume from the undamaged run directory."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("metrics_of_step_7") / "run")
    assert train(settings_of(run, recipe), "run.steps=7") == 0
    return last_metrics(run)


def settings_of(run: Path, recipe: Callable) -> dict:
    settings = recipe(run) | {"evaluation": {"every": 0}, "checkpoint": {"every": 0}}
    settings["data"]["workers"] = 0
    return settings


@pytest.mark.parametrize("nonsense", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NONSENSE])
def test_malformed_files_that_a_resume_ignores(
    run: Path, resumed: dict, metrics_of_step_7: dict, nonsense: bytes
) -> None:
    """Malformed logs and folders that are no checkpoints do not change the next step.

    Lines that do not belong to the run so far are moved to tail files, byte for byte.
    """
    names = ["status.json", "metrics.jsonl", "router.jsonl", "events.jsonl", "samples.jsonl", "checkpoints/latest"]
    for name in names:
        (run / name).write_bytes(nonsense)
    for name in ODD_FOLDERS:
        (run / "checkpoints" / name).mkdir()
    (run / "SAVE").mkdir()
    (run / "config.x.yaml").write_bytes(nonsense)
    assert train(resumed, "run.steps=7") == 0
    assert last_metrics(run) == metrics_of_step_7
    for name in ("metrics", "router", "samples"):
        aside = run / f"{name}.tail.1.jsonl"
        assert (aside.read_bytes() if aside.exists() else b"") == nonsense
    assert (run / "events.jsonl").read_bytes().startswith(nonsense)
    assert all((run / "checkpoints" / name).is_dir() for name in ODD_FOLDERS[1:])


def test_invalid_utf8_in_kept_lines(tmp_path: Path) -> None:
    """A record before the checkpoint that holds an invalid byte is kept unchanged; the lines after it are cut off."""
    path, kept = tmp_path / "metrics.jsonl", b'{"step": 1, "name": "\xff"}\n'
    path.write_bytes(kept + b'{"step": 9}\n')
    JsonLines(path, 3).close()
    assert path.read_bytes() == kept
    assert (tmp_path / "metrics.tail.1.jsonl").read_bytes() == b'{"step": 9}\n'
