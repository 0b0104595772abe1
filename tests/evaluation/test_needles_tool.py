"""tools/needles.py as a user calls it: table, JSON and picture; finished cells are kept; one sentence for a mistake."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.reporting.page_reader import Page
from trinity.data.tokenizer.tokenizer import load_text_encoder
from trinity.evaluation.needle import Haystack, NeedleTask
from trinity.evaluation.needle_score import Cell, forced
from trinity.evaluation.perplexity import open_documents
from trinity.interop import load_hf

TOOL = Path(__file__).parents[2] / "tools/needles.py"
SAMPLES = 3


def call(*words: object) -> int:
    """Run the tool in this process; its exit code."""
    before = sys.argv
    sys.argv = ["needles.py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


def test_folder(
    finished: SimpleNamespace, corpus: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The cells are those of `forced`; a second call asks the missing ones alone; questions in RULER's format."""
    out, questions, text = tmp_path / "out", tmp_path / "a/questions.jsonl", corpus.texts["held_out"]
    words = (finished.folder, "--haystack", text, "--samples", SAMPLES, "--out", out, "--batch-tokens", 1300)
    assert call(*words, "--lengths", 640, "--kinds", 3) == 0
    assert call(*words, "--lengths", 640, "--kinds", 1) == 0
    results = json.loads((out / "needles.json").read_text())
    spoiled = results["cells"][1] | {"score": 0.75}
    results["cells"][1] = spoiled
    (out / "needles.json").write_text(json.dumps(results))
    assert call(*words, "--lengths", "640,700", "--kinds", "1,3", "--jsonl", questions) == 0
    results = json.loads((out / "needles.json").read_text())
    assert results["cells"][1] == spoiled, "not asked again"
    source = open_documents(str(text), finished.folder, "text", finished.config.model.vocab_size)
    haystack = Haystack.of_source(source, load_text_encoder(finished.folder), str(text))
    model, lines = load_hf(finished.folder), iter(questions.read_text().splitlines())
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for kind, length in ((1, 640), (1, 700), (3, 640), (3, 700)):
        task = NeedleTask(finished.folder, finished.config.model.vocab_size, kind, length, haystack)
        samples = [task.sample(index) for index in range(SAMPLES)]
        cell = Cell.of(forced(model, samples, length, torch.device("cpu")))
        (found,) = (cell for cell in results["cells"] if (cell["kind"], cell["length"]) == (kind, length))
        assert found["nats"] == pytest.approx(cell.nats, rel=1e-5)  # fp32, rows in other batches
        score = 0.75 if (kind, length) == (1, 640) else cell.score
        assert found["score"] == score
        assert found["by_depth"][:SAMPLES] == cell.by_depth[:SAMPLES]
        assert [str(kind), str(length), f"{score:.3f}", f"{cell.error:.3f}", f"{found['nats']:.4g}"] in table
        for index, sample in enumerate(samples):
            line = json.loads(next(lines))
            assert (line["index"], line["task"], line["length"]) == (index, f"niah_multikey_{kind}", length)
            assert (line["input"], line["answer_prefix"]) == (sample.prompt, sample.answer_prefix)
            assert line["outputs"] == [sample.value]
    page = Page(out / "needles.html")
    assert list(page.figures) == ["MK-NIAH 1", "MK-NIAH 3"]
    assert page.figures["MK-NIAH 1"]["data"][0]["x"] == ["640", "700"]


