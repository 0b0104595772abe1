"""Continued pretraining: step 0 against tools/evaluate.py, forgetting budgets, the kept optimizer, and refusals."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.monitor.run_events import events
from tests.training.expert_counts import count_choices, expected_metrics
from tests.training.run_files import metrics, refuse, state, status, train
from trinity.data.prepare.prepare import prepare_data
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.interop import export_hf, load_hf
from trinity.monitor.forgetting import Forgetting
from trinity.training.load_run import load_model

ROOT = Path(__file__).parents[2]
SEQUENCE_LENGTH = 24


@pytest.fixture(scope="module")
def origin(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of a finished run, in fp32."""
    model, config, _ = load_model(uninterrupted)
    return export_hf(model, tmp_path_factory.mktemp("origin") / "hf", Path(config.data.tokenizer), torch.float32)


@pytest.fixture(scope="module")
def short(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four short documents: three rows, the last of them partly padding."""
    folder = tmp_path_factory.mktemp("short")
    texts = ["def train(config):", "return code", "the run directory holds checkpoints", "raise UserError(sentence)"]
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_data([folder / "short.jsonl"], corpus.tokenizer, folder / "shards")
    return folder / "shards"


@pytest.fixture
def continued(settings: dict, origin: Path, short: Path) -> dict:
    """Settings of a run from the folder, evaluated at every step on an old and a new domain."""
    settings["init"] = {"hf": str(origin)}
    settings["data"]["validation"]["short"] = str(short)
    settings["data"]["workers"] = 0
    settings["evaluation"] = {"every": 1, "sequences": 5}
    return settings


def evaluate_tool(folder: Path, texts: list[str], out: Path) -> dict[str, dict[str, float]]:
    """The results of tools/evaluate.py on rows packed as the runs here pack them."""
    before = sys.argv
    words = ["--packed", "--window", SEQUENCE_LENGTH, "--limit", 5, "--document-mask", "--no-loss-on-document-start"]
    sys.argv = ["evaluate.py", *map(str, [folder, "--text", *texts, *words, "--json", out])]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert ended.value.code == 0
    return json.loads(out.read_text())["results"]


def test_step_0_is_the_starting_model(continued: dict, origin: Path, tmp_path: Path) -> None:
    """Losses and bits per byte as tools/evaluate.py has them, to fp32's rounding in batches of another size; balance of
    the experts also as counted from the router's choices, exactly."""
    assert train(continued, "run.steps=1") == 0
    first = metrics(Path(continued["run"]["dir"]))[0]
    assert (first["step"], first["tokens"]) == (0, 0)
    sets = continued["data"]["validation"]
    of_tool = evaluate_tool(origin, list(sets.values()), tmp_path / "results.json")
    fields = {"step", "tokens", "sequences"}
    for name, place in sets.items():
        expected = of_tool[f"packed {place}"]
        for metric in ("loss", "bits_per_byte"):
            assert first[f"validation_{metric}.{name}"] == pytest.approx(expected[metric], rel=1e-6)
        counted = expected_metrics(count_choices(load_hf(origin), Path(place), SEQUENCE_LENGTH, 5, False), name)
        for field, value in counted.items():
            assert first[field] == value == expected[field.removeprefix("validation_").partition(".")[0]]
        fields |= {f"validation_loss.{name}", f"validation_bits_per_byte.{name}", *counted}
    assert first.keys() == fields
    assert first["validation_dead_experts.short"] > 0 or first["validation_max_violation.short"] > 0


HIGH = ["optim.muon.lr=0.3", "optim.adamw.lr=0.1", "optim.schedule.decay=none", "run.steps=6"]
"""Rates at which the model forgets."""


@pytest.fixture(scope="module")
def budget(origin: Path, recipe: Callable, short: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run without a budget at high rates: its directory, its rises of held_out by step, and a budget between them."""
    run = tmp_path_factory.mktemp("unlimited") / "run"
    settings = recipe(run)
    settings["data"]["validation"]["short"] = str(short)
    assert train(settings, f"init.hf={origin}", "data.workers=0", "evaluation.every=1", *HIGH) == 0
    losses = [line["validation_loss.held_out"] for line in metrics(run)]
    rises = [loss - losses[0] for loss in losses]
    first = next(step for step in range(2, 6) if rises[step] > max(0.0, *rises[:step]))
    limit = (rises[first] + max(0.0, *rises[:first])) / 2
    return SimpleNamespace(run=run, rises=rises, first=first, limit=limit)


def test_a_budget_warns(continued: dict, budget: SimpleNamespace) -> None:
    """At each evaluation above it, from the recorded losses; nothing else changes."""
    continued["health"] = {"forgetting": {"held_out": budget.limit}}
    assert train(continued, *HIGH) == 0
    run = Path(continued["run"]["dir"])
    lines = metrics(run)
    assert [line.pop("forgetting.held_out") for line in lines] == budget.rises
    assert lines == metrics(budget.run)
    above = [step for step, rise in enumerate(budget.rises) if rise > budget.limit]
    warned = events(run, "forgetting")
    assert [event["step"] for event in warned] == above
    assert 0 < len(above) < len(lines)
    assert [event["rise"] for event in warned] == [budget.rises[step] for step in above]
    assert {event["action"] for event in warned} == {"warn"}
    assert "more than health.forgetting.held_out=" in warned[0]["message"]


def test_a_budget_ends_the_run(continued: dict, budget: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    """At the first step above it, with a checkpoint and code 3; a resumed run compares with the same step 0."""
    continued["health"] = {"forgetting": {"held_out": budget.limit}, "forgetting_action": "end"}
    continued["checkpoint"] = {"every": 0}
    assert train(continued, *HIGH) == 3
    run = Path(continued["run"]["dir"])
    at_end = status(run)
    assert (at_end["state"], at_end["code"], at_end["step"]) == ("stopped", 3, budget.first)
    assert f"step {budget.first} is saved" in at_end["reason"]
    assert at_end["reason"] in (run / "STOP").read_text()
    assert f"forgot.held_out {budget.rises[budget.first]:.4f} of {budget.limit:g}" in capsys.readouterr().err
    assert len(metrics(run)) == budget.first + 1
    (run / "STOP").unlink()
    assert train(continued, *HIGH, "health.forgetting_action=warn") == 0
    lines = metrics(run)
    assert [line.pop("forgetting.held_out") for line in lines] == budget.rises
    assert lines == metrics(budget.run)


def test_a_budget_needs_the_same_text(continued: dict) -> None:
    """A budget may come with a resume, for text that was evaluated at step 0, and for no other."""
    assert train(continued, "run.steps=1") == 0
    words = ["run.steps=2", "health.forgetting={held_out: 9}"]
    assert "when data.validation.held_out held other text or evaluation.sequences was another number" in refuse(
        continued, *words, "evaluation.sequences=4"
    )
    continued["data"]["validation"]["prose"] = continued["data"]["train"]["prose"]
    assert "this run did not measure data.validation.prose then" in refuse(
        continued, "run.steps=2", "health.forgetting={prose: 9}"
    )
    assert train(continued, *words) == 0
    lines = metrics(Path(continued["run"]["dir"]))
    rise = lines[2]["validation_loss.held_out"] - lines[0]["validation_loss.held_out"]
    assert lines[2]["forgetting.held_out"] == rise


def test_a_branch_has_no_step_0(settings: dict, uninterrupted: Path) -> None:
    """init.keep=all continues the steps of a run that began with random weights."""
    words = [f"init.run={uninterrupted}", "init.step=6", "init.keep=all", "health.forgetting={held_out: 0.1}"]
    assert "health.forgetting.held_out compares with the loss at step 0" in refuse(settings, *words)


def test_a_loss_that_is_not_finite_is_above_every_budget() -> None:
    forgetting = Forgetting({"old": 0.5}, {"old": "00", "new": "01"}, 5)
    forgetting.begin({"old": 2.0, "new": 3.0})
    rises = forgetting.rises({"old": math.nan, "new": 1.0})
    assert [excess.name for excess in forgetting.excesses(rises)] == ["old"]
    assert forgetting.excesses(forgetting.rises({"old": 2.5})) == []  # at the budget, not above it


def test_restored_losses_are_those_of_step_0() -> None:
    """Bit for bit, by set; a set of other text is dropped."""
    forgetting = Forgetting({}, {"old": "00", "new": "01", "late": "02"}, 5)
    forgetting.begin({"old": 2.1, "new": 3.1})
    restored = Forgetting({"old": 1.0}, {"old": "00", "new": "09"}, 5)
    restored.restore(forgetting.state())
    restored.check()
    assert restored.rises({"old": 2.1}) == {"old": 0.0}
    assert restored.state()["loss.new"].isnan()


@pytest.fixture
def same_rows(settings: dict, corpus: SimpleNamespace, tmp_path: Path) -> dict:
    """Settings of a run at a constant rate whose rows are all equal: one document that fills a row."""
    encoder = load_text_encoder(corpus.tokenizer)
    ids = encoder.encode("def train(config): return the run directory of the model" * 3, add_special_tokens=False).ids
    text = encoder.decode(ids[: SEQUENCE_LENGTH - 1])
    assert encoder.encode(text, add_special_tokens=False).ids == ids[: SEQUENCE_LENGTH - 1] != bos_id(encoder)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    prepare_data([tmp_path / "one.jsonl"], corpus.tokenizer, tmp_path / "one")
    settings["data"] |= {"train": {"one": str(tmp_path / "one")}, "mixture": {}, "phases": [], "packing": "sequential"}
    settings["data"] |= {"validation": {}, "workers": 0}
    settings["batch"]["ramp"] = []
    settings["optim"]["schedule"] = {"warmup_steps": 0}
    settings["evaluation"] = {"every": 0}
    settings["checkpoint"] = {"every": 4, "keep": 9}
    return settings


@pytest.mark.parametrize("keep", ["optimizer", "weights"])
def test_a_kept_optimizer_continues(same_rows: dict, tmp_path: Path, keep: str) -> None:
    """With the same rows and rates, the steps after a start from step 4 are steps 5 to 8 of the run, bit for bit; with
    the weights alone they are not."""
    assert train(same_rows, "run.steps=8") == 0
    run, branch = Path(same_rows["run"]["dir"]), tmp_path / "branch"
    same_rows["run"]["dir"] = str(branch)
    assert train(same_rows, "run.steps=4", f"init.run={run}", "init.step=4", f"init.keep={keep}") == 0
    expected, got = state(run, 8), state(branch, 4)
    names = [name for name in expected if name.startswith(("model.", "optim."))]
    assert all(torch.equal(got[name], expected[name]) for name in names) == (keep == "optimizer")
    losses = [line["loss"] for line in metrics(run)][4:]
    assert ([line["loss"] for line in metrics(branch)] == losses) == (keep == "optimizer")


def test_an_optimizer_of_other_parameters(settings: dict, uninterrupted: Path) -> None:
    words = [f"init.run={uninterrupted}", "init.keep=optimizer", "optim.router=adamw"]
    sentence = refuse(settings, *words)
    assert sentence.startswith("init.keep=optimizer needs the optimizer state of the same parameters, and")
    assert "lacks optim.adamw.exp_avg.blocks.1.ffn.router.weight (" in sentence
    assert sentence.endswith("with the same optim.router, or set init.keep=weights")


def test_an_optimizer_of_no_run(continued: dict) -> None:
    assert "init.keep=optimizer says what to load from another run, and init.run is not given" in refuse(
        continued, "init.keep=optimizer"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["health.forgetting={other: 0.1}"],
            "health.forgetting names other, which is no set of data.validation (known",
        ),
        (["health.forgetting={held_out: 0}"], "health.forgetting.held_out=0.0 must be above 0 and finite"),
        (["health.forgetting={held_out: .nan}"], "health.forgetting.held_out=nan must be above 0 and finite"),
        (["health.forgetting={held_out: 1}", "evaluation.every=0"], "evaluation.every=0 makes none; set evaluation.ev"),
        (["health.forgetting={held_out: 1}", "init.hf=null"], "neither init.hf nor init.run is given; set one"),
        (
            ["evaluation.prompts=[def]", "evaluation.every=0"],
            "evaluation.prompts are continued at each evaluation, and",
        ),
    ],
)
def test_settings_that_do_not_fit(continued: dict, words: list[str], sentence: str) -> None:
    assert sentence in refuse(continued, *words)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama", "tie_word_embeddings": True}, "model_type='llama' is not supported: a dense model or"),
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported"),
        ({"model_type": "qwen3_moe"}, "give a folder of model_type='afmoe', such as a published Trinity model or an"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised; give the model in bfloat16"),
    ],
)
def test_foreign_folders(continued: dict, tmp_path: Path, origin: Path, change: dict, sentence: str) -> None:
    """Named by the folder; nothing is trained."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    raw = json.loads((origin / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    refused = refuse(continued, f"init.hf={folder}")
    assert refused.startswith(f"{folder}/config.json: ")
    assert sentence in refused


def test_pickled_weights(continued: dict, tmp_path: Path, origin: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in origin.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickled weights are not read: load such a folder with transformers and save_pretrained it" in refuse(
        continued, f"init.hf={folder}"
    )
