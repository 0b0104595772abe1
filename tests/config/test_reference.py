"""docs/config.md is made from the schema and has every key; --help-config prints the same text."""

import importlib.util
from pathlib import Path

import pytest

from trinity.config.changes import RULES, rule_of
from trinity.config.load import flatten
from trinity.config.model import ZOO
from trinity.config.reference import docstrings, from_the_report, page, reference, sections
from trinity.config.run import KernelsConfig, MuonConfig, RunConfig
from trinity.errors import UserError

ROOT = Path(__file__).parents[2]


def test_committed_page_is_current() -> None:
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == page(), "docs/config.md is old; run make docs"
    assert "](docs/config.md)" in (ROOT / "README.md").read_text(encoding="utf-8")[:2000]


def test_every_key_has_an_entry() -> None:
    """With its default and its rule; some entries are compared in full."""
    entries = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("- `")}
    assert set(entries) >= set(flatten(RunConfig()))
    assert {key for key in entries if "[]" in key} == {
        "batch.ramp[].tokens", "batch.ramp[].sequences", *(f"data.phases[].{name}" for name in (
            "tokens", "mixture", "sequence_length", "packing", "rsdb_size", "length_bias")),
    }  # fmt: skip
    assert len(RULES) > 20
    text = " ".join(page().split())
    for key in flatten(RunConfig()):
        entry = text.split(f"- `{key}`: ")[1].split(" - `")[0]
        assert f"on resume: {rule_of(key)}." in entry, key
    assert (
        "- `optim.muon.lr`: number, at least 0; default `0.001`; from the report: yes; on resume: accept. Peak learn"
        in text
    )
    assert "- `run.dir`: text or null; default `null`; from the report: no; on resume: free. Run directory" in text
    assert "- `optim.adamw.betas`: number and number, as a list; default `[0.9, 0.95]`; from the report: no;" in text
    width = ", ".join(f"{name} `{model.width}`" for name, model in ZOO.items())
    assert f"- `model.width`: integer; default by model.name: {width}; from the report: table 1, but for smoke;" in text


def test_from_the_report() -> None:
    """By the docstring, which never has both markers and never the word "ours"."""
    assert from_the_report(docstrings(MuonConfig)["lr"])
    assert not from_the_report(docstrings(MuonConfig)["momentum"])
    assert docstrings(KernelsConfig)["newton_schulz"] == "Newton-Schulz iteration of Muon."
    for _, section in sections():
        for name, doc in docstrings(section).items():
            assert not ("From the report" in doc and "Not from the report" in doc), name
            assert "ours" not in doc.lower().replace("hours", "").split(), name


def test_a_prefix() -> None:
    """A section, one key, the entries of a list; not a name that only shares its beginning."""
    keys = [line.split("`")[1] for line in reference("optim").splitlines() if line.startswith("- `")]
    assert keys == [key for key in (line.split("`")[1] for line in reference().splitlines() if line.startswith("- `"))
                    if key.startswith("optim.")]  # fmt: skip
    assert reference("loss.z").count("- `") == 1
    assert reference("batch.ramp").count("- `") == 3
    assert reference("recompute").count("- `") == 1
    assert reference() in page()
    for key in ("data.train", "data.validation", "data.mixture", "data.phases[].mixture"):
        assert reference(key).count("- `") == 1
    for key in ("data.train", "data.validation", "data.mixture"):
        assert reference(f"{key}.mine") == reference(key)
    for prefix, instead in {
        "optim.mun": "did you mean optim.muon?", "muon": "did you mean optim.muon?",
        "run.step": "did you mean run.steps or init.step?", "batch.size": "did you mean batch.sequences?",
        "run.steps.x": "", "data.train.a.b": "",
        "learning_rate": "did you mean optim.muon.lr or optim.adamw.lr?", "zzz": "the sections are run, model, init,",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as caught:
            reference(prefix)
        assert str(caught.value).startswith(f"no config key begins with {prefix}; {instead}")


def test_several_prefixes() -> None:
    """Each key once, in the order of the page; a prefix without keys is refused."""
    text = reference("recompute", "loss.z", "run.seed", "run", "data.train.mine")
    keys = [line.split("`")[1] for line in text.splitlines() if line.startswith("- `")]
    run = [line.split("`")[1] for line in reference("run").splitlines() if line.startswith("- `")]
    assert keys == [*run, "data.train", "loss.z", "recompute"]
    with pytest.raises(
        UserError, match=r"^no config key begins with run\.step; did you mean run\.steps or init\.step\?$"
    ):
        reference("loss.z", "run.step")


def test_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Without a config, and instead of a run."""
    path = ROOT / "launch/pretrain.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("pretrain_words", path))
    spec.loader.exec_module(module)
    for prefixes in ([], ["optim.muon"], ["loss.z", "run.steps", "data.train.mine"]):
        monkeypatch.setattr("sys.argv", [str(path), "--help-config", *prefixes])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert capsys.readouterr().out == reference(*prefixes)
    monkeypatch.setattr("sys.argv", [str(path), "configs/smoke.yaml", "--help-config", "nonsense"])
    with pytest.raises(UserError, match="no config key begins with nonsense"):
        module.main()
