"""A user's mistakes: one sentence on stderr, code 2 (1 for a full disk), and no existing file is lost."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.training.run_files import metrics, refuse, state, status, train
from trinity.config.load import OmegaConf, build_config
from trinity.data.tokenizer.train import train_from_files
from trinity.errors import UserError, explain

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["configs/none.yaml"], "error: the config configs/none.yaml does not exist"),
        (["configs/smoke.yaml", "run.stepz=3"], "run.stepz in the command line is not a known key; did you mean run.s"),
        (["configs/smoke.yaml", "run.steps=many"], "run.steps in the command line: 'many' is not a whole number"),
        (["configs/smoke.yaml", "model.heads=3"], "model.heads=3 is not a multiple of model.kv_heads=2; use model"),
        (["configs/smoke.yaml", "data.sequence_length=0"], "data.sequence_length=0 must be at least 1"),
        (["configs/smoke.yaml", "parallel.shard=4"], "does not make 1 process; use parallel.shard=1, or start 4 "),
        (["CONFIG", "run.dir=/proc/no", "run.steps=1"], "the run directory /proc/no cannot be written"),
        (["CONFIG", "data.train.code=nowhere", "run.dir=RUN"], "data.train.code=nowhere does not exist"),
    ],
)  # fmt: skip
def test_on_the_command_line(
    run_command: Callable, settings: dict, config_file: Callable, tmp_path: Path, words: list[str], expected: str
) -> None:
    """Through the program itself: one line, no traceback, code 2, and no directory of a run that cannot start."""
    for name, path in {"CONFIG": config_file(settings), "RUN": tmp_path / "run"}.items():
        words = [word.replace(name, str(path)) for word in words]
    result = run_command("launch/pretrain.py", *words)
    assert result.code == 2
    assert result.errors.count("\n") == 1
    assert result.errors.startswith("error: ")
    assert expected in result.errors
    assert not (tmp_path / "run").exists()


def test_another_tokenizer(settings: dict, corpus: SimpleNamespace, tmp_path: Path) -> None:
    """A tokenizer that the shards were not made with, and a vocabulary larger than the model's."""
    train_from_files([ROOT / "trinity/balancing.py"], 300, tmp_path / "other")
    changed = copy.deepcopy(settings)
    changed["data"]["tokenizer"] = str(tmp_path / "other")
    assert "was made with another tokenizer" in refuse(changed)
    sentence = refuse(settings, "model.vocab_size=256")
    assert "token ids up to 399 and model.vocab_size=256; use a vocabulary of at least 400" in sentence


def test_a_damaged_shard(settings: dict, corpus: SimpleNamespace, tmp_path: Path) -> None:
    """A truncated file is detected by its size, a changed one by its checksum; the message names it."""
    folder = tmp_path / "code"
    shutil.copytree(corpus.folder / "code", folder)
    settings["data"]["train"]["code"] = str(folder)
    shard = folder / "shard_00000.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert f"{shard} is cut short" in refuse(settings)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert f"{shard} has changed" in refuse(settings)


def test_batches_must_divide(settings: dict) -> None:
    """By hand: 7 sequences for 2 data ranks; the nearest that does is named, and it is accepted."""
    from trinity.training.divisibility import check_batches

    config = build_config([("test", OmegaConf.create(settings | {"batch": {"sequences": 7}}))])
    with pytest.raises(
        UserError, match=r"batch\.sequences=7 does not divide by 2 data ranks; use batch\.sequences=8, or start 1 "
    ):
        check_batches(config, 2)
    config.batch.sequences = 8
    check_batches(config, 2)


def test_a_run_of_another_config(settings: dict) -> None:
    """Fixed keys are refused and named, learning rates need --accept-change, the rest is free; the run stays whole."""
    run = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=3") == 0
    before, steps = state(run, 3), metrics(run)
    assert "model.window was 9 and is 5" in refuse(settings, "model.window=5")
    assert "--accept-change optim.muon.lr" in refuse(settings, "optim.muon.lr=0.5")
    assert status(run)["code"] == 2
    assert metrics(run) == steps
    for name, tensor in state(run, 3).items():
        assert torch.equal(tensor, before[name]), name
    assert train(settings, "optim.muon.lr=0.5", "log.every=5", "run.steps=4", accept=("optim.muon.lr",)) == 0
    assert metrics(run)[:3] == steps
    assert metrics(run)[3]["lr_muon"] == 0.5
    assert yaml.safe_load((run / "config.1.yaml").read_text())["optim"]["muon"]["lr"] == 0.5


