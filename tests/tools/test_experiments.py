"""tools/experiments/rsdb.py at toy size: its corpus, its batches, its measures, and that no run is done twice."""

import json
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "tools" / "experiments"
sys.path.append(str(EXPERIMENTS))  # no package: its modules are imported as rsdb.py imports them

import domains  # noqa: E402
import rsdb_arms  # noqa: E402
import rsdb_report  # noqa: E402
from domains import Corpus, cut, make_corpus, read_domains  # noqa: E402
from rsdb_arms import ARMS, QUICK, arm_config, take_by_stream  # noqa: E402

from trinity.data.sources.shards import TokenSource  # noqa: E402
from trinity.errors import UserError  # noqa: E402
from trinity.models import Trinity  # noqa: E402
from trinity.training.build_data import open_stream  # noqa: E402

STEPS = 8
WORDS = ("--quick", "--seeds", 1, "--steps", STEPS)
DONE = 0 if find_spec("matplotlib") else 2
"""The code in the end: without matplotlib there is no plot, and everything else."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of a quick experiment."""
    return make_corpus(tmp_path_factory.mktemp("experiment") / "corpus-512", 512, every=24)


@pytest.fixture(scope="module")
def finished(corpus: Corpus) -> tuple[Path, str]:
    """The folder of a quick experiment that is done, and what it printed."""
    out = corpus.tokenizer.parents[1]
    code, output, errors = call("--out", out, *WORDS)
    assert code == DONE, errors
    return out, output


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of rsdb.py, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        output, errors = Lines(), Lines()
        patch.setattr(sys, "argv", ["rsdb.py", *map(str, words)])
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXPERIMENTS / "rsdb.py"), run_name="__main__")
    return end.value.code, "".join(output), "".join(errors)


class Lines(list):
    """A stream that keeps what is written."""

    write, flush, isatty = list.append, staticmethod(lambda: None), staticmethod(lambda: False)


def test_documents_are_the_text_in_pieces() -> None:
    """Nothing is lost, every document ends with a line, and lengths have the log-normal's median and σ.

    Of n = 3000 lengths the median is σ·1.25/√n = 2.7 % uncertain and σ 1.3 %; a line, 10 characters here, is added.
    """
    text = "".join(f"line {number % 10000:04}\n" for number in range(1_000_000))
    documents = list(cut(text, "a"))
    assert "".join(documents) == text
    assert all(document.endswith("\n") for document in documents)
    lengths = np.log([len(document) for document in documents[:-1]])
    assert np.exp(np.median(lengths)) == pytest.approx(domains.MEDIAN_CHARACTERS, rel=0.1)
    assert lengths.std() == pytest.approx(domains.SIGMA, rel=0.1)
    assert documents == list(cut(text, "a"))
    assert documents != list(cut(text, "b"))
    assert list(cut("no line ends", "a")) == ["no line ends"]


def test_domains_hold_out_whole_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages by size, the rest together; what is held out is in no domain's training text, nor its docstrings."""
    monkeypatch.setattr(domains, "PACKAGES", 2)
    monkeypatch.setattr(domains, "topics", lambda: iter(()))
    sizes = {"small": 3, "big": 9, "middle": 6, "alone": 1}
    modules = [
        (f"{package}.m{number}", f'"""The words of {package}{number}, at least forty characters of them."""\n')
        for package, count in sizes.items()
        for number in range(count)
    ]
    found = read_domains(modules)
    assert list(found) == ["big", "middle", "modules", "prose"]
    for name, (train, validation) in found.items():
        packages = {"modules": ("small", "alone"), "prose": tuple(sizes)}.get(name, (name,))
        words = [source.strip('"\n') for module, source in modules if module.startswith(packages)]
        in_train, in_validation = ([text for text in words if text in side] for side in (train, validation))
        assert len(in_train) + len(in_validation) == len(words)
        assert in_train
        assert in_validation
        assert not set(in_train) & set(in_validation)
    held = [found[name].validation.strip('"\n') for name in ("big", "middle", "modules")]
    assert sorted(found["prose"].validation.split("\n\n")) == sorted(held)


@pytest.mark.parametrize("name", ARMS)
def test_microbatches_are_as_workers_make_them(corpus: Corpus, name: str) -> None:
    """With 4 streams each group of 4 rows is one stream's next four; with 48, of four streams. No row is lost."""
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
    """Of all settings only packing and streams; so both arms of 4 streams take the same documents in the same order."""
    configs = [arm_config(arm, corpus, 3, STEPS, QUICK) for arm in ARMS.values()]
    for config in configs:
        config.data.packing, config.data.streams = "sequential", 4
    assert configs[0] == configs[1] == configs[2]
    assert {name: folder.exists() for name, folder in corpus.train.items()} == dict.fromkeys(corpus.validation, True)


