"""checkpoint.average: the average's loss, the run that it must not change, resumes, rollbacks and wrong values.

The expected loss is that of an average made here, evaluated as a run evaluates its model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from tests.training.run_files import metrics, refuse, state, train
from trinity.checkpoint.directory import CheckpointDirectory, averaged_steps
from trinity.checkpoint.load import model_state
from trinity.config.run import AverageConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.validation import validation_sequences
from trinity.evaluation.validation_loss import evaluate
from trinity.interop import load_hf
from trinity.merging import average
from trinity.models import Trinity
from trinity.optim.decay_weights import DECAYS
from trinity.training.load_run import load_model

FIELD = "validation_loss_average.held_out"
AVERAGE = ["checkpoint.every=2", "checkpoint.average={every: 2, window: 3, decay: 1-sqrt}", "evaluation.every=1"]
"""Averages from step 6 on; step 7 is none of theirs."""


@pytest.fixture(scope="module")
def averaged(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps with averages; read only."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    assert train(recipe(run), *AVERAGE, "checkpoint.keep=9") == 0
    return run


def loss_of(model: Trinity, settings: dict) -> float:
    """The validation loss as Evaluator computes it."""
    source = TokenSource(Path(settings["data"]["validation"]["held_out"]))
    rows = list(validation_sequences(source, 24, 5, False, rank=0, ranks=1))
    return evaluate(model, rows, 6, True, None, torch.device("cpu"))["loss"]


def by_step(run: Path, field: str = FIELD) -> dict[int, float]:
    """Values of a field by step, where it is."""
    return {line["step"]: line[field] for line in metrics(run) if field in line}


def test_the_average_is_that_of_tools_average(averaged: Path, settings: dict, tmp_path: Path) -> None:
    """The same loss to the last bit, though the run's newest weights of step 6 are not saved when it evaluates them."""
    losses = by_step(averaged)
    assert losses.keys() == {6, 7, 8}
    assert losses[6] == losses[7] != losses[8]
    for step in (6, 8):
        folder = tmp_path / f"out{step}"
        average(averaged, folder, f"{step - 4}:{step}:2", "1-sqrt", dtype=torch.float32)
        assert loss_of(load_hf(folder), settings) == losses[step]


def test_the_average_in_float64(averaged: Path, settings: dict) -> None:
    """Σ c_i θ_i, c the differences of 1 - √x at 0, 1/3, 2/3, 1; sums in fp32 change each weight by about 1e-7 of it."""
    scale = [1 - (x / 3) ** 0.5 for x in range(4)]
    model, _, _ = load_model(averaged, 8)
    saved = [state(averaged, step) for step in (4, 6, 8)]
    for name, tensor in model_state(model).items():
        if not name.endswith("momentum"):
            parts = [tensors[name].double() for tensors in saved]
            tensor.copy_(sum((scale[i] - scale[i + 1]) * part for i, part in enumerate(parts)))
    assert loss_of(model, settings) == pytest.approx(by_step(averaged)[8], rel=1e-6)
    plain = by_step(averaged, "validation_loss.held_out")[8]
    assert abs(plain - by_step(averaged)[8]) > 1e-3  # or the test could not fail


def test_training_does_not_change(averaged: Path, settings: dict) -> None:
    """Every other metric and the last checkpoint, bit for bit, in fp32."""
    assert train(settings, *AVERAGE, "checkpoint.average.every=null") == 0
    run = Path(settings["run"]["dir"])
    without = [{key: value for key, value in line.items() if key != FIELD} for line in metrics(averaged)]
    assert metrics(run) == without
    before, after = state(run, 8), state(averaged, 8)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_training_in_bfloat16_does_not_change(settings: dict, tmp_path: Path) -> None:
    """FSDP keeps the bf16 casts of the weights from an evaluation to the next step: they must not be the average's."""
    words = [*AVERAGE, "precision.compute=bfloat16", "checkpoint.average.window=2", "run.steps=6"]
    assert train(settings, *words) == 0
    assert train(settings, *words, "checkpoint.average.every=null", f"run.dir={tmp_path / 'off'}") == 0
    run = Path(settings["run"]["dir"])
    assert by_step(run).keys() == {4, 5, 6}
    assert by_step(run)[6] != by_step(run, "validation_loss.held_out")[6]
    after, before = state(run, 6), state(tmp_path / "off", 6)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_resumed_run_has_the_same_average(averaged: Path, settings: dict) -> None:
    """Stopped twice where no checkpoint is due, with keep=1: the window's checkpoints are kept all the same."""
    first = ["run.steps=3", "checkpoint.average.every=null"]  # the window is longer than this part of the run
    for words in (first, ["run.steps=7", "checkpoint.keep=1"], ["run.steps=8", "checkpoint.keep=1"]):
        assert train(settings, *AVERAGE, *words) == 0
    run = Path(settings["run"]["dir"])
    assert by_step(run) == by_step(averaged)
    assert CheckpointDirectory.at(run).complete_steps() == [4, 6, 8]


