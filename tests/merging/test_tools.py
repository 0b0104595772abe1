"""tools/merge.py and tools/average.py as a user calls them."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.merging.conftest import recipe, tensors_of, write_recipe
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
