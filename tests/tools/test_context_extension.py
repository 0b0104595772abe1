"""tools/experiments/context_extension.py at toy size: the task, a resumed experiment, table and plot."""

import json
import shutil
import statistics
from functools import partial
from pathlib import Path

import context_report
import numpy as np
import pytest
import torch
from context_arms import ARMS, FULL, QUICK, arm_config, measure
from context_task import (
    FIRST_KEY,
    FIRST_NOISE,
    FIRST_VALUE,
    KEYS,
    PAIR,
    QUESTION,
    VOCABULARY,
    question_rows,
    training_rows,
)

from tests.tools.call_experiment import EXIT_CODE, call_experiment
from trinity.models import Trinity
from trinity_kernels.cross_entropy import IGNORE

call = partial(call_experiment, "context_extension")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished quick experiment of one seed, and its output."""
    out = tmp_path_factory.mktemp("context")
    code, output, errors = call("--out", out, "--quick", "--seeds", 1)
    assert code == EXIT_CODE, errors
    return out, output


def pairs_of(tokens: list[int]) -> dict[int, int]:
    """key → value of the pairs in a row."""
    starts = [place for place, token in enumerate(tokens) if token == PAIR]
    return {tokens[start + 1]: tokens[start + 2] for start in starts}


@pytest.mark.parametrize(("length", "pairs", "questions"), [(FULL.short, 6, 24), (FULL.long, 6, 24), (40, 8, 5)])
def test_training_rows(length: int, pairs: int, questions: int) -> None:
    """Each target is the value of the key before it, among distinct pairs in noise; nothing else is a target."""
    batch = training_rows(np.random.default_rng(3), 20, length, pairs, questions)
    starts = []
    for tokens, targets in zip(batch.tokens_BS.tolist(), batch.targets_BS.tolist()):
        found = pairs_of(tokens)
        assert len(found) == pairs
        assert all(FIRST_KEY <= key < FIRST_VALUE <= value < FIRST_NOISE for key, value in found.items())
        answered = [place for place, target in enumerate(targets) if target != IGNORE]
        assert answered == [length - 3 * number + 1 for number in range(questions, 0, -1)]
        for place in answered:
            assert tokens[place - 1] == QUESTION
            assert targets[place] == tokens[place + 1] == found[tokens[place]]
        rest = [token for token in tokens[: length - 3 * questions] if token >= FIRST_NOISE]
        assert len(rest) == length - 3 * questions - 3 * pairs
        assert max(rest) < VOCABULARY
        starts.append(tokens.index(PAIR))
    assert len(set(starts)) > 1 or length == 40


def test_question_rows() -> None:
    """The last token is a key of the row; its pair's rank rises evenly; every place of the row is used."""
    rows = question_rows(np.random.default_rng(4), 400, 64, 4)
    ranks = []
    for tokens, answer in zip(rows.tokens_BS.tolist(), rows.answers_B.tolist()):
        found = pairs_of(tokens)
        assert tokens[-2] == QUESTION
        assert found[tokens[-1]] == answer
        ranks.append(list(found).index(tokens[-1]))
    assert ranks == sorted(ranks)
    assert [ranks.count(rank) for rank in range(4)] == [100] * 4
    assert (rows.depths_B.min(), rows.depths_B.max()) == (0, 1)
    assert len(set(rows.tokens_BS[:, -1].tolist())) == KEYS


def test_measure() -> None:
    """A model that answers with the first pair's value is right where that is asked, or has the same value."""

    class First(torch.nn.Module):
        def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
            logits_BSV = torch.zeros(*tokens_BS.shape, VOCABULARY)
            for row, tokens in enumerate(tokens_BS.tolist()):
                logits_BSV[row, -1, next(iter(pairs_of(tokens).values()))] = 50
            return logits_BSV

    scores = measure(First(), 512, 4, 0, 128)
    assert 0.25 <= scores["score"] < 0.45
    assert scores["nats"] == pytest.approx(50 * (1 - scores["score"]), abs=0.1)
    assert scores["by_depth"][0] > 0.6 > scores["by_depth"][3]


def test_model() -> None:
    """Every second layer is global, all are dense, and the local window is smaller than the shortest row."""
    config = arm_config(0, FULL).model
    assert [config.is_global(layer) for layer in range(4)] == [False, True, False, True]
    assert (config.moe_layers, config.window, config.width) == (0, 32, 128)
    assert sum(parameter.numel() for parameter in Trinity(config).parameters()) < 2e6


def test_resume(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Two of three arms are deleted: they alone are repeated, from base's checkpoint, with the same bits."""
    out, output = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    for arm in ARMS[1:]:
        (again / "runs" / f"{arm}-0.json").unlink()
    kept = (again / "runs/base-0.json").stat().st_mtime_ns
    assert call("--out", again, "--quick", "--seeds", 1)[:2] == (EXIT_CODE, output)
    assert (again / "runs/base-0.json").stat().st_mtime_ns == kept
    for name in (*(f"runs/{arm}-0.json" for arm in ARMS), "context_extension.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_table_and_plot(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The table has medians and ranges over seeds; --draw makes table and plot from the JSON alone."""
    results = json.loads((finished[0] / "context_extension.json").read_text())
    other = json.loads(json.dumps(results))
    for run in other["runs"]:
        run["seed"] = 1
        for scores in run["scores"]:
            scores["score"] = 0.75
    results["runs"] += other["runs"]
    path = tmp_path / "both.json"
    path.write_text(json.dumps(results))
    code, output, _ = call("--draw", path)
    assert code == EXIT_CODE
    first = next(run for run in results["runs"] if run["arm"] == "extended")["scores"]
    score = next(s["score"] for s in first if (s["pairs"], s["length"]) == (QUICK.asked_pairs[0], QUICK.lengths[0]))
    low, high = sorted((score, 0.75))
    row = next(line for line in output.splitlines() if f"at {QUICK.long} |" in line)
    assert row.split("|")[3].strip() == f"{statistics.median([score, 0.75]):.2f} ({low:.2f}–{high:.2f})"
    if EXIT_CODE == 0:
        text = path.with_suffix(".svg").read_text()
        assert all(title in text for title in context_report.titles(results).values())


def test_the_loss_falls_where_the_task_is_easy(tmp_path: Path) -> None:
    """The arms train: the mean loss of the last steps of base is below that of the first, in the results."""
    size = QUICK._replace(base_steps=40, extension_steps=1, muon=0.02, adamw=0.01, samples=1, lengths=(32,))
    from context_arms import train_arm

    loss = train_arm("base", 0, size, tmp_path, lambda: None)["loss"]
    assert len(loss) == 40
    assert sum(loss[-5:]) < sum(loss[:5]) - 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--quick", "--seeds", 0), "--seeds 0 must be at least 1"),
        (("--seeds", 1), "is a run of other settings; give another --out"),
        (("--draw", "nowhere.json"), "nowhere.json does not exist; give the JSON file of a finished experiment"),
    ],
)
def test_mistakes(finished: tuple[Path, str], words: tuple, sentence: str) -> None:
    code, output, errors = call("--out", finished[0], *words)
    assert (code, output) == (2, "")
    assert sentence in errors.splitlines()[-1]