def test_no_average_without_the_whole_window(settings: dict, capsys: pytest.CaptureFixture) -> None:
    """A missing checkpoint leaves its averages out, an unreadable one is noted; training goes on."""
    assert train(settings, *AVERAGE, "run.steps=6") == 0
    run = Path(settings["run"]["dir"])
    (run / "checkpoints/step_00000004/COMPLETE").unlink()
    assert train(settings, *AVERAGE, "run.steps=7") == 0
    assert by_step(run).keys() == {6}
    metadata = run / "checkpoints/step_00000006/.metadata"
    assert train(settings, *AVERAGE, "run.steps=8", "checkpoint.average.window=2") == 0
    assert by_step(run).keys() == {6, 8}
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    capsys.readouterr()
    assert train(settings, *AVERAGE, "run.steps=9", "checkpoint.average.window=2") == 0
    assert by_step(run).keys() == {6, 8}
    assert "checkpoint_damaged: the average is not evaluated: " in capsys.readouterr().err
    assert metrics(run)[8]["validation_loss.held_out"] > 0


def test_a_rollback(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike at step 7 goes back to step 6; the average of step 8 is that of the checkpoints that count."""
    from trinity.training import trainer

    step, spiked = trainer.Trainer.one_step, []

    def one_step(self: trainer.Trainer) -> dict:
        record = step(self)
        if self.step == 7 and not spiked:
            spiked.append(7)
            return record | {"spike": True}
        return record

    monkeypatch.setattr(trainer.Trainer, "one_step", one_step)
    settings["health"] = {"spike": {"action": "rollback"}}
    assert train(settings, *AVERAGE, "checkpoint.keep=9") == 0
    run = Path(settings["run"]["dir"])
    assert (run / "events.jsonl").read_text().count('"kind": "rollback"') == 1
    assert by_step(run).keys() == {6, 7, 8}
    assert by_step(run)[6] == by_step(run)[7]
    monkeypatch.undo()
    average(run, run / "out", "4:8:2", "1-sqrt", dtype=torch.float32)
    assert loss_of(load_hf(run / "out"), settings) == by_step(run)[8]


def test_averaged_steps() -> None:
    """The last multiples up to a step; fewer at first; none by default."""
    settings = AverageConfig(every=10, window=3)
    assert [averaged_steps(settings, step) for step in (0, 9, 10, 39, 40)] == [
        [], [], [10], [10, 20, 30], [20, 30, 40],
    ]  # fmt: skip
    assert averaged_steps(AverageConfig(), 100) == []


def test_the_config_knows_every_decay() -> None:
    assert set(get_args(get_type_hints(AverageConfig)["decay"])) == {"equal", *DECAYS}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["every=0"], "checkpoint.average.every=0 must be at least 1"),
        (["every=2", "window=1"], "checkpoint.average.window=1 must be at least 2"),
        (["every=2", "decay=exponential"], "checkpoint.average.decay"),
        (["every=4"], "checkpoint.average.every=4 is not a multiple of checkpoint.every=3, and the average is made of "
         "checkpoints; use checkpoint.average.every=6"),
        (["every=3", "window=3"], "is step 9, before which there is no average, and the run ends at run.steps=8"),
    ],
)  # fmt: skip
def test_wrong_values(settings: dict, words: list[str], sentence: str) -> None:
    assert sentence in refuse(settings, *(f"checkpoint.average.{word}" for word in words))
    assert not Path(settings["run"]["dir"]).exists()


def test_an_average_that_nothing_evaluates(settings: dict) -> None:
    """No evaluation, no validation data, no checkpoints; the advice works."""
    word = "checkpoint.average={every: 3, window: 2}"
    assert "and evaluation.every=0; set it, or leave" in refuse(settings, word, "evaluation.every=0")
    assert "use checkpoint.every=3" in refuse(settings, word, "checkpoint.every=0")
    del settings["data"]["validation"]
    assert "and data.validation is empty; set it" in refuse(settings, word)
