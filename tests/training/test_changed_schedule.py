"""A batch, phase or length changed on resume applies from there on, bit for bit as if planned from the start."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, refuse, state, train
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig, RunSection
from trinity.errors import UserError
from trinity.training import train_step
from trinity.training.build_data import open_stream, seek_near
from trinity.training.lr_schedule_checks import check_decay

S = 24
PHASES = "data.phases=[{tokens: 800, mixture: {prose: 2, code: 1}, packing: sequential, sequence_length: 16}]"
LATER = ["batch.ramp=[]", "batch.sequences=12", "run.steps=8"]
ACCEPT = ("batch",)


@pytest.fixture
def settings(settings: dict) -> dict:
    """The recipe without evaluation, because a shorter run would add one at its end."""
    settings["evaluation"] = {}
    return settings


def config_with(settings: dict, *words: str) -> RunConfig:
    """The settings as a config."""
    return build_config([("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))])


@pytest.fixture(scope="module")
def planned_run(recipe: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of 6 sequences, then 12, and shorter ones from 800 tokens on, planned from the start; read only."""
    run = tmp_path_factory.mktemp("planned") / "run"
    words = [f"batch.ramp=[{{tokens: {3 * 6 * S}, sequences: 12}}]", PHASES, "run.steps=8", "checkpoint.keep=9"]
    assert train(recipe(run) | {"evaluation": {}}, *words) == 0
    return run


@pytest.mark.parametrize("fork", [False, True], ids=["resumed", "forked"])
def test_a_changed_batch_starts_where_the_run_is(settings: dict, planned_run: Path, fork: bool) -> None:
    """All metrics and the state, bit for bit, on resume and where init.keep=all continues another run."""
    first = Path(settings["run"]["dir"])
    assert train(settings, "batch.ramp=[]", PHASES, "run.steps=3") == 0
    run = first.with_name("fork") if fork else first
    words = [f"run.dir={run}", f"init.run={first}", "init.keep=all"] if fork else []
    assert "--accept-change batch.sequences" in refuse(settings, *LATER, PHASES, *words)
    assert train(settings, *LATER, PHASES, *words, accept=ACCEPT) == 0
    assert metrics(run) == metrics(planned_run)[3 if fork else 0 :]
    one, other = state(run, 8), state(planned_run, 8)
    assert {
        key for key in one if not key.startswith("run.forgetting.")
    } == other.keys()  # a fork compares with its start
    assert not [key for key in other if not torch.equal(one[key], other[key])]


def test_tokens_are_those_that_were_read(settings: dict) -> None:
    """They equal the sources' own counts; run.tokens ends the run with the step that reaches it."""
    assert train(settings, "batch.ramp=[]", "run.steps=3") == 0
    words = ["batch.ramp=[]", "batch.sequences=12", "run.steps=null", "run.tokens=1000"]
    assert train(settings, *words, accept=ACCEPT) == 0
    lines = metrics(Path(settings["run"]["dir"]))
    assert [line["sequences"] for line in lines] == [6, 12, 18, 30, 42]
    for line in lines:
        read = sum(value for key, value in line.items() if key.startswith("source_tokens."))
        assert line["tokens"] == read == line["sequences"] * S


