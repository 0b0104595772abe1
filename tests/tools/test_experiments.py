"""tools/experiments/rsdb.py at toy size: corpus, batches, measures, and resuming."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import domains
import numpy as np
import pytest
import rsdb_arms
import rsdb_report
import torch
from domains import Corpus, make_corpus, read_domains, split_documents
from rsdb_arms import ARMS, QUICK, arm_config, take_by_stream

from tests.tools.call_experiment import EXIT_CODE, call_experiment
from trinity.data.sources.shards import TokenSource
from trinity.errors import UserError
from trinity.models import Trinity
from trinity.training.build_data import open_stream

STEPS = 8
WORDS = ("--quick", "--seeds", 1, "--steps", STEPS)
call = partial(call_experiment, "rsdb")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of a quick experiment."""
    return make_corpus(tmp_path_factory.mktemp("experiment") / "corpus-512", 512, every=24)


@pytest.fixture(scope="module")
def finished(corpus: Corpus) -> tuple[Path, str]:
    """The folder of a finished quick experiment, and its output."""
    out = corpus.tokenizer.parents[1]
    code, output, errors = call("--out", out, *WORDS)
    assert code == EXIT_CODE, errors
    return out, output


def test_split_documents() -> None:
    """The documents are the whole text, each ends at a line end, and lengths have the log-normal's median and σ.

    For n = 3000 lengths the median's uncertainty is σ·1.25/√n = 2.7 %, that of σ 1.3 %; a line has 10 characters.
    """
    text = "".join(f"line {number % 10000:04}\n" for number in range(1_000_000))
    documents = list(split_documents(text, "a"))
    assert "".join(documents) == text
    assert all(document.endswith("\n") for document in documents)
    lengths = np.log([len(document) for document in documents[:-1]])
    assert np.exp(np.median(lengths)) == pytest.approx(domains.MEDIAN_CHARACTERS, rel=0.1)
    assert lengths.std() == pytest.approx(domains.SIGMA, rel=0.1)
    assert documents == list(split_documents(text, "a"))
    assert documents != list(split_documents(text, "b"))
    assert list(split_documents("no line ends", "a")) == ["no line ends"]


