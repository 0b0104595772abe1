"""The pages that a user reads, and the fenced code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "config.md")
"""config.md is generated, and has no commands."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of one language, in order; "" for those that name none."""
    return [code for name, code in _FENCE.findall(page.read_text(encoding="utf-8")) if name == language]
