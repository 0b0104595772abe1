"""checkpoint.url: a run with remote checkpoints equals one with local ones, and a failing store loses no checkpoint."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed as dist

from tests.training.run_files import checkpoint_bytes, metrics, refuse, status, train
from tests.url_stores import failing, register
from trinity.checkpoint import save as saver
from trinity.checkpoint.checkpoint import Checkpoint
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.checkpoint.save import save
from trinity.config.load import OmegaConf, build_config
from trinity.errors import Failure, UserError
from trinity.monitor.loss_spikes import SpikeDetector
from trinity.training.build_data import open_stream, seek_near

register()
URL = "memory://bucket/runs/one"
LAST = 8
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def remote_run(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run directory with checkpoints in fsspec's memory, stopped after step 4 and resumed."""
    run = tmp_path_factory.mktemp("one") / "run"
    fsspec.filesystem("memory").store.clear()
    for words in (["run.steps=4"], []):
        assert train(recipe(run), f"checkpoint.url={URL}/", *words) == 0
    yield run
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def files_below(url: str) -> list[str]:
    """Every file below a URL."""
    files, path = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return sorted(name.removeprefix(path).strip("/") for name in files.find(path))


def test_run_equals_one_with_local_checkpoints(remote_run: Path, uninterrupted: Path) -> None:
    """Stopped and resumed, it has the metrics and state of an uninterrupted local run; nothing is written locally."""
    checkpoints, expected = CheckpointDirectory.of_run(remote_run), CheckpointDirectory.at(uninterrupted)
    assert str(checkpoints) == URL
    assert metrics(remote_run) == metrics(uninterrupted)
    assert checkpoints.complete_steps() == expected.complete_steps() == [6, LAST]
    assert checkpoint_bytes(checkpoints.path_of(LAST)) == checkpoint_bytes(expected.path_of(LAST))
    assert not (remote_run / "checkpoints").exists()
    files = [f"step_{step:08d}/{name}" for step in (6, LAST) for name in (".metadata", "COMPLETE", "__0_0.distcp")]
    assert files_below(URL) == ["latest", *files]


