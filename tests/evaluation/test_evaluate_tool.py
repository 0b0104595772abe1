"""tools/evaluate.py as a user calls it: one table on stdout, the same values as JSON, one sentence for a mistake."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import load_tokenizer, token_byte_lengths
from trinity.evaluation.perplexity import ContextWindow, perplexity
from trinity.interop import load_hf

TOOL = Path(__file__).parents[2] / "tools/evaluate.py"


def call(*words: object) -> int:
    """Run the tool in this process; its exit code."""
    before = sys.argv
    sys.argv = ["evaluate.py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


def test_text_shards_and_choices(
    finished: SimpleNamespace, corpus: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Text and the shards made from it give the values of perplexity(); --choices adds its own."""
    text, shards, items = corpus.texts["held_out"], corpus.folder / "held_out", tmp_path / "items.jsonl"
    items.write_text('{"prompt": "def", "choices": [" train", " xyz"], "answer": 0}\n')
    out = tmp_path / "figures.json"
    words = ("--limit", 3, "--window", 16, "--stride", 8, "--json", out)
    assert call(finished.folder, "--text", text, shards, "--choices", items, *words) == 0
    results = json.loads(out.read_text())["results"]
    lengths_V = token_byte_lengths(load_tokenizer(finished.folder))
    expected = perplexity(
        load_hf(finished.folder), TokenSource(shards), ContextWindow(16, 8), byte_lengths_V=lengths_V, documents=3
    )
    assert results[f"perplexity {text}"] == results[f"perplexity {shards}"] == expected
    assert results[f"choices {items}"]["items"] == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["task", "figure", "value"]
    assert ["perplexity", str(shards), "loss", f"{expected['loss']:.6g}"] in lines
    assert len(lines) == 1 + sum(map(len, results.values()))


def test_duplicate_files_are_measured_once(
    finished: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file, a link to it, its folder and a pattern; a question file and a link to it."""
    folder, out = tmp_path / "folder", tmp_path / "figures.json"
    folder.mkdir()
    (folder / "a.txt").write_text("def train(a, b):")
    items = tmp_path / "items.jsonl"
    items.write_bytes(b'\xef\xbb\xbf{"prompt": "def", "choices": [" train", " xyz"], "answer": 0}\n')
    for link, target in (("link.txt", folder / "a.txt"), ("link.jsonl", items)):
        (tmp_path / link).symlink_to(target)
    texts = [folder / "a.txt", tmp_path / "link.txt", folder, folder / "*.txt"]
    choices = ["--choices", items, tmp_path / "link.jsonl"]
    assert call(finished.folder, "--text", *texts, *choices, "--window", 16, "--json", out) == 0
    results = json.loads(out.read_text())["results"]
    assert len(results) == 2
    assert results[f"perplexity {texts[0]}"]["documents"] == 1
    assert capsys.readouterr().err.count("names the same files as one before it, so it is not measured again") == 3


def test_packed_equals_the_validation_loss(finished: SimpleNamespace, tmp_path: Path) -> None:
    """With these options, the value is the run's validation loss."""
    place, out = finished.config.data.validation["held_out"], tmp_path / "figures.json"
    words = ("--packed", "--window", 24, "--limit", 5, "--document-mask", "--no-loss-on-document-start", "--json", out)
    assert call(finished.folder, "--text", place, *words) == 0
    metrics = json.loads(out.read_text())["results"][f"packed {place}"]
    assert abs(metrics["loss"] - finished.last["validation_loss.held_out"]) < 1e-5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "there is nothing to measure; give --text, --choices or --tasks"),
        (("--text", "x.txt", "--window", "0"), "--window 0 must be at least 1"),
        (("--text", "x.txt", "--batch-tokens", "-1"), "--batch-tokens -1 must be at least 1"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--choices", "nowhere.jsonl"), "nowhere.jsonl: No such file or directory"),
        (("--text", "x.txt", "--device", "cuda:77"), "--device cuda:77 is not available; use cpu"),
    ],
)
def test_user_errors_are_one_sentence(
    finished: SimpleNamespace, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    assert call(finished.folder, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