def test_two_runs_in_one_directory(
    settings: dict, config_file: Callable, command: Callable, run_command: Callable
) -> None:
    """The second is refused while the first runs; a crash leaves no lock behind."""
    run, words = Path(settings["run"]["dir"]), ("launch/pretrain.py", config_file(settings))
    first = command(*words, "run.steps=100000")
    while not (run / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[1]
    second = run_command(*words)
    assert second.code == 2
    assert f"{run} is in use by another run (host " in second.errors
    first.kill()
    first.communicate()
    assert run_command(*words, "run.steps=4").code == 0


def test_too_many_bad_steps(settings: dict) -> None:
    """An infinite z makes every loss infinite: after three steps code 3 and STOP, honoured until it is removed."""
    settings["health"] = {"bad_steps": 3}
    settings["loss"] = {"z": 1e300}
    run = Path(settings["run"]["dir"])
    assert train(settings) == 3
    assert [line["skipped"] for line in metrics(run)] == [True] * 3
    reason = "3 steps in a row had a loss or gradient that is not finite"
    assert status(run) == {"state": "stopped", "code": 3, "step": 3, "reason": reason}
    assert f"{run / 'STOP'} says: {reason}; remove that file" in refuse(settings)
    (run / "STOP").unlink()
    assert train(settings, "loss.z=0", "run.steps=2") == 0


def test_a_restarting_launcher_stops(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that restarts by itself must not repeat a mistake: STOP is written for it."""
    settings["data"]["train"]["code"] = "nowhere"
    run = Path(settings["run"]["dir"])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    refuse(settings)
    assert "data.train.code=nowhere does not exist" in (run / "STOP").read_text()
    assert status(run)["code"] == 2


def test_a_save_request(settings: dict, config_file: Callable, command: Callable) -> None:
    """touch SAVE: the next step saves a checkpoint and removes SAVE, and the run continues."""
    settings["checkpoint"] = {"every": 0}
    run = Path(settings["run"]["dir"])
    process = command("launch/pretrain.py", config_file(settings), "run.steps=100000")
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
    (run / "SAVE").touch()
    while not list(run.glob("checkpoints/step_*/COMPLETE")):
        assert process.poll() is None, process.communicate()[1]
    saved, steps = list(run.glob("checkpoints/step_*")), len(metrics(run))
    while len(metrics(run)) < steps + 2:
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert len(saved) == 1
    assert not (run / "SAVE").exists()


def test_incomplete_checkpoints_do_not_count(settings: dict, capsys: pytest.CaptureFixture) -> None:
    """COMPLETE missing, or a file cut short: the one before is used."""
    run = Path(settings["run"]["dir"])
    settings["checkpoint"] = {"every": 1, "keep": 4}
    assert train(settings, "run.steps=4") == 0
    (run / "checkpoints/step_00000004/COMPLETE").unlink()
    data = next((run / "checkpoints/step_00000003").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert train(settings, "run.steps=5") == 0
    assert "resuming after step 2" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert len(list(run.glob("checkpoints/step_*/COMPLETE"))) == 4


def test_a_full_disk(settings: dict, config_file: Callable, run_command: Callable, tmp_path: Path) -> None:
    """On a file system too small for a second checkpoint: code 1, a sentence, and the first checkpoint stays whole."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        settings["run"]["dir"] = str(small / "run")
        settings["checkpoint"] = {"every": 1, "keep": 9}
        words = ("launch/pretrain.py", config_file(settings))
        result = run_command(*words, "run.steps=40")
        assert result.code == 1, result.errors
        assert result.errors.splitlines()[-1].startswith("error: the disk is full")
        assert "Traceback" not in result.errors
        whole = sorted(small.glob("run/checkpoints/*/COMPLETE"))
        assert whole
        newest = int(whole[-1].parent.name.removeprefix("step_"))
        assert int(state(small / "run", newest)["run.step"]) == newest
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_system_errors_are_explained() -> None:
    """A full disk: 1; an unwritable or missing file: 2; an internal error is not explained away."""
    full = OSError(28, "No space left on device", "x.bin")
    assert explain(full) == (1, "the disk is full while writing x.bin; free some space and run the same command again")
    assert explain(PermissionError(13, "Permission denied", "y"))[0] == 2
    assert explain(FileNotFoundError(2, "No such file or directory", "z"))[0] == 2
    assert explain(ValueError("a bug")) is None
    assert explain(KeyError("a bug")) is None


def test_dry_run(run_command: Callable) -> None:
    """Large, in seconds: the resolved config and the exact count, on one process and with nothing written."""
    result = run_command("launch/pretrain.py", "configs/large.yaml", "--dry-run")
    assert result.code == 0, result.errors
    assert "398,635,286,016" in result.output
    assert yaml.safe_load(result.output.split("\n\n")[0])["batch"]["ramp"] == [
        {"tokens": 4900000000000, "sequences": 16384}
    ]
    assert not (ROOT / "runs/large").exists()


def test_show_batch_is_what_the_run_read(settings: dict, config_file: Callable, run_command: Callable) -> None:
    """The replayed batch of a step has the pieces that iterating to it gives."""
    from trinity.training.build_data import open_stream

    path = config_file(settings)
    result = run_command("tools/show_batch.py", path, "--step", 3)
    assert result.code == 0, result.errors
    stream = open_stream(build_config([("test", OmegaConf.create(settings))]), 0, 1)
    stream.take(12)
    pieces = [piece for row in stream.take(6).pieces for piece in row]
    titles = [line for line in result.output.splitlines() if line.startswith("--- ")]
    assert titles == [
        f"--- {p.source}: document {p.document}, tokens {p.start} to {p.start + p.length}" for p in pieces
    ]


def test_show_batch_starts_from_the_nearest_checkpoint(settings: dict, config_file: Callable) -> None:
    """The nearest one before the step; a checkpoint of a run on other data is ignored."""
    from trinity.training.build_data import open_stream, seek_near

    assert train(settings, "run.steps=7", "checkpoint.keep=9") == 0  # 6 sequences a step, from the fifth on 12
    for step, k in ((0, 0), (2, 0), (3, 18), (5, 18), (6, 48), (7, 60)):
        config = build_config([("test", OmegaConf.create(settings))])
        stream, replayed = (open_stream(config, 0, 1) for _ in range(2))
        seek_near(stream, config, step)
        assert stream.k == k
        assert stream.batch(step).pieces == replayed.batch(step).pieces
    settings["data"]["mixture"] = {"code": 5, "prose": 1}
    config = build_config([("test", OmegaConf.create(settings))])
    stream = open_stream(config, 0, 1)
    seek_near(stream, config, 6)
    assert stream.k == 0


def test_metrics_have_their_fields(settings: dict) -> None:
    """Every field of the contract that applies to one CPU process."""
    assert train(settings, "log.tensorboard=true") == 0
    run = Path(settings["run"]["dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    always = {
        "step", "tokens", "sequences", "loss", "z_loss", "sequence_loss", "batch_het", "grad_norm", "lr_muon",
        "lr_adamw", "step_seconds", "data_seconds", "tokens_per_second", "memory_gib", "max_violation",
        "max_violation_mean", "source_tokens.code", "source_tokens.prose", "epoch.code", "epoch.prose", "dead_experts",
        "router_entropy", "bias_range", "max_head_logit", "skipped",
    }  # fmt: skip
    assert all(always <= line.keys() for line in lines)
    assert {line["step"] for line in lines if "validation_loss.held_out" in line} == {4, 8}
    # 6 sequences of 24 until a step begins with at least 500 tokens seen, then 12
    assert [line["tokens"] for line in lines] == [144, 288, 432, 576, 864, 1152, 1440, 1728]
    assert list(run.glob("tensorboard/events.*"))


def test_a_mistake_during_the_run_is_in_the_status(settings: dict) -> None:
    """An export onto a foreign folder: refused, the folder unchanged, and status.json does not say running."""
    run = Path(settings["run"]["dir"])
    foreign_file = run / "hf/step_00000002/notes.txt"
    foreign_file.parent.mkdir(parents=True)
    foreign_file.write_text("mine")
    assert "is not an earlier export" in refuse(settings, "export.every=2")
    assert (status(run)["state"], status(run)["code"], status(run)["step"]) == ("stopped", 2, 2)
    assert foreign_file.read_text() == "mine"
