"""tools/merge.py and tools/average.py as a user calls them."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.merging.conftest import child, recipe, rewrite, tensors_of, write_recipe
from trinity.errors import UserError
from trinity.interop import export_hf
from trinity.merging import merge

TOOLS = Path(__file__).parents[2] / "tools"


def call(tool: str, *words: object) -> int:
    """Run a tool in this process; its exit code."""
    before = sys.argv
    sys.argv = [tool, *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


def test_an_output_that_leads_to_itself(family: Path, capsys: pytest.CaptureFixture) -> None:
    """Or a report below it: one sentence, and nothing is written."""
    path = write_recipe(family / "recipe.yaml", recipe())
    (family / "dam.yaml").write_text("{models: [{model: a, text: a.txt}], rows: 8}")
    (family / "loop").symlink_to("loop")
    before = sorted(family.rglob("*"))
    for words in (
        ("merge.py", path, "loop"),
        ("merge.py", path, "loop/out", "--dry-run"),
        ("merge.py", path, "loop", "--report", "out.html"),
        ("merge.py", path, "out", "--report", "loop/out.html"),
        ("dam.py", "dam.yaml", "loop"),
        ("search_merge.py", "--merge-back", "base", "a", "loop", "--validation", "text=recipe.yaml"),
        ("evaluate.py", "a", "--choices", "loop"),
    ):
        assert call(*words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "loop" in line
        assert "link" in line, words
    with pytest.raises(UserError, match="a symbolic link that leads to itself"):
        export_hf(child(1), family / "loop")
    assert sorted(family.rglob("*")) == before


def test_merge(family: Path, capsys: pytest.CaptureFixture) -> None:
    """The last line accounts for every tensor; a mistake is one line and code 2."""
    path = write_recipe(family / "recipe.yaml", recipe("ties", base=True))
    assert call("merge.py", path, "out", "--dry-run") == 0
    assert "ties for" in capsys.readouterr().out
    assert not (family / "out").exists()
    assert call("merge.py", path, "out", "--workers", 2, "--shard-bytes", "1e5") == 0
    count = len(tensors_of(family / "base"))
    assert capsys.readouterr().out.splitlines()[-1] == f"{3 * count} tensors read, {count} written, 0 dropped"
    assert len(list((family / "out").glob("model-*.safetensors"))) > 1
    assert call("merge.py", path, "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert call("merge.py", path, "out", "--dry-run") == 2
    assert call("merge.py", path, "out", "--workers", 0, "--overwrite") == 2
    assert call("merge.py", path, "out", "--overwrite") == 0


def test_a_dry_run_refuses_what_the_merge_does(family: Path, capsys: pytest.CaptureFixture) -> None:
    """The same sentence and code, and nothing written; and --no-merge checks the folder that was made."""
    path = write_recipe(family / "recipe.yaml", recipe())
    parts = [{"sources": [{"model": "a", "layer_range": [0, 3]}]}, {"sources": [{"model": "b", "layer_range": [2, 5]}]}]
    slices = write_recipe(family / "slices.yaml", {"merge_method": "passthrough", "slices": parts})
    before = sorted(family.iterdir())
    for words in (
        (path, "out", "--workers", 0), (path, "out", "--shard-bytes", -1), (path, "out", "--shard-bytes", "inf"),
        (path, "a", "--overwrite"), (path, "out", "--no-merge", "--report", "x.html"),
        (path, "out.html", "--report", "out.html"), (path, "out", "--report", "recipe.yaml/x.html"),
        (slices, "out", "--report", "x.html"),
    ):  # fmt: skip
        said = []
        for extra in ((), ("--dry-run",)):
            assert call("merge.py", *words, *extra) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1]
    assert sorted(family.iterdir()) == before
    assert call("merge.py", path, "out") == 0
    assert call("merge.py", path, "out", "--dry-run", "--no-merge", "--report", "x.html") == 0
    rewrite(family / "out", lambda tensors: tensors.pop("lm_head.weight"))
    capsys.readouterr()
    assert call("merge.py", path, "out", "--no-merge", "--report", "x.html") == 2
    assert "has no lm_head.weight" in capsys.readouterr().err


def test_notes_are_printed(family: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_recipe(family / "recipe.yaml", recipe("linear", "ab", base=True))
    assert call("merge.py", path, "out") == 0
    assert "note: base gives config and tokenizer, and no weights" in capsys.readouterr().err


def test_average(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    from tests.merging.test_sources import make_run

    run = make_run(tmp_path / "run", tokenizer)
    assert call("average.py", run, tmp_path / "out", "--steps", "4:8", "--decay", "equal", "--dtype", "float32") == 0
    output = capsys.readouterr().out
    assert output.count("weight 0.3333") == 3
    assert output.splitlines()[-1].endswith("0 dropped")
    models = [{"model": f"{run}@{step}", "parameters": {"weight": 1}} for step in (8, 6, 4)]
    merge({"merge_method": "linear", "models": models, "out_dtype": "float32"}, tmp_path / "expected")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert call("average.py", run, tmp_path / "out", "--steps", "4:5") == 2
    assert "select at least two" in capsys.readouterr().err