def call(tool: str, *words: object) -> int:
    """Run a tool in this process, which holds fsspec's memory; returns its exit code."""
    with mock.patch.object(sys, "argv", [tool, *map(str, words)]), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    return ended.value.code


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tools(remote_run: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Given only the run directory: exports and generated text equal those of the local run, byte for byte."""
    for name, run in (("here", uninterrupted), ("there", remote_run)):
        for step in (6, LAST):
            assert call("export_hf.py", run, tmp_path / f"{name}{step}", "--step", step) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here6", "there6", "here8", "there8")]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    capfd.readouterr()
    texts = []
    for run in (uninterrupted, remote_run):
        assert call("generate.py", run, "--prompt", "def main", "--max-new-tokens", 12) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert call("export_hf.py", remote_run, tmp_path / "no", "--step", 3) == 2
    assert capfd.readouterr().err == f"error: {URL} has no complete checkpoint of step 3; it has [6, 8]\n"


def test_seek_near_reads_remote_checkpoints(remote_run: Path, recipe: Callable) -> None:
    """The data stream starts at the nearest checkpoint, also if the given config has no checkpoint.url."""
    config = build_config([("test", OmegaConf.create(recipe(remote_run)))])
    stream, begun = open_stream(config, 0, 1), open_stream(config, 0, 1)
    seek_near(stream, config, 7)
    assert stream.k == 48 == sum(config.batch.sequences * (2 if step > 4 else 1) for step in range(1, 7))
    assert stream.batch(7).pieces == begun.batch(7).pieces
    with failing_memory():
        seek_near(begun, config, 7)  # the store does not answer: replayed from the beginning
    assert begun.k == 0


def failing_memory() -> mock._patch:
    """fsspec's memory does not answer."""
    return mock.patch.object(fsspec.get_filesystem_class("memory"), "ls", side_effect=TimeoutError("no answer"))


def test_init_run_with_remote_checkpoints(
    remote_run: Path, uninterrupted: Path, recipe: Callable, tmp_path: Path
) -> None:
    """init.run names the run directory; with init.keep=all the steps equal those from a local run."""
    for name, run in (("here", uninterrupted), ("there", remote_run)):
        assert train(recipe(tmp_path / name), f"init.run={run}", "init.keep=all", "run.steps=10") == 0
    assert [line["step"] for line in metrics(tmp_path / "here")] == [9, 10]
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")


def test_rollback(recipe: Callable, tmp_path: Path) -> None:
    """A spike at step 5 rolls the run back to its checkpoint, local or remote, with the same metrics."""
    detect = SpikeDetector.detect
    for name, words in (("here", []), ("there", [f"checkpoint.url={URL}/back"])):
        losses: list[float] = []

        def fifth(spikes: SpikeDetector, loss: float, norm: float, losses: list[float] = losses) -> str | None:
            losses.append(loss)
            return "a spike" if len(losses) == 5 else detect(spikes, loss, norm)

        with mock.patch.object(SpikeDetector, "detect", fifth):
            assert train(recipe(tmp_path / name), "health.spike.action=rollback", *words) == 0
    assert [line["attempt"] for line in metrics(tmp_path / "here")] == [0] * 3 + [1] * 5
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")


def test_store_fails_during_a_write(
    settings: dict, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run ends with one sentence and code 1; the previous checkpoint is whole, and the same command resumes."""
    url, run = f"norename://{tmp_path}/store", Path(settings["run"]["dir"])
    left = [40]

    def fail(verb: str, path: str) -> Exception | None:
        if verb == "write" and path.endswith("step_00000006/__0_0.distcp"):
            left[0] -= 1
        return ConnectionError("no route to host") if left[0] <= 0 else None

    with failing(fail), pytest.raises(Failure) as failure:
        train(settings, f"checkpoint.url={url}")
    sentence = f"{url}/step_00000006/__0_0.distcp cannot be written (no route to host); run the same command again"
    assert str(failure.value) == f"{sentence} to continue"
    assert (status(run)["state"], status(run)["code"]) == ("stopped", 1)
    assert (tmp_path / "store/step_00000006/__0_0.distcp").stat().st_size > 0
    assert CheckpointDirectory.of_run(run).complete_steps() == [3]
    assert train(settings, f"checkpoint.url={url}") == 0
    assert "/step_00000006 has no COMPLETE, as a save that was cut off leaves it, and is not used" in (
        capsys.readouterr().err
    )
    assert metrics(run) == metrics(uninterrupted)
    checkpoints, expected = CheckpointDirectory.of_run(run), CheckpointDirectory.at(uninterrupted)
    assert checkpoint_bytes(checkpoints.path_of(LAST)) == checkpoint_bytes(expected.path_of(LAST))
    assert checkpoints.complete_steps() == [6, LAST]


def test_store_does_not_answer(settings: dict, tmp_path: Path) -> None:
    """A store that does not answer is not treated as empty: the start fails and changes nothing."""
    url, run = f"norename://{tmp_path}/store", Path(settings["run"]["dir"])
    words = [f"checkpoint.url={url}", "run.steps=2"]
    assert train(settings, *words) == 0
    before = (run / "metrics.jsonl").read_bytes(), files_below(url), list(run.glob("config*"))
    for verb in ("ls", "info", "open", "read"):
        silent = failing(lambda request, path, verb=verb: PermissionError("forbidden") if request == verb else None)
        with (
            silent,
            pytest.raises(Failure, match=r"cannot be read \(forbidden\); run the same command again to continue$"),
        ):
            train(settings, *words)
        assert ((run / "metrics.jsonl").read_bytes(), files_below(url), list(run.glob("config*"))) == before
        assert status(run)["code"] == 1
    assert train(settings, *words) == 0


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.arange(100.0) + step, "run.step": torch.tensor(step)}


def save_with_failure(checkpoints: CheckpointDirectory, at: int) -> tuple[int, str]:
    """Save step 9 while the store fails at request number `at`; return (requests, the save's error)."""
    requests, message = [0], ""

    def fail(verb: str, path: str) -> Exception | None:
        requests[0] += 1
        return ConnectionError("gone") if requests[0] == at else None

    with failing(fail):
        try:
            save(state_of(9), checkpoints, 9, keep=1)
        except Failure as failure:
            message = str(failure)
    return requests[0], message


def test_store_fails_at_any_request(tmp_path: Path, group: None) -> None:
    """Whichever request: save raises, the newest intact checkpoint loads as written, and later saves work."""
    store, prepared = tmp_path / "store", tmp_path / "prepared"
    checkpoints = CheckpointDirectory.at(tmp_path, f"norename://{store}")
    for step in (3, 6):
        save(state_of(step), checkpoints, step, keep=2)
    store.rename(prepared)
    at, requests, newest = 0, 0, []
    while at <= requests:
        shutil.copytree(prepared, store)
        fsspec.filesystem("norename").invalidate_cache()
        at += 1
        requests, message = save_with_failure(checkpoints, at)
        assert ("(gone); run the same command again to continue" in message) == (at <= requests), at
        step = checkpoints.newest_intact(lambda *_, **__: None)
        assert checkpoint_bytes(checkpoints.path_of(step)) == tensor_bytes(state_of(step)), at
        newest.append(step)
        save(state_of(10), checkpoints, 10, keep=1)
        assert checkpoints.complete_steps() == [10], at
        shutil.rmtree(store)
    assert newest == sorted(newest)
    assert {*newest} == {6, 9}
    assert newest.count(6) > 30
    assert newest.count(9) > 10  # among them each request of the deletions


def tensor_bytes(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_store_fails_during_a_load(tmp_path: Path, group: None) -> None:
    """An intact checkpoint that then cannot be read is not called damaged: the error names the store's reason."""
    checkpoints = CheckpointDirectory.at(tmp_path, f"norename://{tmp_path}/store")
    save(state_of(3), checkpoints, 3, keep=1)
    url = f"norename://{tmp_path}/store/step_00000003/__0_0.distcp"
    for verb in ("open", "read"):
        silent = failing(
            lambda request, path, verb=verb: TimeoutError("late") if request == verb and "__0" in path else None
        )
        state = empty_tensors(checkpoints.path_of(3), "")
        with silent, pytest.raises(Failure) as failure:
            load(state, checkpoints.path_of(3))
        assert str(failure.value) == f"{url} cannot be read (late); run the same command again to continue"


def test_order_of_requests(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMPLETE is written after all other files are closed; a deletion removes COMPLETE, then .metadata, then the rest.

    No local disk is synced: the library would call os.sync for a file without fsync.
    """
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("the whole machine was synced"))
    checkpoints, requests = CheckpointDirectory.at(tmp_path, f"norename://{tmp_path}/store"), []
    save(state_of(3), checkpoints, 3, keep=1)

    def note(verb: str, path: str) -> None:
        if verb in ("open", "close", "rm_file", "rm"):
            requests.append((verb, path.removeprefix(f"{tmp_path}/store/step_0000000")))

    with failing(note):
        save(state_of(6), checkpoints, 6, keep=1)
    changes = [(verb, path) for verb, path in requests if path[0] in "36"]
    complete = changes.index(("open", "6/COMPLETE"))
    for name in ("__0_0.distcp", ".metadata"):
        assert changes.index(("close", f"6/{name}")) < complete
    removed = [change for change in changes if change[1].startswith("3") and change[0].startswith("rm")]
    assert removed == [("rm_file", "3/COMPLETE"), ("rm_file", "3/.metadata"), ("rm", "3")]
    assert complete < changes.index(removed[0])


def test_store_loses_data(tmp_path: Path, group: None) -> None:
    """A store that reports success and keeps a shorter file: no COMPLETE."""
    checkpoints = CheckpointDirectory.at(tmp_path, f"norename://{tmp_path}/store")
    store = tmp_path / "store/step_00000003"

    def shorten(verb: str, path: str) -> None:
        if verb == "open" and path.endswith(".metadata") and (store / "__0_0.distcp").exists():
            (store / "__0_0.distcp").write_bytes(b"half")

    with failing(shorten), pytest.raises(Failure, match=r"is not there as it was \(__0_0.distcp has 4 bytes of \d+\)"):
        save(state_of(3), checkpoints, 3, keep=1)
    assert not (store / "COMPLETE").exists()


def test_local_url(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path or file:// is written like RUN_DIR/checkpoints, and the free space of its disk is checked."""
    written, folders = [], []
    mark_complete, usage = Checkpoint.mark_complete, saver.shutil.disk_usage

    def noted(checkpoint: Checkpoint, sums: dict) -> None:
        written.append(checkpoint.path)
        mark_complete(checkpoint, sums)

    monkeypatch.setattr(Checkpoint, "mark_complete", noted)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda folder: (folders.append(folder), usage(folder))[1])
    for url in (f"file://{tmp_path}/shelf", f"{tmp_path}/shelf"):
        assert train(settings, f"checkpoint.url={url}", f"run.steps={len(written) + 1}") == 0
    assert written == [tmp_path / "shelf" / f"step_{step:08d}" for step in (1, 2)]
    assert folders == [tmp_path / "shelf"]
    assert CheckpointDirectory.of_run(Path(settings["run"]["dir"])).complete_steps() == [1, 2]
    assert not (Path(settings["run"]["dir"]) / "checkpoints").exists()


def test_changed_url(settings: dict, tmp_path: Path) -> None:
    """A new URL without checkpoints, or with older ones, is refused; with a copy the run resumes there."""
    run, shelf = Path(settings["run"]["dir"]), tmp_path / "shelf"
    here, there = "checkpoint.url=null", f"checkpoint.url=norename://{shelf}"
    assert train(settings, "run.steps=1") == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert refuse(settings, there) == (
        f"the checkpoints of {run} are in {run}/checkpoints up to step 1, and in norename://{shelf} up to step 0; "
        "copy them there or give the old checkpoint.url back"
    )
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not shelf.exists()
    fsspec.filesystem("file").put(f"{run}/checkpoints", str(shelf), recursive=True)
    assert train(settings, there, "run.steps=2") == 0
    assert CheckpointDirectory.of_run(run).complete_steps() == [1, 2]
    sentence = refuse(settings, here)
    assert f"are in norename://{shelf} up to step 2, and in {run}/checkpoints up to step 1; copy" in sentence
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_url_of_another_run(remote_run: Path, settings: dict) -> None:
    """A run directory without a config neither resumes from the checkpoints at a URL nor overwrites them."""
    before, run = files_below(URL), Path(settings["run"]["dir"])
    unknown = f"holds checkpoints, and {run} has no config.yaml that says of which run; put that file back, or give"
    assert refuse(settings, f"checkpoint.url={URL}") == f"{URL} {unknown} another run.dir or checkpoint.url"
    assert files_below(URL) == before
    fsspec.filesystem("memory").get("/bucket/runs/one", str(run / "checkpoints"), recursive=True)
    assert refuse(settings) == f"{run / 'checkpoints'} {unknown} another run.dir or checkpoint.url"


def test_unsupported_urls(settings: dict) -> None:
    """Refused before the run directory is created."""
    fsspec.register_implementation(
        "lacking", "no_such_module.FileSystem", errtxt="install no_such_module", clobber=True
    )
    assert "needs a package that is not installed here" in refuse(settings, "checkpoint.url=lacking://bucket/run")
    sentence = refuse(settings, "checkpoint.url=nosuch://bucket/run")
    assert sentence.startswith("checkpoint.url: nosuch://bucket/run cannot be opened (")
    assert sentence.endswith("use a path or a protocol such as file, s3, gs, http, https, hf")
    assert not Path(settings["run"]["dir"]).exists()


def test_malicious_metadata(tmp_path: Path, group: None) -> None:
    """A remote .metadata goes through the same safe unpickler."""
    checkpoints = CheckpointDirectory.at(tmp_path, f"norename://{tmp_path}/store")
    save(state_of(3), checkpoints, 3, keep=1)
    path = tmp_path / "store/step_00000003/.metadata"
    path.write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")
    with pytest.raises(UserError, match=r"\.metadata names 'os.system', which no checkpoint needs"):
        empty_tensors(checkpoints.path_of(3), "")


def test_checkpoint_events(remote_run: Path) -> None:
    """One event per checkpoint, with the bytes in the store."""
    lines = [json.loads(line) for line in (remote_run / "events.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["kind"] == "checkpoint"]
    assert [line["step"] for line in events] == [3, 4, 6, LAST]
    files, path = fsspec.core.url_to_fs(f"{URL}/step_{LAST:08d}")
    assert events[-1]["bytes"] == files.du(path) - files.size(f"{path}/COMPLETE")
