"""Text for the comparison of adaptations: general text, a near domain and a far domain, all from files of CPython.

general   modules of the standard library, and their docstrings; the base trains on it
manual    pydoc's chapters of the language reference: English about the same subject
unicode   the Unicode character database, in the format of UnicodeData.txt, which the general text does not contain

A domain is divided by whole parts, modules, chapters or blocks of 256 characters, into `train`; `search`, on which
merges are searched; and `test`, on which models are compared.
"""

import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from domains import write_shards

from trinity.data.prepare.corpus import docstrings, read_modules, topics
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.shuffle import random_key

GENERAL, MANUAL, UNICODE = "general", "manual", "unicode"
NAMES, DOMAINS = (GENERAL, MANUAL, UNICODE), (MANUAL, UNICODE)
TRAIN, SEARCH, TEST = "train", "search", "test"
HELD_OUT = {GENERAL: 0.03, MANUAL: 0.12, UNICODE: 0.06}
"""Share of a domain's parts in `search`, and as many in `test`."""
BLOCK = 256
# Names that are made by rule: UnicodeData.txt has ranges for most of them.
_BY_RULE = ("CJK ", "HANGUL SYLLABLE ", "TANGUT IDEOGRAPH-", "NUSHU CHARACTER-", "KHITAN SMALL SCRIPT CHARACTER-")


class Texts(NamedTuple):
    """The tokenizer's folder, and the shard folder of each domain and split."""

    tokenizer: Path
    shards: dict[str, dict[str, Path]]


def make_texts(out: Path, vocab_size: int, every: int = 1) -> Texts:
    """Write the domains as token shards, with a tokenizer of the general text; reuses finished parts in `out`.

    Args:
        out: folder for documents, tokenizer and shards.
        vocab_size: of the tokenizer.
        every: use every `every`-th part only, for a smaller corpus.
    Raises:
        UserError: `out` has a corpus of other text or settings.
    """
    modules = list(read_modules(Path(sysconfig.get_path("stdlib"))))[::every]
    general = [
        (name, "\n\n".join([source, *(text for _, text in docstrings(name, source))])) for name, source in modules
    ]
    parts = {GENERAL: general, MANUAL: list(chapters())[::every], UNICODE: list(character_blocks())[::every]}
    texts = {name: divide(name, parts[name]) for name in NAMES}
    return Texts(*write_shards(out, texts, [GENERAL], vocab_size, shuffle=True))


def divide(domain: str, parts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Split → its text: whole parts, (name, text), of a domain, in an order that is drawn by their names."""
    ordered = [text for _, text in sorted(parts, key=lambda part: random_key("order", domain, part[0]))]
    count = max(1, round(HELD_OUT[domain] * len(ordered)))
    sides = {TEST: ordered[:count], SEARCH: ordered[count : 2 * count], TRAIN: ordered[2 * count :]}
    return {split: "\n\n".join(texts) for split, texts in sides.items()}


def chapters() -> Iterator[tuple[str, str]]:
    """(name, text) of pydoc's chapters; a paragraph that several have is in the first of them alone."""
    seen: set[str] = set()
    for name, text in topics():
        paragraphs = []
        for paragraph in text.split("\n\n"):
            if paragraph.strip() not in seen:
                paragraphs.append(paragraph)
                seen.add(paragraph.strip())
        if paragraphs:
            yield name, "\n\n".join(paragraphs)


def character_blocks() -> Iterator[tuple[str, str]]:
    """(first code point, lines) of each block of 256 characters with names that are not made by rule."""
    for first in range(0, sys.maxunicode + 1, BLOCK):
        lines = [line for point in range(first, first + BLOCK) if (line := character_line(chr(point)))]
        if lines:
            yield f"{first:04X}", "\n".join(lines) + "\n"


def character_line(character: str) -> str:
    """A character's line in UnicodeData.txt, up to `mirrored`; empty for one without a name of its own."""
    name = unicodedata.name(character, "")
    if not name or name.startswith(_BY_RULE):
        return ""
    numeric = unicodedata.numeric(character, None)
    fields = (
        f"{ord(character):04X}",
        name,
        unicodedata.category(character),
        unicodedata.combining(character),
        unicodedata.bidirectional(character),
        unicodedata.decomposition(character),
        unicodedata.decimal(character, ""),
        unicodedata.digit(character, ""),
        "" if numeric is None else Fraction(numeric).limit_denominator(1000),
        "Y" if unicodedata.mirrored(character) else "N",
    )
    return ";".join(map(str, fields))


def describe(texts: Texts) -> dict[str, Any]:
    """Tokens of each domain and split, and the versions that the text depends on."""
    tokens = {
        name: {split: TokenSource(folder).tokens for split, folder in texts.shards[name].items()} for name in NAMES
    }
    return {"tokens": tokens, "python": sys.version.split()[0], "unicode": unicodedata.unidata_version}
