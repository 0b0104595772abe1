"""Real text of distinct domains, in documents of log-normal length, as token shards.

The text is Python's standard library. Its largest packages are a domain each, all other modules together are one, and
docstrings with pydoc's chapters are one of prose. A domain's text is cut, at ends of lines, into consecutive documents.
Whole modules are held out of every domain, and their docstrings of the prose.
"""

import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from trinity.data.prepare.corpus import docstrings, held_out, read_modules, topics
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.shuffle import random_key
from trinity.data.tokenizer.train import train_from_files
from trinity.io.json_files import to_json
from trinity.io.local import write_atomically

PACKAGES = 12
HELD_OUT = 0.04
# About 500 tokens at 4,096 ids; σ is that of ln(characters). Half of the text is in documents of at least
# median·exp(σ²) = 4.2 medians, as in web, books and code, where a few long documents hold most of the tokens.
MEDIAN_CHARACTERS, SIGMA = 1700, 1.2
SIDES = ("train", "validation")


class Domain(NamedTuple):
    """All text of one domain: what is trained on, and what is held out."""

    train: str
    validation: str


class Corpus(NamedTuple):
    """The tokenizer's folder, and for each side the folder of shards of every domain."""

    tokenizer: Path
    train: dict[str, Path]
    validation: dict[str, Path]


def make_corpus(out: Path, vocab_size: int, every: int = 1, library: Path | None = None) -> Corpus:
    """Cut the domains into documents, learn a tokenizer from them and prepare their shards; what is there stays.

    Args:
        out: folder for documents, tokenizer and shards.
        vocab_size: ids of the tokenizer.
        every: take each so many'th module alone, to try things on less text.
        library: folder of modules; this Python's standard library by default.
    Raises:
        UserError: `out` holds a corpus of other text or settings.
    """
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    modules = list(read_modules(library or Path(sysconfig.get_path("stdlib"))))[::every]
    domains = read_domains(modules)
    for name, domain in domains.items():
        for side, text in zip(SIDES, domain):
            lines = (to_json({"text": document}) + "\n" for document in cut(text, f"{name}.{side}"))
            write_atomically(documents / f"{name}.{side}.jsonl", lines)
    tokenizer = out / "tokenizer"
    train_from_files([documents / f"{name}.train.jsonl" for name in domains], vocab_size, tokenizer)
    folders: dict[str, dict[str, Path]] = {side: {} for side in SIDES}
    with tqdm(desc="preparing", total=len(SIDES) * len(domains), unit="source", disable=None) as bar:
        for side in SIDES:
            for name in domains:
                folders[side][name] = out / "shards" / name / side
                prepare_data([documents / f"{name}.{side}.jsonl"], tokenizer, folders[side][name])
                bar.update()
    return Corpus(tokenizer, **folders)


def read_domains(modules: list[tuple[str, str]]) -> dict[str, Domain]:
    """Domain by name: `modules` and `prose`, and the PACKAGES largest packages, largest first.

    Args:
        modules: (dotted name, source) of each.
    """
    by_package = defaultdict(list)
    for name, source in modules:
        by_package[name.partition(".")[0]].append((name, source))
    packages = sorted((of_one for of_one in by_package.values() if len(of_one) > 1), key=_characters, reverse=True)
    groups = {of_one[0][0].partition(".")[0]: of_one for of_one in packages[:PACKAGES]}
    groups["modules"] = [module for package in by_package if package not in groups for module in by_package[package]]
    held = {name for group in groups.values() for name in _some(group)}
    prose = [(name, text) for name, source in modules for _, text in docstrings(name, source)]
    for name, text in topics():
        prose.append((name, text))
        if held_out(name):
            held.add(name)
    return {domain: _sides(parts, held) for domain, parts in (groups | {"prose": prose}).items()}


def _characters(parts: Iterable[tuple[str, str]]) -> int:
    return sum(len(text) for _, text in parts)


def _some(group: list[tuple[str, str]]) -> Iterator[str]:
    """Names with HELD_OUT of a group's text or a little more, in a random order that depends on the names alone."""
    wanted = HELD_OUT * _characters(group)
    for name, text in sorted(group, key=lambda module: random_key("held out", module[0]))[:-1]:
        if wanted <= 0:
            break
        wanted -= len(text)
        yield name


def _sides(parts: list[tuple[str, str]], held: set[str]) -> Domain:
    sides = ([text for name, text in parts if (name in held) == holding] for holding in (False, True))
    return Domain(*("\n\n".join(texts) for texts in sides))


def cut(text: str, key: str) -> Iterator[str]:
    """A text's documents, one after the other; each ends with the line in which its length is reached.

    Args:
        text: whole.
        key: what the lengths are a function of.
    """
    lengths = np.random.default_rng(random_key("lengths", key))
    begin = 0
    while begin < len(text):
        least = begin + max(1, round(lengths.lognormal(np.log(MEDIAN_CHARACTERS), SIGMA)))
        end = text.find("\n", least - 1) + 1 or len(text)
        yield text[begin:end]
        begin = end


def describe(corpus: Corpus, row: int) -> dict[str, Any]:
    """What the training documents are like, BOS counted.

    Args:
        corpus: prepared.
        row: tokens of a packed row.
    Returns:
        Counts; median and σ of the log-normal that the lengths were measured to be; in how long documents tokens lie.
    """
    sources = {name: TokenSource(folder) for name, folder in corpus.train.items()}
    lengths = np.concatenate([source.lengths(np.arange(source.documents)) for source in sources.values()])
    ordered = np.sort(lengths)
    middle_token = np.searchsorted(ordered.cumsum(), ordered.sum() / 2)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "tokens_of_domains": {name: source.tokens for name, source in sources.items()},
        "median_tokens": float(np.median(lengths)),
        "sigma": float(np.log(lengths).std()),
        "median_token_lies_in_a_document_of": int(ordered[middle_token]),
        "share_of_tokens_in_documents_over_4_rows": float(ordered[ordered > 4 * row].sum() / ordered.sum()),
    }