def test_a_rollback_past_a_changed_batch(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike after the change rolls back to before it; the new batch applies from there, and no data is read twice."""
    words = ["batch.ramp=[]", "data.phases=[]", "checkpoint.every=2", "checkpoint.keep=1"]
    assert train(settings, *words, "run.steps=2") == 0
    calls, norm = [], train_step.global_norm

    def enlarged(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return norm(*arguments) * (1000 if len(calls) == 5 else 1)

    assert train(settings, *words, "run.steps=4", "checkpoint.every=0") == 0
    monkeypatch.setattr(train_step, "global_norm", enlarged)
    spike = ["health.spike.action=rollback", "health.spike.window=6", "health.spike.sigma=20"]
    more = [*words, *spike, "batch.sequences=12", "run.steps=11", "checkpoint.every=20"]
    assert train(settings, *more, accept=ACCEPT) == 0
    run = Path(settings["run"]["dir"])
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert [line["attempt"] for line in lines] == [0] * 4 + [1] * 7
    assert [line["sequences"] for line in lines] == [6, 12, 18, 24, *range(36, 36 + 7 * 12, 12)]
    saved = state(run, 11)
    assert saved["data.jumped"].tolist() == [[0, 0], [24, 84]]  # five steps of 12 lie behind the spike
    assert saved["data.k"] == 24 + 5 * 12 + 7 * 12


def test_show_batch_knows_the_history(settings: dict, planned_run: Path) -> None:
    """Any step of a run whose batch was changed, before the change and after, with and without a replay."""
    assert train(settings, "batch.ramp=[]", PHASES, "run.steps=3") == 0
    assert train(settings, *LATER, PHASES, accept=ACCEPT) == 0
    config = config_with(settings, *LATER, PHASES)
    planned_config = config_with(settings, f"batch.ramp=[{{tokens: {3 * 6 * S}, sequences: 12}}]", PHASES)
    for step in (0, 2, 3, 6, 9):
        stream, replayed = open_stream(config, 0, 1), open_stream(planned_config, 0, 1)
        seek_near(stream, config, step)
        assert stream.batch(step).pieces == replayed.batch(step).pieces


def test_show_batch_of_a_fork_that_has_not_begun(settings: dict, uninterrupted: Path) -> None:
    """init.keep=all: the first batch is the one that the other run would have read next, at any step of it."""
    words = [f"init.run={uninterrupted}", "init.keep=all"]
    for step in (6, 8):
        config = config_with(settings, *words, f"init.step={step}")
        stream, replayed = open_stream(config, 0, 1), open_stream(config_with(settings), 0, 1)
        seek_near(stream, config, step)
        assert stream.k == replayed.plan.at(step).first  # from the other run's checkpoint, not replayed
        assert stream.batch(step).pieces == replayed.batch(step).pieces
    changed = config_with(settings, *words, "batch.sequences=24", "batch.ramp=[]")
    stream = open_stream(changed, 0, 1)
    seek_near(stream, changed, 8)
    assert stream.plan.at(8)[:2] == (72, 24)


def test_a_fork_keeps_what_is_fixed(settings: dict, uninterrupted: Path) -> None:
    """init.keep=all continues data and steps, so the same changes are refused as on resume."""
    words = [f"init.run={uninterrupted}", "init.keep=all"]
    for word in ("run.seed=4", "data.sequence_length=16", "data.streams=24"):
        key = word.split("=")[0]
        sentence = refuse(settings, *words, word)
        assert sentence.startswith(f"{uninterrupted} (run tiny, ")
        assert f"holds a run with another config ({key} was" in sentence
        assert sentence.endswith("restore the old value, or set init.keep=optimizer")
    assert "batch.sequences was 6 and is 12" in refuse(settings, *words, "batch.sequences=12", "batch.ramp=[]")
    assert not (Path(settings["run"]["dir"]) / "config.yaml").exists()


def test_checkpoints_without_a_history(settings: dict, monkeypatch: pytest.MonkeyPatch, planned_run: Path) -> None:
    """Checkpoints of an older version: the steps are assumed to follow the config, and checked against the data."""
    from trinity.training import trainer

    full = trainer.Trainer.state

    def older(self: trainer.Trainer) -> dict:
        return {key: value for key, value in full(self).items() if key != "run.batch_history"}

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "state", older)
        assert train(settings, "batch.ramp=[]", PHASES, "run.steps=3") == 0
    run = Path(settings["run"]["dir"])
    assert "run.batch_history" not in state(run, 3)
    assert train(settings, *LATER, PHASES, accept=ACCEPT) == 0
    assert metrics(run) == metrics(planned_run)


DECAY = ["optim.schedule.decay=linear", "optim.schedule.decay_start_steps=4", "optim.schedule.decay_steps=null"]


def test_a_longer_run_does_not_raise_a_decayed_rate(settings: dict, capsys: pytest.CaptureFixture) -> None:
    """Refused, naming both rates; --accept-change and the suggested decay_steps each let the run continue."""
    words = [*DECAY, "optim.schedule.final=0.25"]
    assert train(settings, *words) == 0
    sentence = refuse(settings, *words, "run.steps=10")
    assert "from 4 steps to 6 steps" in sentence
    assert "would be 0.5 of the peak (optim.muon.lr 0.01) in place of 0.25 (0.005)" in sentence
    assert "--accept-change optim.schedule if" in sentence
    assert "set optim.schedule.decay_steps=4 to keep" in sentence
    run = Path(settings["run"]["dir"])
    assert train(settings, *words, "run.steps=9", "optim.schedule.decay_steps=4") == 0
    assert [line["lr_muon"] for line in metrics(run)[4:]] == pytest.approx([0.02, 0.01625, 0.0125, 0.00875, 0.005])
    assert train(settings, *words, "run.steps=10", accept=("optim.schedule",)) == 0
    assert metrics(run)[9]["lr_muon"] == pytest.approx(0.02 * (0.25 + 0.75 / 6))
    message = capsys.readouterr().err
    assert "optim.schedule.decay_steps" in message
    train(settings, *words, "run.steps=10")
    assert "with --accept-change optim.schedule, since the decay ends with the run" in capsys.readouterr().err
    later = [*words, "run.steps=12", "optim.schedule.decay_start_steps=11"]
    assert "add --accept-change optim.schedule.decay_start_steps to" in refuse(settings, *later)
    assert train(settings, *later, accept=("optim.schedule.decay_start_steps",)) == 0


def test_a_run_that_ended_before_its_decay_may_become_longer(settings: dict) -> None:
    """The decay had not started, so its length may change."""
    words = [*DECAY, "optim.schedule.final=0"]
    before = replace(config_with(settings, *words), run=RunSection(steps=6))
    now = replace(before, run=RunSection(steps=7))
    with pytest.raises(UserError, match="from 2 steps to 3 steps: rates differ from 4 steps on; add"):
        check_decay(before, now, 3, 432, [], "runs/mine")
    assert train(settings, *words, "run.steps=2") == 0
    assert train(settings, *words, "run.steps=4") == 0
    assert train(settings, *words, "run.steps=6") == 0
    rates = [line["lr_muon"] for line in metrics(Path(settings["run"]["dir"]))]
    assert rates == pytest.approx([0.01, 0.02, 0.02, 0.02, 0.02, 0.01])


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["optim.schedule.warmup_steps=40"], "only reaches 0.05 of its peak"),
        ([*DECAY, "run.steps=2"], "decay_start_steps=4 is not before the end of the run at 2 steps"),
        (["optim.schedule.warmup_steps=2"], ""),
    ],
)
def test_a_schedule_that_does_not_fit_is_noted_at_the_start(
    settings: dict, capsys: pytest.CaptureFixture, words: list[str], note: str
) -> None:
    assert train(settings, "run.steps=2", *words, "optim.schedule.decay=none", *words) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: optim.schedule")]
    assert len(notes) == bool(note)
    assert all(note in line for line in notes)


def test_the_history_in_a_checkpoint(planned_run: Path) -> None:
    """Whole numbers: step, first sequence, sequences, length, tokens, phase."""
    rows = state(planned_run, 8)["run.batch_history"].tolist()
    assert rows == [
        [0, 0, 6, 24, 0, 0], [3, 18, 12, 24, 432, 0], [5, 42, 12, 16, 1008, 1], [8, 78, 0, 0, 1584, 0],
    ]  # fmt: skip
    last = json.loads((planned_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["tokens"], last["sequences"]) == (1584, 78)
