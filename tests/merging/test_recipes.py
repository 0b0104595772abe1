"""The examples of recipes/ are recipes, each merges, and the folder's page lists them all."""

import re
from pathlib import Path

import pytest

from tests.interop.small_model import CONFIG
from tests.merging.conftest import child
from trinity.interop import export_hf, load_hf
from trinity.merging import merge
from trinity.merging.recipe import read_recipe
from trinity.merging.search.run_search import Search
from trinity.merging.search.search_file import read_search

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_page_lists_them() -> None:
    assert set(re.findall(r"\((\w+\.yaml)\)", (ROOT / "recipes/README.md").read_text())) == {p.name for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example(path: Path, originals: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With models of these names; the stacked one has 24 layers of a small width."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    models = sorted({model.partition(" ")[0] for model in read_recipe(path).models})
    for number, model in enumerate(models):
        if "stacking" in path.name:
            export_hf(child(0, layers=24), tmp_path / model, tokenizer)
            continue
        place = tmp_path / model.replace("runs/", "out/")
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(originals / ("base", "a", "b")[number])
    path = tmp_path / path.name
    path.write_text(text.replace("runs/", "out/"))
    merged = merge(path, tmp_path / "merged")
    assert merged.dropped == 0
    assert load_hf(tmp_path / "merged").config.layers == (32 if "stacking" in path.name else CONFIG.layers)


def test_search_example(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With models and texts of its names it is a search of 8 variables; without `search` it is a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRINITY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    for name, model in (("base", "base"), ("code", "a"), ("math", "b")):
        (tmp_path / "out" / name).symlink_to(originals / model)
    for name in ("code", "math"):
        (tmp_path / f"data/{name}/validation").mkdir(parents=True)
        (tmp_path / f"data/{name}/validation/text.txt").write_text("the rain in Spain " * 9)
    text = (ROOT / "recipes/search/two_domains.yaml").read_text()
    path = tmp_path / "two_domains.yaml"
    path.write_text(text.replace("window: 512", f"window: {CONFIG.max_positions}"))  # toy models have few positions
    assert path.read_text() != text
    file = read_search(path)
    assert len(Search(file, tmp_path / "search").space.variables) == 8
    assert merge(file.recipe, tmp_path / "merged").dropped == 0
