"""Run directories in which something lies: refused by a resume and by tools, or, beside a checkpoint, passed over."""

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
from trinity.monitor.loggers import JsonLines
from trinity.training.load_run import load_model

STEPS = (3, 6)
MEASURED = {"step_seconds", "data_seconds", "goodput", "checkpoint_seconds", "tokens_per_second", "memory_gib", "mfu"}


def folder(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def seal(run: Path, step: int) -> None:
    """Make COMPLETE agree with the files as they are now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in folder(run, step).iterdir()
        if path.name != "COMPLETE"
    }
    (folder(run, step) / "COMPLETE").write_text(json.dumps({"files": files}))


def both_refuse(run: Path, resumed: dict, gains: set[str] = REFUSED_START) -> str:
    """The sentence of a tool that loads the model, which a resume says too."""
    sentence = refusal(lambda: load_model(run), run)
    assert refusal(lambda: train(resumed), run, gains=gains) == sentence
    assert str(run) in sentence
    return sentence


COMPLETES = [
    "", "[]", "null", "{}", '{"files": 5}', '{"files": {}}', '{"files": {"a": {}}}', "\0", "[" * 10**5,
    '{"files": {"../../x": {"bytes": 1, "crc32": "0"}}}', '{"files": {".metadata": {"bytes": null, "crc32": "0"}}}',
    '{"files": {".metadata": {"bytes": 1e999, "crc32": "0"}}}', '{"files": {".metadata": {"bytes": -1, "crc32": "0"}}}',
    '{"files": {".metadata": {"bytes": %s, "crc32": "0"}}}' % ("9" * 5000),
    '{"files": {".metadata": {"bytes": 1}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", COMPLETES, ids=range(len(COMPLETES)))
def test_complete(run: Path, text: str) -> None:
    """Of both checkpoints: each is named. What a resume asks is the same function; the next test has one."""
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
    assert f"every checkpoint in {run} is damaged" in both_refuse(run, resumed, DAMAGE_FOUND)


def of_kind(kind: str, change: Callable[[TensorStorageMetadata], object]) -> Callable[[Metadata], object]:
    """Change the first tensor's description whose name begins so."""
    return lambda metadata: change(next(t for name, t in metadata.state_dict_metadata.items() if name.startswith(kind)))


def every_file(**values: object) -> Callable[[Metadata], object]:
    return lambda metadata: [info.__dict__.update(values) for info in metadata.storage_data.values()]


def shrink(tensor: TensorStorageMetadata) -> None:
    tensor.size = torch.Size([7])


def grow(tensor: TensorStorageMetadata) -> None:
    tensor.size = torch.Size([2**40, 2**10])


def without(kind: str) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[next(name for name in metadata.state_dict_metadata if name.startswith(kind))]

    return change


DESCRIPTIONS = {
    "a number": (lambda metadata: 5, "does not describe a checkpoint"),
    "a dictionary": (lambda metadata: {}, "does not describe a checkpoint"),
    "no files": (lambda metadata: setattr(metadata, "storage_data", None), "does not describe a checkpoint"),
    "no tensors": (lambda metadata: setattr(metadata, "state_dict_metadata", None), "does not describe a checkpoint"),
    "bytes": (lambda metadata: metadata.state_dict_metadata.update({"model.embed.weight": BytesStorageMetadata()}),
              "where all of model.embed.weight is stored"),
    "a tensor that is a number": (lambda metadata: metadata.state_dict_metadata.update({"model.embed.weight": 5}),
                                  "where all of model.embed.weight is stored"),
    "a tensor nowhere": (of_kind("model.embed", lambda t: t.chunks.clear()), "model.embed.weight is stored"),
    "a tensor twice": (of_kind("model.embed", lambda t: t.chunks.extend(t.chunks)), "model.embed.weight is stored"),
    "a smaller tensor": (of_kind("model.embed", shrink), "where all of model.embed.weight is stored"),
    "an enormous tensor": (of_kind("model.embed", grow), "where all of model.embed.weight is stored"),
    "enormous data": (of_kind("data.k", grow), "where all of data.k is stored"),
    "a tensor less": (without("model."), "Missing key in checkpoint state_dict: model.embed.weight"),
    "a place less": (lambda metadata: metadata.storage_data.pop(
                         MetadataIndex("model.embed.weight", torch.Size([0, 0]), 0)),
                     "does not fit this run's config: KeyError: MetadataIndex(fqn='model.embed.weight'"),
    "a file elsewhere": (every_file(relative_path="../../../nowhere"), "No such file or directory"),
    "a file without name": (every_file(relative_path=5), "does not fit this run's config: TypeError"),
    "beyond the file's end": (every_file(offset=10**9), "step_00000006 "),
    "cut": (every_file(length=3), "step_00000006 "),
    "before its beginning": (every_file(offset=-5), "step_00000006 "),
    "no place": (every_file(offset=None), "step_0000"),
}  # fmt: skip


def describe(run: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite .metadata of both checkpoints, and what COMPLETE says of it: who lies may compute a checksum too."""
    for step in STEPS:
        path = folder(run, step) / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        replacement = change(metadata)
        path.write_bytes(pickle.dumps(replacement if isinstance(replacement, int | dict) else metadata))
        seal(run, step)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_metadata(run: Path, resumed: dict, name: str, little_memory: None) -> None:
    """What the library would meet with a traceback, with all of the memory, or by leaving weights as they were."""
    change, expected = DESCRIPTIONS[name]
    describe(run, change)
    sentence = both_refuse(run, resumed)
    assert expected in sentence
    assert "step_00000006" in sentence
    assert 'File "' not in sentence


@pytest.mark.parametrize("kind", ["optim.", "data.k", "data.jumped", "data.stream", "run.step", "run.random", "run.sp"])
def test_state_that_is_missing(run: Path, resumed: dict, kind: str) -> None:
    """What a tool does not read and a resume cannot do without."""
    describe(run, without(kind))
    sentence = refusal(lambda: train(resumed), run, gains=REFUSED_START)
    assert f"Missing key in checkpoint state_dict: {kind}" in sentence or "the saved data state has no " in sentence


@pytest.mark.parametrize("content", [b"", b"x" * 999, b"\x80\x02.", b"PK\x03\x04"])
def test_tensors(run: Path, resumed: dict, content: bytes) -> None:
    for step in STEPS:
        (folder(run, step) / "__0_0.distcp").write_bytes(content)
        seal(run, step)
    sentence = both_refuse(run, resumed)
    assert f"{folder(run, 6)} " in sentence
    assert "weights_only" not in sentence  # the library's advice is to trust the file


@pytest.mark.parametrize("name", ["config.yaml", "config.5.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"[1", b"5", b"run: {stepz: 1}", b"\0", b"\xff\xfe", b"run: {steps: w}", None]
)
def test_configs(run: Path, resumed: dict, name: str, content: bytes | None) -> None:
    """The newest config is broken, or a folder: never taken for another, nor written over."""
    (run / name).unlink(missing_ok=True)
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    for sentence in (refusal(lambda: load_model(run), run), refusal(lambda: train(resumed), run, gains=REFUSED_START)):
        assert name in sentence or "run.steps or run.tokens" in sentence


def test_another_runs_config(run: Path, resumed: dict) -> None:
    """config.yaml is whole and of other sizes: the tool and the resume each say so in their way."""
    (run / "config.yaml").write_text("run: {steps: 1}")
    assert "Size mismatch between saved" in refusal(lambda: load_model(run), run)
    assert "model.width was 256 and is 32" in refusal(lambda: train(resumed), run, gains=REFUSED_START)


def become_folder(path: Path) -> None:
    if path.is_file():
        path.unlink()
    path.mkdir()


def become_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine")


PLACES = {
    "STOP": (become_folder, set()), "lock": (become_folder, set()), "checkpoints": (become_file, set()),
    "metrics.jsonl": (become_folder, REFUSED_START | {"config.1.yaml"}),
    "router.jsonl": (become_folder, REFUSED_START | {"config.1.yaml"}),
    "events.jsonl": (become_folder, REFUSED_START | {"config.1.yaml"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_or_a_file_in_the_way(run: Path, resumed: dict, name: str) -> None:
    harm, gains = PLACES[name]
    harm(run / name)
    sentence = refusal(lambda: train(resumed, "run.steps=7"), run, gains=gains)
    assert str(run if name == "lock" else run / name) in sentence


def test_no_run_directory(run: Path, resumed: dict, tmp_path: Path) -> None:
    become_file(run)
    assert f"{run} is not a run directory" in refusal(lambda: load_model(run), tmp_path)
    assert f"the run directory {run} cannot be written" in refusal(lambda: train(resumed), tmp_path)
    assert "is not a run directory" in refusal(lambda: load_model(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("text", ["because", "", "\n\n", "two\nlines"])
def test_stop(run: Path, resumed: dict, text: str) -> None:
    (run / "STOP").write_text(text)
    assert f"{run / 'STOP'} says: " in refusal(lambda: train(resumed), run)


ODD = ["step_", "step_x", "step_²", "step_-1", "step_٣", "step_9999999999999999999999", "step_1.5", "step_7", "Step_9"]
SLOW = [b"", b"nonsense\n", b"[]\n5\nnull\n"]
NONSENSE = [b"", b"nonsense\n", b"\xff\xfe\n", b"[]\n5\nnull\n", b'{"step": "x"}\n', b"[" * 20000 + b"\n"]


def figures(run: Path) -> dict:
    """The last record of metrics.jsonl, without what is measured."""
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in record.items() if key not in MEASURED}


@pytest.fixture(scope="module")
def seventh(finished: Path, recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The record of step 7 of the run that was left alone."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("seventh") / "run")
    assert train(settings_of(run, recipe), "run.steps=7") == 0
    return figures(run)


def settings_of(run: Path, recipe: Callable) -> dict:
    settings = recipe(run) | {"evaluation": {"every": 0}, "checkpoint": {"every": 0}}
    settings["data"]["workers"] = 0
    return settings


@pytest.mark.parametrize("nonsense", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NONSENSE])
def test_what_stops_no_resume(run: Path, resumed: dict, seventh: dict, nonsense: bytes) -> None:
    """Files that people and reports read, and folders that are no checkpoints: the next step is what it would be.

    Lines that are not of the run so far are kept aside, to the byte.
    """
    names = ["status.json", "metrics.jsonl", "router.jsonl", "events.jsonl", "samples.jsonl", "checkpoints/latest"]
    for name in names:
        (run / name).write_bytes(nonsense)
    for name in ODD:
        (run / "checkpoints" / name).mkdir()
    (run / "SAVE").mkdir()
    (run / "config.x.yaml").write_bytes(nonsense)
    assert train(resumed, "run.steps=7") == 0
    assert figures(run) == seventh
    for name in ("metrics", "router", "samples"):
        aside = run / f"{name}.tail.1.jsonl"
        assert (aside.read_bytes() if aside.exists() else b"") == nonsense
    assert (run / "events.jsonl").read_bytes().startswith(nonsense)
    assert all((run / "checkpoints" / name).is_dir() for name in ODD[1:])


def test_bytes_that_are_no_text_stay_in_kept_lines(tmp_path: Path) -> None:
    """A record before the checkpoint that somebody's byte has got into: cut back after it, byte for byte."""
    path, kept = tmp_path / "metrics.jsonl", b'{"step": 1, "name": "\xff"}\n'
    path.write_bytes(kept + b'{"step": 9}\n')
    JsonLines(path, 3).close()
    assert path.read_bytes() == kept
    assert (tmp_path / "metrics.tail.1.jsonl").read_bytes() == b'{"step": 9}\n'
