"""A run that fine-tunes a checkpoint on chat data: its metrics, its samples, its export, and a resume."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from tests.training.run_files import metrics, state, train
from trinity.data.chat.encode import ChatOptions
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.data.prepare.prepare import prepare_data
from trinity.interop.export import export_hf
from trinity.interop.tokenizer_files import special_ids
from trinity.training.load_run import load_model

QUESTION = "<|im_start|>user\nIs 3 odd?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a template, and conversations of one answer of some tokens, or two."""
    folder = tmp_path_factory.mktemp("chat")
    make_chat_tokenizer(corpus.tokenizer, folder / "tokenizer", places="last")
    turns = [
        [
            {"role": "user", "content": f"Is {number} odd?"},
            {"role": "assistant", "content": "Yes." if number % 2 else "No, it is even."},
        ]
        for number in range(80)
    ]
    rows = [json.dumps({"messages": turn if number % 5 else turn * 2}) for number, turn in enumerate(turns)]
    for name, part in (("train", rows[:64]), ("validation", rows[64:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
        prepare_data([folder / f"{name}.jsonl"], folder / "tokenizer", folder / name, chat=ChatOptions(max_tokens=80))
    return folder


@pytest.fixture
def fine_tuning(settings: dict, chat: Path, uninterrupted: Path) -> dict:
    """Settings of a run that continues the uninterrupted one on the conversations."""
    data = settings["data"] | {
        "train": {"chat": str(chat / "train")}, "validation": {"chat": str(chat / "validation")},
        "tokenizer": str(chat / "tokenizer"), "loss": "masked", "packing": "best_fit", "best_fit_rows": 1,
        "sequence_length": 80, "streams": 4,
    }  # fmt: skip
    for key in ("phases", "mixture", "rsdb_size"):
        del data[key]
    return settings | {
        "data": data,
        "init": {"run": str(uninterrupted)},
        "batch": {"sequences": 4, "microbatch": 2},
        "loss": {"z": 1e-4, "per": "example"},
        "evaluation": {"every": 4, "sequences": 8, "prompts": [QUESTION], "sample_tokens": 12},
    }


def test_a_run_learns_to_answer_and_to_end_its_turns(fine_tuning: dict, chat: Path, uninterrupted: Path) -> None:
    """From the base model's weights and expert biases, evaluated at step 0, to the template's form."""
    fine_tuning["run"]["steps"] = 40
    fine_tuning["optim"]["schedule"] = {"warmup_steps": 2, "decay": "linear", "decay_start_steps": 20, "final": 0.0}
    assert train(fine_tuning) == 0
    run = Path(fine_tuning["run"]["dir"])
    lines = metrics(run)
    first, last = lines[0], lines[-1]
    assert first["step"] == 0
    assert last["validation_loss.chat"] < 0.5 < 3 < first["validation_loss.chat"]
    assert (first["validation_end_of_turn.chat"], last["validation_end_of_turn.chat"]) == (0.0, 1.0)
    padding = [line["padding_share"] for line in lines[1:]]
    assert 0 < min(padding) <= max(padding) < 1  # the rows that end an epoch may hold one example
    assert sum(padding) / len(padding) < 0.5
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["text"] not in ("Yes.", "No, it is even.")
    assert samples[-1]["text"] in ("Yes.", "No, it is even.")

    model, config, _ = load_model(run)
    folder = export_hf(model, run / "hf", Path(config.data.tokenizer), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Is 3 odd?"}], tokenize=False,
                                           add_generation_prompt=True)  # fmt: skip
    assert prompt == tokenizer.bos_token + QUESTION
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert special_ids(chat / "tokenizer", 512).turn_end in ([ends] if isinstance(ends, int) else ends)


def test_a_resumed_run_equals_an_uninterrupted_one(fine_tuning: dict, tmp_path: Path) -> None:
    """Bit for bit, weights, biases and metrics, from a checkpoint inside the window of the packer."""
    states, lines = [], []
    for name, steps in (("whole", (8,)), ("parts", (3, 8))):
        fine_tuning["run"]["dir"] = str(tmp_path / name)
        for until in steps:
            # the length of the decay is given, so that the first part's schedule is the whole run's
            assert train(fine_tuning, f"run.steps={until}") == 0
        states.append(state(tmp_path / name, 8))
        lines.append([line for line in metrics(tmp_path / name) if line["step"] not in (3,)])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if "random" not in name)
    assert [line["loss"] for line in lines[0] if "loss" in line] == [
        line["loss"] for line in lines[1] if "loss" in line
    ]
