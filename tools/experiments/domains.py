"""Make a corpus of distinct domains, in documents of log-normal length, as token shards.

The text is Python's standard library. Each of its largest packages is a domain, the other modules together are one, and
docstrings with pydoc's topics are a domain of prose. A domain's text is split at line ends into consecutive documents.
Whole modules of every domain are held out for validation, and their docstrings too.
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
# The median is about 500 tokens of a 4,096-token vocabulary; σ is that of ln(characters). Half of the text is in
# documents of at least median·exp(σ²) = 4.2 medians: in web text, books and code a few long documents also hold most of
# the tokens. Not from the report.
MEDIAN_CHARACTERS, SIGMA = 1700, 1.2
SPLITS = ("train", "validation")


class Domain(NamedTuple):
    """All text of one domain: for training, and held out for validation."""

    train: str
    validation: str


class Corpus(NamedTuple):
    """The tokenizer's folder, and for each split the shard folder of every domain."""

    tokenizer: Path
    train: dict[str, Path]
    validation: dict[str, Path]


def make_corpus(out: Path, vocab_size: int, every: int = 1, library: Path | None = None) -> Corpus:
    """Split the domains into documents, train a tokenizer and prepare shards; reuses finished parts in `out`.

    Args:
        out: folder for documents, tokenizer and shards.
        vocab_size: of the tokenizer.
        every: use every `every`-th module only, for a smaller corpus.
        library: folder of modules; default: this Python's standard library.
    Raises:
        UserError: `out` has a corpus of other text or settings.
    """
    modules = list(read_modules(library or Path(sysconfig.get_path("stdlib"))))[::every]
    domains = read_domains(modules)
    texts = {name: dict(zip(SPLITS, domain)) for name, domain in domains.items()}
    tokenizer, folders = write_shards(out, texts, list(domains), vocab_size)
    return Corpus(tokenizer, **{split: {name: folders[name][split] for name in domains} for split in SPLITS})


def write_shards(
    out: Path, texts: dict[str, dict[str, str]], tokenizer_of: list[str], vocab_size: int, shuffle: bool = False
) -> tuple[Path, dict[str, dict[str, Path]]]:
    """Split texts into documents, train a tokenizer and prepare shards; reuses finished parts in `out`.

    Args:
        out: folder for documents, tokenizer and shards.
        texts: domain → split → its text. Each domain has a split `train`.
        tokenizer_of: the domains on whose `train` the tokenizer is trained.
        vocab_size: of the tokenizer.
        shuffle: put the documents of each text in a random order, so that its first rows are of many parts of it.
    Returns:
        the tokenizer's folder; and domain → split → shard folder.
    Raises:
        UserError: `out` has a corpus of other text or settings.
    """
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    keys = [(name, split) for name, of_splits in texts.items() for split in of_splits]
    for name, split in keys:
        of_text = list(split_documents(texts[name][split], f"{name}.{split}"))
        if shuffle:
            of_text.sort(key=lambda document: random_key("shuffle", document))
        lines = (to_json({"text": document}) + "\n" for document in of_text)
        write_atomically(documents / f"{name}.{split}.jsonl", lines)
    tokenizer = out / "tokenizer"
    train_from_files([documents / f"{name}.train.jsonl" for name in tokenizer_of], vocab_size, tokenizer)
    folders: dict[str, dict[str, Path]] = {name: {} for name in texts}
    with tqdm(desc="preparing", total=len(keys), unit="source", disable=None) as bar:
        for name, split in keys:
            folders[name][split] = out / "shards" / name / split
            prepare_data([documents / f"{name}.{split}.jsonl"], tokenizer, folders[name][split])
            bar.update()
    return tokenizer, folders


def read_domains(modules: list[tuple[str, str]]) -> dict[str, Domain]:
    """Domain by name: the PACKAGES largest packages, largest first, then `modules` and `prose`.

    Args:
        modules: (dotted name, source) of each module.
    """
    by_package = defaultdict(list)
    for name, source in modules:
        by_package[name.partition(".")[0]].append((name, source))
    packages = sorted((package for package in by_package.values() if len(package) > 1), key=_characters, reverse=True)
    groups = {package[0][0].partition(".")[0]: package for package in packages[:PACKAGES]}
    groups["modules"] = [module for package in by_package if package not in groups for module in by_package[package]]
    validation_names = {name for group in groups.values() for name in _validation_modules(group)}
    prose = [(name, text) for name, source in modules for _, text in docstrings(name, source)]
    for name, text in topics():
        prose.append((name, text))
        if held_out(name):
            validation_names.add(name)
    return {domain: _domain(parts, validation_names) for domain, parts in (groups | {"prose": prose}).items()}


def _characters(parts: Iterable[tuple[str, str]]) -> int:
    return sum(len(text) for _, text in parts)


def _validation_modules(group: list[tuple[str, str]]) -> Iterator[str]:
    """Names of modules with at least HELD_OUT of a group's text, in a random order that depends on the names alone."""
    remaining = HELD_OUT * _characters(group)
    for name, text in sorted(group, key=lambda module: random_key("held out", module[0]))[:-1]:
        if remaining <= 0:
            break
        remaining -= len(text)
        yield name


def _domain(parts: list[tuple[str, str]], validation_names: set[str]) -> Domain:
    return Domain(
        train="\n\n".join(text for name, text in parts if name not in validation_names),
        validation="\n\n".join(text for name, text in parts if name in validation_names),
    )


def split_documents(text: str, key: str) -> Iterator[str]:
    """Consecutive documents of a text; each ends at the end of the line in which its length is reached.

    Args:
        text: of a domain.
        key: seed of the documents' lengths.
    """
    lengths = np.random.default_rng(random_key("lengths", key))
    begin = 0
    while begin < len(text):
        least = begin + max(1, round(lengths.lognormal(np.log(MEDIAN_CHARACTERS), SIGMA)))
        end = text.find("\n", least - 1) + 1 or len(text)
        yield text[begin:end]
        begin = end


def describe(corpus: Corpus, row: int) -> dict[str, Any]:
    """Statistics of the training documents' lengths in tokens, including BOS.

    Args:
        corpus: from make_corpus.
        row: tokens of a packed row.
    Returns:
        Counts; measured median and σ of the log-normal lengths; and the share of tokens in long documents.
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
