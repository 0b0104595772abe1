"""Every file that the map names is there."""

import re
from pathlib import Path

import pytest

from tests.docs.markdown_pages import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "trinity/README.md"]
FILES = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    """By the end of their path, as the page gives it."""
    named = set(re.findall(r"(?<![\w/.-])[\w/]+\.py\b", (ROOT / page).read_text())) - {"NAME.py", "NAME_triton.py"}
    assert not [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)]


def test_the_tree_names_every_folder() -> None:
    """README.md has a line for each folder of the package."""
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1]
    folders = {path.name for path in (ROOT / "trinity").iterdir() if (path / "__init__.py").exists()}
    assert not [folder for folder in folders if f"  {folder}/" not in tree]
    top = {Path(name).parts[0] for name in FILES if "/" in name}
    assert {"trinity", "kernels", "launch", "tools", "tests"} <= top
    assert not [folder for folder in top if f"{folder}/" not in tree]
