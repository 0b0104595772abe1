"""A run that cannot start on this machine is refused before its directory is made; notes on settings are printed."""

import sys
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, refuse, state, status, train
from trinity.config import RunConfig
from trinity.config.run import RampEntryConfig
from trinity.errors import UserError
from trinity.monitor.loggers import JsonLines
from trinity.parallel import deep_ep
from trinity.training import prerequisites
from trinity.training.divisibility import microbatch_notes
from trinity.training.prerequisites import check_engines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

ABSENT = {
    "kernels.attention=flash4": "kernels.attention=flash4 needs the package flash-attn-4 and a CUDA device",
    "kernels.attention=flash2": "kernels.attention=flash2 needs the package flash-attn and a CUDA device",
    "kernels.attention=varlen": "kernels.attention=varlen needs a CUDA device in 16 bits, not cpu in torch.float32",
    "kernels.attention=flex": "kernels.attention=flex trains on an NVIDIA GPU only, not on cpu; use auto",
    "kernels.experts=megablocks": "kernels.experts=megablocks cannot be used: ",
    "kernels.experts=transformer_engine": "kernels.experts=transformer_engine cannot be used: ",
    "kernels.norms=triton": "kernels.norms=triton needs an NVIDIA GPU; use auto or reference",
    "log.wandb=p": 'log.wandb needs wandb; install it: pip install "trinity-moe[wandb]", or leave it out',
    "log.tensorboard=true": 'log.tensorboard needs tensorboard; install it: pip install "trinity-moe[tensorboard]"',
    "checkpoint.url=zz://x": "checkpoint.url: zz://x cannot be opened (",
    "data.train.code=zz://x": "data.train.code: zz://x cannot be opened (",
    "data.train.code=nowhere": "data.train.code=nowhere does not exist; ",
    "init.keep=optimizer": "init.keep=optimizer says what to load from another run, and init.run is not given; add ",
    "data.tokenizer=nowhere": "data.tokenizer=nowhere does not exist; ",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("word", ABSENT)
def test_no_directory_is_made(settings: dict, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for package in ("megablocks", "transformer_engine", "wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert refuse(settings, word).startswith(ABSENT[word])
    assert not Path(settings["run"]["dir"]).exists()


def test_a_refusal_in_an_existing_directory(settings: dict) -> None:
    """A refusal in an existing directory is in status.json, as under a restarting launcher (test_user_errors)."""
    run = Path(settings["run"]["dir"])
    run.mkdir()
    sentence = refuse(settings, "data.train.code=nowhere")
    assert (status(run)["code"], status(run)["reason"]) == (2, sentence)
    assert {path.name for path in run.iterdir()} == {"lock", "status.json"}


def test_deep_ep_and_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepEP where experts are split, in bf16 on a GPU with its package; FP8 with a package, by the model's widths."""
    config = RunConfig()
    config.parallel.exchange = "deep_ep"
    check_engines(config, CPU)  # nothing is exchanged
    config.parallel.expert = 2
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(UserError, match=r"^parallel\.exchange=deep_ep needs the package deep_ep"):
        check_engines(config, CUDA)
    monkeypatch.setattr(deep_ep, "find_spec", lambda name: name)
    check_engines(config, CUDA)
    with pytest.raises(UserError, match=r"^parallel\.exchange=deep_ep takes bfloat16 on a GPU, not torch\.bfloat16 on"):
        check_engines(config, CPU)
    config.parallel.exchange, config.precision.fp8 = "auto", "transformer_engine"
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(UserError, match=r"^precision\.fp8=transformer_engine needs transformer_engine\.pytorch"):
        check_engines(config, CPU)


def test_other_ranks_need_no_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 writes to them."""
    config = RunConfig()
    config.log.wandb = "p"
    monkeypatch.setitem(sys.modules, "wandb", None)
    ranks = type("Ranks", (), {"data_ranks": 1, "device": CPU, "is_first": False})
    prerequisites.check_prerequisites(config, ranks)
    ranks.is_first = True
    with pytest.raises(UserError, match=r"^log\.wandb needs wandb"):
        prerequisites.check_prerequisites(config, ranks)


def test_microbatches_that_do_not_fill() -> None:
    """By hand: 7 rows are 7 × 1 with microbatch 4; 4 or 8 rows would be whole; 18 of two ranks are 9 each, 3 × 3."""
    config = RunConfig()
    config.batch.sequences, config.batch.microbatch = 7, 4
    assert microbatch_notes(config, 1) == [
        "note: 7 rows a rank (batch.sequences=7) are no multiple of batch.microbatch=4, so each microbatch has 1 row; "
        "batch.sequences=4 or 8 would fill microbatches of 4, and batch.microbatch=7 would take 7 rows at once"
    ]
    config.batch.sequences, config.batch.ramp = 8, [RampEntryConfig(9, 18), RampEntryConfig(10, 6)]
    assert microbatch_notes(config, 2) == [
        "note: 9 rows a rank (batch.ramp[0].sequences=18) are no multiple of batch.microbatch=4, so each microbatch "
        "has 3 rows; batch.ramp[0].sequences=16 or 24 would fill microbatches of 4, and batch.microbatch=9 would take "
        "9 rows at once"
    ]


def test_the_note_is_printed(settings: dict, capsys: pytest.CaptureFixture) -> None:
    settings["batch"] = {"sequences": 7, "microbatch": 4}
    assert train(settings, "run.steps=1") == 0
    assert "\nnote: 7 rows a rank (batch.sequences=7) are no multiple of" in capsys.readouterr().err


def test_refusals_describe_the_run(settings: dict) -> None:
    """The message names the run, its model, first start and step; without events the config's time is the start."""
    from trinity.run_directory import describe_run, newest_config

    run = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=1", "run.name=first") == 0
    began = (run / "events.jsonl").read_text().split('"time": "')[1][:16].replace("T", " ")
    whose = f"{run} (run first, model smoke, started {began} UTC, at step 1)"
    assert refuse(settings, "run.seed=9") == (
        f"{whose} holds a run with another config (run.seed was 3 and is 9); restore the old value, or start a new run "
        "in another run.dir"
    )
    assert refuse(settings, "loss.z=1").startswith(f"resuming {whose} would change how the model learns (loss.z was")
    (run / "events.jsonl").unlink()
    assert describe_run(run, newest_config(run), 1)[:-30] == whose[:-30]


@pytest.mark.parametrize("key", ["run", "hf"])
def test_a_continued_model_is_evaluated_first(
    settings: dict, uninterrupted: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    """The record of step 0 has the validation of the other run's last record; a resume keeps it."""
    origin = uninterrupted
    if key == "hf":
        from trinity.interop import export_hf
        from trinity.training.load_run import load_model

        model, config, _ = load_model(uninterrupted)
        origin = tmp_path / "hf"
        export_hf(model, origin, Path(config.data.tokenizer), dtype=torch.float32)
    run = Path(settings["run"]["dir"])
    settings["model"] = {"name": "smoke"}
    words = (f"init.{key}={origin}", "checkpoint.every=0", "run.steps=1", "evaluation.prompts=[a]")
    assert train(settings, *words) == 0
    first, last = metrics(run)[0], metrics(uninterrupted)[-1]
    names = {name for name in last if name.startswith("validation_")}
    assert names
    assert f"step 0/1  loss.held_out {last['validation_loss.held_out']:.4f}  vio.held_out" in capsys.readouterr().err
    assert first == {"step": 0, "tokens": 0, "sequences": 0} | {name: last[name] for name in names}
    assert [record["step"] for record in metrics(run)] == [0, 1]
    assert '"step": 0' in (run / "samples.jsonl").read_text().splitlines()[0]
    assert state(run, 1)["run.step"] == 1
    if key == "run":  # the run continues with step 0 kept
        assert train(settings, *words, "run.steps=2") == 0
        assert [record["step"] for record in metrics(run)] == [0, 1, 2]


def test_a_run_that_starts_over_keeps_no_step(tmp_path: Path) -> None:
    """A start without a checkpoint moves the record of step 0 to the tail file too; a resume keeps it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    JsonLines(path, 1).close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    JsonLines(path, 0).close()
    assert path.read_text() == ""
    assert (tmp_path / "metrics.tail.2.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
