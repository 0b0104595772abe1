"""tools/experiments/adapt.py at toy size: texts, figures against computations by hand, a resumed experiment, tables."""

import copy
import json
import math
import shutil
import statistics
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

pytest.importorskip("cma", reason="the searches of the experiment need it")


import adapt_report
import experiment
from adapt_merge import RECIPES
from adapt_parts import PARTS
from adapt_texts import (
    BLOCK,
    DOMAINS,
    NAMES,
    SEARCH,
    TEST,
    TRAIN,
    Texts,
    chapters,
    character_blocks,
    character_line,
    divide,
)
from adapt_train import FULL, QUICK, SCORES, SHARES, measure, random_scores, run_config
from adapt_train import shards as shards_of
from experiment import Lab, Part

from tests.tools.call_experiment import EXIT_CODE, EXPERIMENTS, call_experiment
from trinity.data.prepare.corpus import topics
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.validation import validation_sequences
from trinity.data.tokenizer.tokenizer import load_tokenizer
from trinity.interop import load_hf
from trinity.io.local import file_lock
from trinity.merging.open_source import open_source
from trinity.models import Trinity
from trinity.spectrum.modules import find_modules, find_units
from trinity.spectrum.select import choose
from trinity_kernels.cross_entropy import IGNORE

WORDS = ("--quick", "--seeds", 1)
call = partial(call_experiment, "adapt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished quick experiment of one seed, and its output."""
    out = tmp_path_factory.mktemp("adapt") / "out"
    code, output, errors = call("--out", out, *WORDS)
    assert code == EXIT_CODE, errors
    return out, output


@pytest.fixture(scope="module")
def lab(finished: tuple[Path, str]) -> Lab:
    """What the parts of that seed share."""
    texts = finished[0] / f"texts-{QUICK.vocabulary}"
    shards = {name: {split: texts / "shards" / name / split for split in (TRAIN, SEARCH, TEST)} for name in NAMES}
    return Lab(QUICK, 0, Texts(texts / "tokenizer", shards), finished[0] / "seed-0", lambda: None)


def records(out: Path) -> dict[str, dict]:
    """Part → its record in the results file, without times."""
    parts = json.loads((out / "adapt.json").read_text())["parts"]
    times = ("seconds", "step_seconds")
    return {each["part"]: {key: value for key, value in each.items() if key not in times} for each in parts}


def test_parts_of_a_domain_are_divided_whole() -> None:
    """Each part is in exactly one split, in an order of its own, and every split has some."""
    parts = [(f"name {number}", f"text {number};") for number in range(100)]
    sides = divide("manual", parts)
    assert {side: text.count(";") for side, text in sides.items()} == {TRAIN: 76, SEARCH: 12, TEST: 12}
    found = [text for side in sides.values() for text in side.split("\n\n")]
    assert sorted(found) == sorted(text for _, text in parts)
    assert divide("manual", reversed(parts)) == sides
    assert all(divide("general", parts[:3]).values())


def test_no_paragraph_of_the_manual_is_in_two_chapters() -> None:
    """Chapters of the reference contain others: without this, test text would be trained on."""
    paragraphs = [each.strip() for _, text in chapters() for each in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert set(paragraphs) == {each.strip() for _, text in topics() for each in text.split("\n\n")}


def test_unicode_lines() -> None:
    """Lines of UnicodeData.txt, whose last fields are left out; characters without a name of their own have none."""
    lines = {
        "A": "0041;LATIN CAPITAL LETTER A;Lu;0;L;;;;;N", "0": "0030;DIGIT ZERO;Nd;0;EN;;0;0;0;N",
        "½": "00BD;VULGAR FRACTION ONE HALF;No;0;ON;<fraction> 0031 2044 0032;;;1/2;N",
        "ä": "00E4;LATIN SMALL LETTER A WITH DIAERESIS;Ll;0;L;0061 0308;;;;N",
        "(": "0028;LEFT PARENTHESIS;Ps;0;ON;;;;;Y", "\n": "", "一": "", "한": "",
    }  # fmt: skip
    assert {character: character_line(character) for character in lines} == lines
    blocks = dict(character_blocks())
    assert all(int(first, 16) % BLOCK == 0 for first in blocks)
    assert lines["ä"] in blocks["0000"].splitlines()


def test_losses_are_nats_per_byte(lab: Lab) -> None:
    """Against a forward pass of all rows at once, and the bytes of the decoded targets; fp32 sums: 1e-5."""
    model, tokenizer = load_hf(lab.path("base")), load_tokenizer(lab.texts.tokenizer)
    for name, loss in measure(model, lab).items():
        rows = list(validation_sequences(TokenSource(shards_of(lab, name, TEST)), QUICK.row, QUICK.test_rows))
        targets_BS = torch.stack([row.targets for row in rows]).long()
        with torch.no_grad():
            logits_BSV = model(torch.stack([row.tokens for row in rows]).long()).float()
        nats = torch.nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum", ignore_index=IGNORE
        )
        # a piece of a character decodes to a replacement of other length: take whole rows
        size = sum(len(tokenizer.decode(row[row != IGNORE].tolist()).encode()) for row in targets_BS)
        assert loss == pytest.approx(float(nats) / size, rel=1e-5)


def test_merges_are_those_that_their_names_say(lab: Lab, finished: tuple[Path, str]) -> None:
    """Means and sums of differences, made by hand from the folders; routing may turn by a rounding, so 1e-4."""
    found = records(finished[0])
    base, manual, unicode = (load_hf(lab.path(name)) for name in ("base", *DOMAINS))
    states = [model.state_dict() for model in (base, manual, unicode)]

    def losses(weights: tuple[float, float, float]) -> dict[str, float]:
        merged = Trinity(base.config)
        merged.load_state_dict({key: sum(w * state[key] for w, state in zip(weights, states)) for key in states[0]})
        return measure(merged, lab)

    parts = ("attention", "experts", "router", "rest")
    assert list(found["merge_cma_es"]["values"]) == [f"weight of {name}, {part}" for name in DOMAINS for part in parts]
    alpha = found["manual_back_alpha"]["values"]["weight of manual"]
    expected = {
        "base": (1, 0, 0), "merge_soup": (0, 0.5, 0.5), "merge_soup_base": (1 / 3, 1 / 3, 1 / 3),
        "merge_task_arithmetic": (-1, 1, 1), "manual_back_mean": (0.5, 0.5, 0),
        "manual_back_alpha": (1 - alpha, alpha, 0),
    }  # fmt: skip
    for part, weights in expected.items():
        assert found[part]["losses"] == pytest.approx(losses(weights), rel=1e-4), part
    assert RECIPES.keys() == {name.removeprefix("merge_") for name in PARTS if name.startswith("merge_")} - {
        "cma_es", "dam", "dam_base"
    }  # fmt: skip


def test_modules(lab: Lab, finished: tuple[Path, str]) -> None:
    """Random modules are as many of each type as mp's; what is frozen has neither gradient nor state."""
    found = records(finished[0])
    source = open_source(lab.path("base"))
    units = find_units(source, find_modules(source))
    by_name = {unit.name: unit for unit in units}
    chosen = found["modules"]["chosen"]
    assert chosen.keys() == {f"{how}{share}" for how in SCORES for share in SHARES}
    for share in SHARES:
        types = [sorted(by_name[name].type for name in chosen[f"{how}{share}"]) for how in ("mp", "random")]
        assert types[0] == types[1]
        for domain in DOMAINS:
            assert found[f"{domain}_mp{share}"]["trained"] == found[f"{domain}_random{share}"]["trained"]
    draws = [[unit.name for unit in choose(units, random_scores(units, seed), "mp", 50)] for seed in range(8)]
    assert len(set(map(tuple, draws))) > 1
    for part in ("manual", "manual_mp50", "unicode_script25", "unicode_random50"):
        record = found[part]
        assert record["gradient_bytes"] == 4 * record["trained"]
        assert record["parameters"] == sum(each.numel() for each in load_hf(lab.path("base")).parameters())
        whole = part == "manual"
        assert (record["trained"] == record["parameters"]) == whole
        assert (record["optimizer_bytes"] == found["manual"]["optimizer_bytes"]) == whole


def test_replay_and_rates(lab: Lab) -> None:
    """Without replay there is one source; with it an eighth is general text; rates are a quarter of the base's."""
    base = run_config(lab, 10, {"general": 1.0}, 1.0, [])
    config = run_config(lab, 10, {"manual": 0.875, "general": 0.125}, FULL.rate, [])
    assert config.data.mixture == {"manual": 1 - FULL.replay, "general": FULL.replay}
    assert config.optim.muon.lr == base.optim.muon.lr / 4
    assert config.optim.adamw.lr == base.optim.adamw.lr / 4
    assert [config.data.document_mask, config.run.seed, config.run.threads] == [False, 0, 1]


def test_interrupted_experiment_continues(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are lost, and half-made folders left: the next calls make the missing parts alone, with the same bits."""
    again = tmp_path / "again"
    shutil.copytree(finished[0], again)
    lost = ("manual", "unicode_mp25", "unicode_back_parts", "merge_dare_ties", "merge_cma_es", "merge_dam")
    for name in lost:
        (again / "parts" / f"0-{name}.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.glob("parts/*.json")}
    for name in ("search", ".dam.dam", "dam"):  # of killed parts
        (again / "seed-0" / name).mkdir()
        (again / "seed-0" / name / "rest").write_text("half-made")
    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "merge_cma_es", Part(1, _interrupt))
        code, output, errors = call("--out", again, *WORDS)
    assert (code, output) == (130, "")
    assert "run the same command again to continue" in errors
    assert (again / "parts" / "0-merge_dare_ties.json").exists()
    assert not (again / "parts" / "0-merge_cma_es.json").exists()
    assert call("--out", again, *WORDS)[0] == EXIT_CODE
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert records(again) == records(finished[0])
    assert list(records(again)) == list(PARTS)


def _interrupt(*_: object) -> dict:
    raise KeyboardInterrupt


def test_tables_are_of_the_results_file(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Three seeds made by shifting one: the cells are medians and ranges of the file's own figures."""
    results = json.loads((finished[0] / "adapt.json").read_text())
    one = list(results["parts"])
    for seed, factor in ((1, 2.0), (2, 4.0)):
        for record in copy.deepcopy(one):
            record["losses"] = {name: factor * value for name, value in record.get("losses", {}).items()}
            results["parts"].append(record | {"seed": seed})
    path = tmp_path / "adapt.json"
    path.write_text(json.dumps(results))
    code, output, errors = call("--draw", path)
    assert code == EXIT_CODE, errors
    rows = {
        line.split("|")[1].strip(): [each.strip() for each in line.split("|")[2:-1]]
        for line in output.splitlines()
        if "|" in line
    }
    losses = {record["part"]: record.get("losses") for record in one}
    total = math.fsum(losses["merge_soup"].values())
    assert rows["mean"][3] == f"{2 * total:.3f} ({total:.3f}–{4 * total:.3f})"
    change = losses["unicode_back_ties"]["general"] - losses["base"]["general"]
    low, high = sorted((change, 4 * change))
    assert rows["replay, back: TIES"][3] == f"{2 * change:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    trained = [record["trained"] / record["parameters"] for record in one if record["part"].endswith("_mp50")]
    assert rows["mp, 50 %"][0] == f"{100 * statistics.median(trained):.0f}"
    for titles in (adapt_report.CONTINUED, adapt_report.MODULES, adapt_report.MERGES):
        assert rows.keys() >= set(titles.values())
    shown = {f"{domain}{end}" for domain in DOMAINS for end in (*adapt_report.CONTINUED, *adapt_report.MODULES)}
    assert shown | adapt_report.MERGES.keys() | {"modules", "step_times"} == PARTS.keys()
    assert "3 seeds" in output


def test_draw_needs_the_file_alone(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The same output and the same plot, without anything else of the experiment."""
    shutil.copy(finished[0] / "adapt.json", tmp_path / "adapt.json")
    assert call("--draw", tmp_path / "adapt.json")[:2] == (EXIT_CODE, finished[1])
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.suffix == ".json"] == ["adapt.json"]
    if EXIT_CODE == 0:
        assert (tmp_path / "adapt.svg").read_bytes() == (finished[0] / "adapt.svg").read_bytes()
        text = (tmp_path / "adapt.svg").read_text()
        for words in (*adapt_report.SERIES, *adapt_report.MERGES.values()):
            assert words in text


def test_mistakes(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong options, another experiment's file, results of other settings, a folder in use, a missing package."""

    def refused(sentence: str, *words: object) -> None:
        code, output, errors = call(*words)
        assert (code, output) == (2, "")
        assert sentence in errors.splitlines()[-1]

    out, again = finished[0], tmp_path / "again"
    refused("--seeds 0 must be at least 1", "--out", out, *WORDS, "--seeds", 0)
    refused("does not exist; give the JSON file", "--draw", tmp_path / "none.json")
    refused("is not a results file of the experiment adapt", "--draw", EXPERIMENTS / "results" / "rsdb.json")
    with file_lock(out):
        refused("is being written by another process", "--out", out, *WORDS)
    shutil.copytree(out, again)
    path = again / "parts" / "0-base.json"
    content = json.loads(path.read_text())
    content["settings"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    refused("has other settings, or was made by other versions", "--out", again, *WORDS)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(experiment, "version", missing)
    refused("the experiment needs torch; install it (pip install torch)", "--out", out, *WORDS)
