"""samples.jsonl of a run: the continuations at every evaluation, none twice after a resume."""

import json
from pathlib import Path

import pytest

from tests.training.run_files import metrics, refuse, train
from trinity.data.tokenizer.tokenizer import bos_id, load_text_encoder
from trinity.evaluation.generate import generate
from trinity.training.load_run import load_model

PROMPTS = ["def train", "Raises:\n    User"]


@pytest.fixture
def with_prompts(settings: dict) -> dict:
    """Two prompts at every second step."""
    settings["evaluation"] = {"every": 2, "sequences": 5, "prompts": PROMPTS, "sample_tokens": 6}
    return settings


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


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
