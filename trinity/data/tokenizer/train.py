"""Training a tokenizer from files, once: the same command again finds it there.

More text than is wanted is sampled: documents are taken by a hash of their place, so that the sample is spread evenly
over all inputs and is the same every time. Which hashes fit is found by a first pass that only adds up bytes; the
second hands the chosen documents to the trainer, one at a time. So neither holds more than a document and some
megabytes of counts, and what the trainer holds, its table of distinct words, is bounded by the sample.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trinity.data.sources.documents import AnyPaths, Document, Position
from trinity.data.sources.inputs import FileInputs, expand_inputs
from trinity.data.sources.progress import noting_empty_files, read_with_bar
from trinity.data.tokenizer.tokenizer import pad_vocabulary, save_tokenizer, train_tokenizer
from trinity.errors import UserError
from trinity.io.json_files import read_json, write_json

MADE_FROM = "made_from.json"
# A sample is whole buckets of documents, so it misses what was asked by up to a millionth of the text, or a document.
BUCKETS = 1 << 20


def train_from_files(
    inputs: Sequence[Path | str],
    vocab_size: int,
    out: Path,
    *,
    field: str = "text",
    kind: str | None = None,
    sample_bytes: int | None = None,
    seed: int = 0,
    pad_to_multiple: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> bool:
    """Train a tokenizer on the documents of the files and save it in `out`.

    Args:
        inputs: files, folders, patterns and URLs, as for prepare_data.
        vocab_size: ids, exactly, before padding.
        out: folder for the tokenizer; new, empty, or that of an equal command.
        field: name of the text in a JSON line or Parquet row.
        kind: of files in folders and of patterns, if they are mixed (see expand_inputs).
        sample_bytes: learn from a sample of documents with about so many bytes of text in all; None: from all.
        seed: of the sample.
        pad_to_multiple: fill up with unused special tokens to a multiple of this (see pad_vocabulary).
        force: replace what is in `out`.
        progress: draw bars on stderr.
    Returns:
        True; False if the tokenizer was there already, made from the same inputs with the same settings.
    Raises:
        UserError: bad inputs, too little text for `vocab_size`, or something else in `out`.
    """
    if sample_bytes is not None and sample_bytes < 1:
        raise UserError(f"--sample-bytes {sample_bytes} must be at least 1")
    if pad_to_multiple is not None and pad_to_multiple < 1:
        raise UserError(f"--pad-to-multiple {pad_to_multiple} must be at least 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    files = expand_inputs([*inputs], kind=kind)
    settings = {
        **FileInputs(files).header,
        "vocab_size": vocab_size,
        "field": field,
        "sample_bytes": sample_bytes,
        "seed": None if sample_bytes is None else seed,
        "pad_to_multiple": pad_to_multiple,
    }
    made_from = _given(settings)
    if not force and out.exists() and any(out.iterdir()):
        if _given(read_json(out / MADE_FROM) or {}) == made_from:
            return False
        raise UserError(f"--out {out} holds something else already; give a new folder, or --force to write over it")
    tok = train_tokenizer(_texts(files, field, sample_bytes, seed, progress), vocab_size, progress)
    if pad_to_multiple is not None:
        pad_vocabulary(tok, pad_to_multiple)
    (out / MADE_FROM).unlink(missing_ok=True)  # a kill between the files must not leave another tokenizer's
    save_tokenizer(tok, out)
    write_json(out / MADE_FROM, made_from)
    return True


def _given(settings: dict) -> dict:
    """Settings without those that are None, so that a new option makes no older folder a stranger."""
    return {key: value for key, value in settings.items() if value is not None}


def _texts(files: AnyPaths, field: str, sample_bytes: int | None, seed: int, progress: bool) -> Iterator[str]:
    if sample_bytes is None:
        for document in noting_empty_files(read_with_bar(files, field, "reading", progress), files):
            yield document.text
        return
    end = _sample_end(noting_empty_files(read_with_bar(files, field, "measuring", progress), files), sample_bytes, seed)
    for document in read_with_bar(files, field, "reading the sample", progress):
        if _bucket(document.place, seed) < end:
            yield document.text


def _sample_end(documents: Iterator[Document], sample_bytes: int, seed: int) -> int:
    """The buckets [0, end) hold at most `sample_bytes` of text, and the next one would exceed it.

    If already the first bucket with text exceeds it, it is the sample: one document, as good as always.
    """
    bytes_B = np.zeros(BUCKETS, np.int64)
    for document in documents:
        bytes_B[_bucket(document.place, seed)] += len(document.text.encode())
    up_to_B = np.cumsum(bytes_B)
    end = np.searchsorted(up_to_B, sample_bytes, side="right")
    first_with_text = np.searchsorted(up_to_B, 1)
    return int(max(end, first_with_text + 1))


def _bucket(place: Position, seed: int) -> int:
    """A number below BUCKETS, as good as random, that a document has by its place."""
    digest = hashlib.blake2b(f"{seed}/{place.file}/{place.item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS
