"""A dozen of the malformed inputs given to the programs themselves: exit code 2 and one line on stderr."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.malformed.refusals import DAMAGE_FOUND, snapshot


@pytest.fixture
def refuses(run_command: Callable) -> Callable[..., str]:
    """refuses(script, …): run a program that must fail with code 2; return its error message."""

    def call(
        script: str, *words: object, unchanged: Path, may_change: set[str] = frozenset(), noisy: bool = False
    ) -> str:
        before = snapshot(unchanged)
        result = run_command(script, *words)
        assert result.code == 2, result.errors
        *earlier_lines, sentence = (
            result.errors.splitlines()
        )  # warnings and a bar's lines, where there was something to read
        assert sentence.startswith("error: ")
        assert not any(line.startswith(("Traceback", "error: ", "  File ")) for line in earlier_lines)
        assert not earlier_lines or noisy
        assert not result.output.strip()  # but a bar of the tokenizers library, which writes empty lines
        after = snapshot(unchanged)
        assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= may_change
        return sentence

    return call


def broken_config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run: {steps: 1}\noptim: {muon: {lr: -1}}")
    return path


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("launch/pretrain.py", []),
        ("launch/pretrain.py", ["--dry-run"]),
        pytest.param("tools/plan.py", ["--gpus", "8"], marks=pytest.mark.slow),
        pytest.param("tools/show_batch.py", ["--step", "1"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_configs(refuses: Callable, tmp_path: Path, script: str, words: list[str]) -> None:
    path = broken_config(tmp_path)
    assert "optim.muon.lr=-1" in refuses(script, path, *words, unchanged=tmp_path)


@pytest.mark.slow
def test_text(refuses: Callable, corpus: SimpleNamespace, tmp_path: Path) -> None:
    """A broken line, an empty file."""
    path = tmp_path / "texts/a.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "a"}\n{\n')
    out = ["--out", tmp_path / "out"]
    words = ["--input", path, "--tokenizer", corpus.tokenizer, "--workers", 1, *out]
    assert "a.jsonl:2 is not valid JSON" in refuses("tools/prepare_data.py", *words, unchanged=path.parent, noisy=True)
    path.write_text("{\n")
    words = ["--input", path, "--vocab-size", 300, "--out", tmp_path / "tokenizer"]
    assert "a.jsonl:1 is not valid JSON" in refuses(
        "tools/train_tokenizer.py", *words, unchanged=path.parent, noisy=True
    )


@pytest.mark.slow
def test_runs(refuses: Callable, run: Path, resumed: dict, config_file: Callable, tmp_path: Path) -> None:
    """Unreadable checkpoints, with every program that reads a run; and a report of a folder that is no run."""
    for path in run.glob("checkpoints/*/COMPLETE"):
        path.write_text("[" * 10**5)
    config = config_file(resumed)
    message = refuses("launch/pretrain.py", config, unchanged=run, may_change=DAMAGE_FOUND, noisy=True)
    assert "every checkpoint in" in message
    assert "every checkpoint in" in refuses("tools/export_hf.py", run, tmp_path / "out", unchanged=run, noisy=True)
    assert "every checkpoint in" in refuses("tools/generate.py", run, "--prompt", "a", unchanged=run, noisy=True)
    assert "nowhere" in refuses("tools/report.py", tmp_path / "nowhere", unchanged=tmp_path)


@pytest.mark.slow
def test_shards(refuses: Callable, shards: Path, settings: dict, config_file: Callable) -> None:
    path = shards / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "O"}))
    settings["data"]["train"]["prose"] = str(shards)
    config = config_file(settings)
    for script, words in (("tools/show_batch.py", ["--step", 1]), ("launch/pretrain.py", [])):
        assert "index.json is damaged (dtype is 'O'" in refuses(script, config, *words, unchanged=shards)


@pytest.mark.slow
def test_hf_folders(refuses: Callable, hf: Path, tmp_path: Path) -> None:
    path, text = hf / "config.json", tmp_path / "a.txt"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 10**12 + 1}))
    text.write_text("a text")
    assert "model.heads=1000000000001" in refuses("tools/generate.py", hf, "--prompt", "a", unchanged=hf)
    assert "model.heads=1000000000001" in refuses("tools/evaluate.py", hf, "--text", text, unchanged=hf)