def test_run_and_greedy(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run directory gives the nats of the folder exported from it; greedy decoding has no nats, and RULER's score."""
    words = (uninterrupted, "--lengths", 600, "--kinds", 2, "--samples", 2)
    assert call(*words, "--out", tmp_path / "forced") == 0
    assert call(*words, "--scoring", "greedy", "--out", tmp_path / "greedy") == 0
    (forced_cell,) = json.loads((tmp_path / "forced/needles.json").read_text())["cells"]
    (greedy_cell,) = json.loads((tmp_path / "greedy/needles.json").read_text())["cells"]
    assert greedy_cell["begins"] == forced_cell["score"]
    assert greedy_cell["nats"] is None
    assert "substring" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--lengths", "4096"), "--lengths 4096 is more than the model's 2048 positions; give 2048 or less"),
        (("--lengths", "four"), "--lengths four is not a list of numbers; write for example --lengths 4096,8192"),
        (("--lengths", "640", "--kinds", "1,4"), "--kinds 4 is no kind of needles; use 1, 2, 3"),
        (("--lengths", "64"), "--lengths 64 has no room for the needles and the question of kind 1, which take"),
        (("--lengths", "640", "--samples", "0"), "--samples 0 must be at least 1"),
        (("--lengths", "640", "--haystack", "none.txt"), "--haystack none.txt"),
        (("--lengths", "640", "--kinds", "x"), "--kinds x is not a list of numbers; write for example --kinds 1,3"),
        (("--lengths", "640", "--device", "meta"), "--device meta is not available; use cpu"),
        (("--lengths", "640", "--device", "tpu"), "--device tpu is not available; use cpu"),
    ],
)
def test_mistakes(
    finished: SimpleNamespace, words: tuple, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call(finished.folder, *words, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert sentence in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_kept(
    finished: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Another seed needs another folder, or --force."""
    words = (finished.folder, "--lengths", 600, "--kinds", 2, "--samples", 1, "--out", tmp_path)
    assert call(*words) == 0
    before = (tmp_path / "needles.json").read_bytes()
    assert call(*words, "--seed", 1) == 2
    assert "has results with other settings (seed); give another --out, or --force" in capsys.readouterr().err
    assert (tmp_path / "needles.json").read_bytes() == before
    assert call(*words, "--seed", 1, "--force") == 0
    assert (tmp_path / "needles.json").read_bytes() != before


def test_files_that_exist_are_kept(finished: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The questions are not written over a file, nor the results over what is no file of results."""
    text, out = tmp_path / "books.jsonl", tmp_path / "out"
    text.write_text(json.dumps({"text": "One book. " * 400}) + "\n")
    before = text.read_bytes()
    words = (finished.folder, "--lengths", 600, "--kinds", 2, "--samples", 1, "--out", out)
    assert call(*words, "--jsonl", text) == 2
    assert f"--jsonl {text} exists; give another file, or --force" in capsys.readouterr().err
    assert call(*words, "--haystack", text, "--jsonl", text, "--force") == 2
    assert f"--jsonl {text} is the haystack" in capsys.readouterr().err
    assert text.read_bytes() == before
    out.mkdir()
    for content, sentence in (
        ("{", "remove this file, or give --force"),
        ('{"settings": 3, "cells": []}', "is not a file of results; give another --out, or --force"),
        ('{"settings": {}, "cells": [{"kind": 1}]}', "is not a file of results; give another --out, or --force"),
    ):
        (out / "needles.json").write_text(content)
        assert call(*words) == 2
        assert sentence in capsys.readouterr().err
        assert (out / "needles.json").read_text() == content
    assert call(*words, "--force") == 0


def test_a_narrower_call_keeps_the_picture(finished: SimpleNamespace, tmp_path: Path) -> None:
    words = (finished.folder, "--kinds", 2, "--samples", 1, "--out", tmp_path)
    assert call(*words, "--lengths", "600,640") == 0
    assert call(*words, "--lengths", "600") == 0
    assert Page(tmp_path / "needles.html").figures["MK-NIAH 2"]["data"][0]["x"] == ["600", "640"]


def test_another_run_in_the_same_place(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint is identified by the checksums of its files, not by its step alone."""
    words = (uninterrupted, "--lengths", 600, "--kinds", 2, "--samples", 1, "--out", tmp_path)
    assert call(*words) == 0
    results = json.loads((tmp_path / "needles.json").read_text())
    weights = results["settings"]["weights"]
    complete = uninterrupted / f"checkpoints/step_{weights['step']:08d}/COMPLETE"
    listed = json.loads(complete.read_text())["files"]
    assert weights["files"] == {name: [entry["bytes"], entry["crc32"]] for name, entry in listed.items()}
    weights["files"][".metadata"][1] = "00000000"  # of another run
    (tmp_path / "needles.json").write_text(json.dumps(results))
    assert call(*words) == 2
    assert "has results with other settings (weights)" in capsys.readouterr().err
