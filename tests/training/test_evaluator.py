"""samples.jsonl and needles.jsonl of a run: a line for every evaluation, none twice after a resume."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, refuse, train
from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.evaluation.generate import generate
from trinity.evaluation.needle import Haystack, NeedleTask
from trinity.evaluation.needle_score import Cell, forced
from trinity.training.load_run import load_model

PROMPTS = ["def train", "Raises:\n    User"]


@pytest.fixture
def with_prompts(settings: dict) -> dict:
    """Two prompts at every second step."""
    settings["evaluation"] = {"every": 2, "sequences": 5, "prompts": PROMPTS, "sample_tokens": 6}
    return settings


@pytest.fixture
def with_needles(settings: dict) -> dict:
    """Needles of kinds 1 and 3 at two lengths, at every fourth step."""
    needles = {"lengths": [640, 700], "kinds": [1, 3], "samples": 3}
    settings["evaluation"] = {"every": 4, "sequences": 5, "needles": needles, "by_position": True}
    return settings


def samples(run: Path, name: str = "samples") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def test_samples_are_written(with_prompts: dict, uninterrupted: Path) -> None:
    """The last step's texts equal those that generate() gives for the saved model; samples change no step."""
    assert train(with_prompts) == 0
    run = Path(with_prompts["run"]["dir"])
    lines = samples(run)
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, p) for s in (2, 4, 6, 8) for p in PROMPTS]
    tokens = {line["step"]: line["tokens"] for line in metrics(run)}
    assert all(line["tokens"] == tokens[line["step"]] for line in lines)
    model, config, _ = load_model(run)
    tok = load_text_encoder(Path(config.data.tokenizer))
    for line in lines[-2:]:
        prompt = [bos_id(tok), *tok.encode(line["prompt"], add_special_tokens=False).ids]
        continuation = generate(model, prompt, 6, temperature=0, stop_ids=[bos_id(tok)])
        assert line["text"] == tok.decode([token for token in continuation if token != bos_id(tok)])
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(uninterrupted)]


def test_a_resumed_run_writes_each_sample_once(with_prompts: dict, tmp_path: Path) -> None:
    """Back from step 8 to the checkpoint of step 6, as after a crash; the lines cut off are in a tail file."""
    assert train(with_prompts) == 0
    run = Path(with_prompts["run"]["dir"])
    expected = samples(run)
    (run / "checkpoints/step_00000008/COMPLETE").unlink()
    assert train(with_prompts) == 0
    assert samples(run) == expected
    assert [json.loads(line) for line in (run / "samples.tail.1.jsonl").read_text().splitlines()] == expected[-2:]


def test_prompts_need_a_tokenizer(with_prompts: dict) -> None:
    assert "evaluation.sample_tokens=0 must be at least 1" in refuse(with_prompts, "evaluation.sample_tokens=0")
    del with_prompts["data"]["tokenizer"]
    assert "evaluation.prompts are texts and there is no tokenizer; set data.tokenizer" in refuse(with_prompts)


def test_needles_need_evaluations(with_needles: dict) -> None:
    assert "evaluation.every=0 makes none; set evaluation.every, or evaluation.needles.lengths=[]" in refuse(
        with_needles, "evaluation.every=0"
    )


def test_needles_are_scored(with_needles: dict, uninterrupted: Path) -> None:
    """The last step's scores are those of the saved model on the same samples; needles change no step. Back from step 8
    to step 6, as after a crash, the run writes the same lines and metrics again, bit for bit."""
    assert train(with_needles) == 0
    run = Path(with_needles["run"]["dir"])
    lines = samples(run, "needles")
    cells = [(1, 640), (1, 700), (3, 640), (3, 700)]
    assert [(line["step"], line["kind"], line["length"]) for line in lines] == [
        (step, *cell) for step in (4, 8) for cell in cells
    ]
    model, config, _ = load_model(run)
    tokenizer = Path(config.data.tokenizer)
    haystack = Haystack.of_source(
        TokenSource(config.data.validation["held_out"]), load_text_encoder(tokenizer), "held_out"
    )
    for (kind, length), line in zip(cells, lines[-4:]):
        task = NeedleTask(tokenizer, config.model.vocab_size, kind, length, haystack, config.run.seed)
        asked = [task.sample(index) for index in range(3)]
        cell = Cell.of(
            [outcome for sample in asked for outcome in forced(model, [sample], length, torch.device("cpu"))]
        )
        assert line["nats"] == pytest.approx(cell.nats, rel=1e-5)  # fp32 in other batches
        assert (line["score"], line["samples"]) == (cell.score, 3)
        prefix = "needle" if kind == 1 else "needle_3"
        record = metrics(run)[-1]
        assert (record[f"{prefix}.{length}"], record[f"{prefix}_nats.{length}"]) == (line["score"], line["nats"])
    expected = metrics(run)
    assert [line["loss"] for line in expected] == [line["loss"] for line in metrics(uninterrupted)]
    assert any(name.startswith("validation_loss_at.") for name in expected[-1])
    (run / "checkpoints/step_00000008/COMPLETE").unlink()
    assert train(with_needles) == 0
    assert (samples(run, "needles"), metrics(run)) == (lines, expected)
    assert samples(run, "needles.tail.1") == lines[-4:]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluation.needles.lengths=[4096]"], "the model has 2048 positions (model.max_positions)"),
        (["evaluation.needles.lengths=[0]"], "use lengths from 1 up to that"),
        (["evaluation.needles.lengths=[100]"], "evaluation.needles.lengths 100 has no room for the needles and the"),
        (["evaluation.needles.lengths=[640,640]"], "evaluation.needles.lengths=[640, 640] repeats a value"),
        (["evaluation.needles.kinds=[4]"], "evaluation.needles.kinds names 4, which is no kind of needles; use 1, 2"),
        (["evaluation.needles.kinds=[]"], "evaluation.needles.kinds is empty; use [1], [2] or [3]"),
        (["evaluation.needles.samples=0"], "evaluation.needles.samples=0 must be at least 1"),
        (["evaluation.needles.haystack=web"], "evaluation.needles.haystack=web is no set of data.validation (known"),
        (["data.validation={}"], "add one, or set evaluation.needles.kinds=[2,3]"),
    ],
)
def test_needles_that_cannot_be_asked(with_needles: dict, words: list[str], sentence: str) -> None:
    if "data.validation={}" in words:
        with_needles["data"]["validation"], words = {}, []
    assert sentence in refuse(with_needles, *words)


def test_needles_need_a_tokenizer(with_needles: dict) -> None:
    del with_needles["data"]["tokenizer"]
    assert "evaluation.needles are texts and there is no tokenizer; set data.tokenizer" in refuse(with_needles)
