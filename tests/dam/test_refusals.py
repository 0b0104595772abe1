"""What a user may get wrong: one sentence that says what to write, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dam.conftest import write_text
from tests.forked_program import ROOT
from tests.merging.conftest import child, edit_json, rewrite
from tests.merging.test_tools import call
from trinity.dam import adaptive_merge, read_config
from trinity.dam.coefficients import save_coefficients
from trinity.dam.config import DamConfig, SourceModel
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.errors import UserError
from trinity.interop import export_hf

WRONG_WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown word": ({"granularty": "column"}, "did you mean granularity"),
    "unknown granularity": ({"granularity": "row"}, "granularity is 'row'; write one of column, tensor, group"),
    "unknown part": ({"learn": ["attention", "mlp"]}, "learn names 'mlp'; write a list of attention, ffn"),
    "nothing to learn": ({"learn": []}, "learn is empty"),
    "no models": ({"models": []}, "list the models to merge"),
    "a model without a name": ({"models": [{"text": "a.txt"}]}, r"models\[0\] names no model"),
    "a word of a model": ({"models": [{"model": "a", "txt": "a.txt"}]}, r"models\[0\].txt .*did you mean text"),
    "no text": ({"models": ["a", "b"]}, "no model has a text"),
    "a teacher without a text": ({"models": [{"model": "a", "weights": False}]}, "so it does nothing"),
    "teachers alone": ({"models": [{"model": "a", "text": "a.txt", "weights": False}]}, "weights: false everywhere"),
    "zero rows": ({"rows": 0}, "rows is 0; write a whole number of at least 1"),
    "rows that do not divide": ({"rows": 10}, "rows: 10 does not divide by sequences: 4; write rows: 8"),
    "no rate": ({"lr": 0}, "lr is 0; write a number above 0"),
    "a negative penalty": ({"l1": -1}, "l1 is -1"),
    "a word of the mesh": ({"parallel": {"context": 2}}, "parallel.context"),
    "a number for a word": ({"recompute": 1}, "recompute is 1; write true or false"),
}


def test_the_example_is_known() -> None:
    """recipes/dam/dam.yaml: three models, each with a text."""
    config = read_config(ROOT / "recipes" / "dam" / "dam.yaml")
    assert len(config.mixed) == len(config.texts) == 3
    assert config.steps == 250


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_wrong_words(settings: Callable, name: str) -> None:
    change, message = WRONG_WORDS[name]
    with pytest.raises(UserError, match=message):
        read_config(settings("ab") | change)


def other_sizes(family: Path) -> None:
    export_hf(child(1, expert_width=8), family / "b", family / "a", torch.float32, overwrite=True)


def other_tokenizer(family: Path) -> None:
    save_tokenizer(train_tokenizer(["a quite different text of other words, and of commas"] * 3, 270), family / "b")


def dense_models(family: Path) -> None:
    for seed, name in enumerate("ab"):
        export_hf(child(seed, dense_layers=5), family / name, family / "c", torch.float32, overwrite=True)


def no_tokenizer(family: Path) -> None:
    for name in "ab":
        (family / name / "tokenizer.json").unlink()


WRONG_FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no such model": (lambda family: None, {"models": [{"model": "z", "text": "a.txt"}]}, "z"),
    "a model twice": (lambda family: None, {"models": [{"model": "a", "text": "a.txt"}, "a"]}, "lists a twice"),
    "other sizes": (other_sizes, {}, "different architectures"),
    "other tokenizer": (other_tokenizer, {}, "tokenizer"),
    "nothing to learn": (dense_models, {"learn": ["router", "experts"]}, "the models have no MoE layer; write a list"),
    "no tokenizer": (no_tokenizer, {}, "has no tokenizer.json"),
    "a tensor is missing": (lambda family: rewrite(family / "b", lambda t: t.pop("lm_head.weight")), {}, "lm_head"),
    "no such text": (lambda family: (family / "a.txt").unlink(), {}, "a.txt"),
    "few rows": (lambda family: None, {"rows": 4000}, "rows of 24 tokens, and rows is 4000; write rows: "),
    "two short texts": (
        lambda family: write_text(family / "b.txt", 1, lines=20),
        {"rows": 4000},
        "b.txt has .* and rows is 4000",
    ),
    "a short text": (lambda family: write_text(family / "a.txt", 0, lines=1), {}, "give more text"),
    "a long window": (lambda family: None, {"window": 65}, "more than the model's 64 positions"),
    "a mesh that does not fit": (lambda family: None, {"parallel": {"shard": 3}}, "parallel.shard"),
    "no coefficients": (lambda family: None, {"start": "b"}, "holds no coefficients"),
    "something else in OUT_DIR": (lambda family: write_other(family / "out"), {}, "not an earlier export"),
}


def write_other(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(family: Path, settings: Callable, name: str) -> None:
    """Nothing appears beside the models."""
    damage, change, message = WRONG_FILES[name]
    damage(family)
    before = sorted(str(path) for path in family.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        adaptive_merge(read_config(settings("ab") | change), "out")
    assert "\n" not in str(error.value)
    assert sorted(str(path) for path in family.rglob("*")) == before


def test_shards_of_another_tokenizer(family: Path, settings: Callable) -> None:
    """Shards know the tokenizer that made them."""
    save_tokenizer(train_tokenizer(["a quite different text of other words, and of commas"] * 3, 270), family / "other")
    assert call("prepare_data.py", "--input", "a.txt", "--tokenizer", "other", "--out", "shards") == 0
    models = [{"model": "a", "text": "shards"}, {"model": "b", "text": "b.txt"}]
    with pytest.raises(UserError, match=r"models\[0\].text shards was made with another tokenizer"):
        adaptive_merge(read_config(settings("ab") | {"models": models}), "out")


def test_coefficients_of_other_models(family: Path, settings: Callable) -> None:
    """Of another model, by column where one number is wanted, of unknown tensors; of the same ones: taken."""
    from trinity.dam.load import identity
    from trinity.merging.sources import FolderSource

    def saved(names: str, **values: torch.Tensor) -> None:
        config = DamConfig([SourceModel(name) for name in names])
        found = [identity(FolderSource(name, family / name)) for name in names]
        save_coefficients(family / "start.safetensors", values, config, found)

    content = settings("ab", start="start.safetensors", rows=4, learn=["head"])
    saved("ac", **{"lm_head.weight": torch.ones(2, 24)})
    with pytest.raises(UserError, match=r"coefficients of other models .*list the same models"):
        adaptive_merge(read_config(content), "out")
    saved("ab", **{"lm_head.weight": torch.ones(2, 24)})
    with pytest.raises(UserError, match="write granularity: column"):
        adaptive_merge(read_config(content | {"granularity": "tensor"}), "out")
    saved("ab", **{"model.other.weight": torch.ones(2, 24)})
    with pytest.raises(UserError, match=r"does not fit the models \(model.other.weight\)"):
        adaptive_merge(read_config(content), "out")
    saved("ab", **{"model.norm.weight": torch.tensor([[0.25], [0.5]])})
    assert adaptive_merge(read_config(content), "out") == 0
    from safetensors.torch import load_file

    assert load_file(family / "out" / "coefficients.safetensors")["model.norm.weight"].tolist()[0] == [0.25] * 24


def test_an_unfinished_run_of_other_settings(family: Path, settings: Callable) -> None:
    """Settings, a text, or weights that changed since."""
    from trinity.dam.run import prepare
    from trinity.io.json_files import write_json

    prepared = prepare(read_config(settings("ab")), "out")
    prepared.work.mkdir()
    write_json(prepared.work / "dam.json", prepared.mark())
    prepare(read_config(settings("ab", save_every=7)), "out")
    with pytest.raises(UserError, match=r"unfinished run with other settings \(lr\); remove that folder"):
        prepare(read_config(settings("ab", lr=0.5)), "out")
    text = (family / "a.txt").read_text()
    (family / "a.txt").write_text(text.replace("rain", "mainly"))
    with pytest.raises(UserError, match=r"other settings \(the content of a text\)"):
        prepare(read_config(settings("ab")), "out")
    (family / "a.txt").write_text(text)
    prepare(read_config(settings("ab")), "out")
    rewrite(family / "a", lambda tensors: tensors["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match="the models' weights"):
        prepare(read_config(settings("ab")), "out")


def test_the_tool(family: Path, settings: Callable, capsys: pytest.CaptureFixture) -> None:
    """A mistake is one line and code 2; a dry run writes nothing; a run says where its result is."""
    import yaml

    (family / "DAM.yaml").write_text(yaml.safe_dump(settings("ab", lr=1e-3)).replace("0.001", "1e-3"))
    assert call("dam.py", "none.yaml", "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert call("dam.py", "DAM.yaml", "out", "--dry-run") == 0
    assert "steps:    2 of 4 rows" in capsys.readouterr().out
    assert not (family / "out").exists()
    assert call("dam.py", "DAM.yaml", "out") == 0
    assert "0 dropped" in capsys.readouterr().err
    assert call("dam.py", "DAM.yaml", "out") == 2
    capsys.readouterr()
    assert call("dam.py", "DAM.yaml", "a", "--overwrite") == 2
    assert "is a model of this merge (a), which it may not replace" in capsys.readouterr().err
    edit_json(family / "b" / "config.json", route_scale=7.0)
    assert call("dam.py", "DAM.yaml", "out", "--overwrite") == 2
