"""The documentation pages: their fenced code blocks and their inline code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "config.md")
"""config.md is generated, and has no commands."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of one language, in order; "" for blocks without a language."""
    return [code for name, code in _FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def inline(page: Path) -> list[str]:
    """The inline code outside of code blocks, each on one line."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