def test_domains_hold_out_whole_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages by size, the other modules together; held-out modules and their docstrings are in no training text."""
    monkeypatch.setattr(domains, "PACKAGES", 2)
    monkeypatch.setattr(domains, "topics", lambda: iter(()))
    sizes = {"small": 3, "big": 9, "middle": 6, "alone": 1}
    modules = [
        (f"{package}.m{number}", f'"""The words of {package}{number}, at least forty characters of them."""\n')
        for package, count in sizes.items()
        for number in range(count)
    ]
    texts = read_domains(modules)
    assert list(texts) == ["big", "middle", "modules", "prose"]
    for name, (train, validation) in texts.items():
        packages = {"modules": ("small", "alone"), "prose": tuple(sizes)}.get(name, (name,))
        words = [source.strip('"\n') for module, source in modules if module.startswith(packages)]
        in_train, in_validation = ([text for text in words if text in side] for side in (train, validation))
        assert len(in_train) + len(in_validation) == len(words)
        assert in_train
        assert in_validation
        assert not set(in_train) & set(in_validation)
    validation_texts = [texts[name].validation.strip('"\n') for name in ("big", "middle", "modules")]
    assert sorted(texts["prose"].validation.split("\n\n")) == sorted(validation_texts)


@pytest.mark.parametrize("name", ARMS)
def test_microbatches_match_loader_workers(corpus: Corpus, name: str) -> None:
    """Each group of 4 rows is from one stream (4 streams) or from four streams (48 streams). No row is lost."""
    config = arm_config(ARMS[name], corpus, 0, STEPS, QUICK)
    stream, plain = open_stream(config, 0, 1), open_stream(config, 0, 1)
    for _ in range(4):
        batch, rows = take_by_stream(stream, 16), plain.take(16)
        order = list(range(16))
        if ARMS[name].streams == 4:
            order = [row for worker in range(4) for row in range(worker, 16, 4)]
        assert torch.equal(batch.tokens_BS, rows.tokens_BS[order])
        assert torch.equal(batch.targets_BS, rows.targets_BS[order])
        assert torch.equal(batch.document_ids_BS, rows.document_ids_BS[order])


def test_arms_differ_in_packing_alone(corpus: Corpus) -> None:
    """Only packing and streams differ, so both arms of 4 streams read the same documents in the same order."""
    configs = [arm_config(arm, corpus, 3, STEPS, QUICK) for arm in ARMS.values()]
    for config in configs:
        config.data.packing, config.data.streams = "sequential", 4
    assert configs[0] == configs[1] == configs[2]
    assert {name: folder.exists() for name, folder in corpus.train.items()} == dict.fromkeys(corpus.validation, True)


def test_batch_het_of_a_run_is_eq_40(corpus: Corpus, finished: tuple[Path, str]) -> None:
    """The first step: largest minus mean loss of each stream's four rows, with the initial weights.

    fp32 sums of 128 losses each, in another order: 1e-5.
    """
    config = arm_config(ARMS["sequential"], corpus, 0, STEPS, QUICK)
    model = Trinity(config.model)
    model.init_weights(0)
    rows = open_stream(config, 0, 1).take(16)
    losses = [
        model(
            rows.tokens_BS[s::4], document_ids_BS=rows.document_ids_BS[s::4], targets_BS=rows.targets_BS[s::4]
        ).ce_BS.mean()
        for s in range(4)
    ]
    curves = json.loads((finished[0] / "runs" / "sequential-0.json").read_text())["curves"]
    assert curves["loss"][0] == pytest.approx(float(sum(losses) / 4), abs=1e-5)
    assert curves["batch_het"][0] == pytest.approx(float(max(losses) - sum(losses) / 4), abs=1e-5)


def test_measures() -> None:
    """Against their definitions; the first half of a curve does not count; a parabola has no variance about itself."""
    values = [9.0] * 6 + [1.0, 2.0, 4.0, 3.0, 1.0, 7.0]
    run = {"curves": dict.fromkeys(rsdb_arms.CURVES, values), "validation": {"a": 1.0, "b": 4.0}}
    results = rsdb_report.measures(run)
    last = values[6:]
    moments = [sum((value - 3) ** power for value in last) / 6 for power in (2, 4)]
    assert results["batch_het"] == results["loss"] == results["grad_norm"] == 3
    assert results["grad_norm_kurtosis"] == pytest.approx(moments[1] / moments[0] ** 2)
    assert results["validation_loss"] == 2.5
    jumps = [1.0, 2.0, -1.0, -2.0, 6.0]
    assert results["loss_step_variance"] == pytest.approx(sum((jump - 1.2) ** 2 for jump in jumps) / 5 / 2)
    run["curves"]["loss"] = [7.0] * 6 + [step**2 - 3.0 * step for step in range(6)]
    assert rsdb_report.measures(run)["loss_variance"] == pytest.approx(0, abs=1e-20)
    assert rsdb_report.kurtosis(np.random.default_rng(0).normal(size=100_000)) == pytest.approx(3, abs=0.1)


def test_table_and_results(finished: tuple[Path, str]) -> None:
    """The table has the medians of the results; the JSON has every curve."""
    out, output = finished
    results = json.loads((out / "rsdb.json").read_text())
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, 0) for arm in ARMS]
    het = [run["measures"]["batch_het"] for run in results["runs"]]
    (row,) = (line for line in output.splitlines() if line.startswith("| BatchHet"))
    cells = [f"{value:.3g}" for value in het]
    assert [cell.strip() for cell in row.split("|")[2:6]] == [*cells, f"{het[1] / het[0]:.3g}"]
    for run in results["runs"]:
        kept = json.loads((out / "runs" / f"{run['arm']}-0.json").read_text())
        assert run["validation"] == kept["validation"]
        assert run["validation"].keys() == results["corpus"]["tokens_of_domains"].keys()
        for name, values in run["curves"].items():
            assert values == [pytest.approx(value, rel=1e-4) for value in kept["curves"][name]]
            assert len(values) == STEPS


def test_resume(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One of three results is deleted: only that run is repeated, with the same bits and the same output."""
    out, output = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    deleted = again / "runs" / "rsdb-0.json"
    deleted.unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.glob("runs/*.json")}
    assert call("--out", again, *WORDS)[:2] == (EXIT_CODE, output)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert deleted.read_bytes() == (out / "runs" / "rsdb-0.json").read_bytes()
    assert (again / "rsdb.json").read_bytes() == (out / "rsdb.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--steps", STEPS + 1), "is a run of other settings; give another --out"),
        (("--steps", 3), "--steps 3 is too few to measure anything; use 8 or more"),
        (("--seeds", 0), "--seeds 0 must be at least 1"),
    ],
)
def test_mistakes(finished: tuple[Path, str], words: tuple, sentence: str) -> None:
    code, output, errors = call("--out", finished[0], *WORDS, *words)
    assert (code, output) == (2, "")
    assert sentence in errors.splitlines()[-1]


def test_without_matplotlib(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install; the table is printed before."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = {arm: [json.loads((finished[0] / "runs" / f"{arm}-0.json").read_text())] for arm in ARMS}
    with pytest.raises(
        UserError, match=r"the plot needs matplotlib; install it \(pip install -e '\.\[experiments\]'\)"
    ):
        rsdb_report.draw(tmp_path / "plot", runs)
    assert not (tmp_path / "plot").exists()


def test_plot(finished: tuple[Path, str], tmp_path: Path) -> None:
    """An SVG with the names of all arms and panels; the same runs give the same bytes."""
    pytest.importorskip("matplotlib")
    runs = {arm: [json.loads((finished[0] / "runs" / f"{arm}-0.json").read_text())] for arm in ARMS}
    for name in ("a", "b"):
        rsdb_report.draw(tmp_path / name, runs)
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    for words in (*rsdb_report.TITLES, *(arm.title for arm in ARMS.values())):
        assert words in text


def test_corpus_is_reused(corpus: Corpus) -> None:
    """A second call with the same arguments writes nothing and returns the same."""
    index = corpus.train["prose"] / "index.json"
    before = index.stat().st_mtime_ns
    assert make_corpus(corpus.tokenizer.parent, 512, every=24) == corpus
    assert index.stat().st_mtime_ns == before
    description = domains.describe(corpus, 32)
    assert description["tokens"] == sum(TokenSource(folder).tokens for folder in corpus.train.values())
    assert 0 < description["share_of_tokens_in_documents_over_4_rows"] < 1