def test_batch_het_of_a_run_is_eq_40(corpus: Corpus, finished: tuple[Path, str]) -> None:
    """The first step's, from the loss of each stream's four rows under the first weights: largest minus mean.

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
    """Against their definitions, on curves whose first half must not count; a parabola has no variance about itself."""
    values = [9.0] * 6 + [1.0, 2.0, 4.0, 3.0, 1.0, 7.0]
    run = {"curves": dict.fromkeys(rsdb_arms.CURVES, values), "validation": {"a": 1.0, "b": 4.0}}
    found = rsdb_report.measures(run)
    last = values[6:]
    moments = [sum((value - 3) ** power for value in last) / 6 for power in (2, 4)]
    assert found["batch_het"] == found["loss"] == found["grad_norm"] == 3
    assert found["grad_norm_kurtosis"] == pytest.approx(moments[1] / moments[0] ** 2)
    assert found["validation_loss"] == 2.5
    jumps = [1.0, 2.0, -1.0, -2.0, 6.0]
    assert found["loss_step_variance"] == pytest.approx(sum((jump - 1.2) ** 2 for jump in jumps) / 5 / 2)
    run["curves"]["loss"] = [7.0] * 6 + [step**2 - 3.0 * step for step in range(6)]
    assert rsdb_report.measures(run)["loss_variance"] == pytest.approx(0, abs=1e-20)
    assert rsdb_report.kurtosis(np.random.default_rng(0).normal(size=100_000)) == pytest.approx(3, abs=0.1)


def test_table_and_results(finished: tuple[Path, str]) -> None:
    """The table holds the results' medians; the JSON every curve."""
    out, output = finished
    results = json.loads((out / "rsdb.json").read_text())
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, 0) for arm in ARMS]
    het = [run["measures"]["batch_het"] for run in results["runs"]]
    (row,) = (line for line in output.splitlines() if line.startswith("| BatchHet"))
    cells = [f"{value:.3g} ({value:.3g}–{value:.3g})" for value in het]
    assert [cell.strip() for cell in row.split("|")[2:6]] == [*cells, f"{het[1] / het[0]:.3g}"]
    for run in results["runs"]:
        kept = json.loads((out / "runs" / f"{run['arm']}-0.json").read_text())
        assert run["validation"] == kept["validation"]
        assert run["validation"].keys() == results["corpus"]["tokens_of_domains"].keys()
        for name, values in run["curves"].items():
            assert values == [pytest.approx(value, rel=1e-4) for value in kept["curves"][name]]
            assert len(values) == STEPS


def test_finished_runs_stay_and_others_are_as_uninterrupted(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One of three results is lost: it alone is made again, the same bit for bit, and so is what is printed."""
    out, output = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    lost = again / "runs" / "rsdb-0.json"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.glob("runs/*.json")}
    assert call("--out", again, *WORDS)[:2] == (DONE, output)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert lost.read_bytes() == (out / "runs" / "rsdb-0.json").read_bytes()
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
    """One sentence says what to install; the table has been printed by then."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = {arm: [json.loads((finished[0] / "runs" / f"{arm}-0.json").read_text())] for arm in ARMS}
    with pytest.raises(
        UserError, match=r"the plot needs matplotlib; install it \(pip install -e '\.\[experiments\]'\)"
    ):
        rsdb_report.draw(tmp_path / "plot", runs)
    assert not (tmp_path / "plot").exists()


def test_plot(finished: tuple[Path, str], tmp_path: Path) -> None:
    """An SVG with every arm and panel named; the same runs give the same bytes."""
    pytest.importorskip("matplotlib")
    runs = {arm: [json.loads((finished[0] / "runs" / f"{arm}-0.json").read_text())] for arm in ARMS}
    for name in ("a", "b"):
        rsdb_report.draw(tmp_path / name, runs)
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    for words in (*rsdb_report.TITLES, *(arm.title for arm in ARMS.values())):
        assert words in text


def test_corpus_is_opened_again(corpus: Corpus) -> None:
    """A second call finds everything there and gives the same."""
    index = corpus.train["prose"] / "index.json"
    before = index.stat().st_mtime_ns
    assert make_corpus(corpus.tokenizer.parent, 512, every=24) == corpus
    assert index.stat().st_mtime_ns == before
    found = domains.describe(corpus, 32)
    assert found["tokens"] == sum(TokenSource(folder).tokens for folder in corpus.train.values())
    assert 0 < found["share_of_tokens_in_documents_over_4_rows"] < 1
