"""Train a tokenizer from files, once: the same command again finds the finished tokenizer.

--sample-bytes samples the text: documents are chosen by a hash of their position, so that the sample is spread evenly
over all inputs and is the same every time. A first pass over the files adds up bytes to find which hashes fit; the
second passes the chosen documents to the trainer, one at a time. So both hold one document and some megabytes of
counts, and the trainer's table of distinct words is bounded by the sample.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trinity.data.sources.documents import Document, Position, read_with_progress
from trinity.data.sources.find_files import Paths
from trinity.data.sources.inputs import FileInputs, expand_inputs
from trinity.data.tokenizer.tokenizer import pad_vocabulary, save_tokenizer, train_tokenizer
from trinity.errors import UserError
from trinity.io.json_files import read_json, write_json

MADE_FROM = "made_from.json"
BUCKETS = 1 << 20
"""A sample is whole buckets of documents, so it differs from --sample-bytes by up to a millionth of the text, or one
document."""


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
        out: folder for the tokenizer; new, empty, or written by the same command.
        field: name of the text in a JSON line or Parquet row.
        kind: of files in folders and of patterns, if they are mixed (see expand_inputs).
        sample_bytes: learn from a sample of documents with about this many bytes of text; None: from all documents.
        seed: of the sample.
        pad_to_multiple: pad with unused special tokens to a multiple of this (see pad_vocabulary).
        force: replace what is in `out`.
        progress: draw bars on stderr.
    Returns:
        True; False if the same command has already written the tokenizer.
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
    made_from = _without_none(settings)
    if not force and out.exists() and any(out.iterdir()):
        if _without_none(read_json(out / MADE_FROM) or {}) == made_from:
            return False
        raise UserError(f"--out {out} holds something else already; give a new folder, or --force to write over it")
    tok = train_tokenizer(_texts(files, field, sample_bytes, seed, progress), vocab_size, progress)
    if pad_to_multiple is not None:
        pad_vocabulary(tok, pad_to_multiple)
    (out / MADE_FROM).unlink(missing_ok=True)  # after a kill between the files it would describe another tokenizer
    save_tokenizer(tok, out)
    write_json(out / MADE_FROM, made_from)
    return True


def _without_none(settings: dict) -> dict:
    """Settings without those that are None, so that a folder from before a new option still matches."""
    return {key: value for key, value in settings.items() if value is not None}


def _texts(files: Paths, field: str, sample_bytes: int | None, seed: int, progress: bool) -> Iterator[str]:
    if sample_bytes is None:
        for document in read_with_progress(files, field, "reading", progress):
            yield document.text or ""
        return
    end = _sample_end(read_with_progress(files, field, "measuring", progress), sample_bytes, seed)
    for document in read_with_progress(files, field, "reading the sample", progress, note_empty=False):
        if _bucket(document.place, seed) < end:
            yield document.text or ""


def _sample_end(documents: Iterator[Document], sample_bytes: int, seed: int) -> int:
    """The largest `end` for which buckets [0, end) hold at most `sample_bytes` of text.

    If the first bucket with text exceeds `sample_bytes`, it is the sample; almost always it is one document.
    """
    bytes_B = np.zeros(BUCKETS, np.int64)
    for document in documents:
        bytes_B[_bucket(document.place, seed)] += len((document.text or "").encode())
    total_B = np.cumsum(bytes_B)
    end = np.searchsorted(total_B, sample_bytes, side="right")
    first_with_text = np.searchsorted(total_B, 1)
    return int(max(end, first_with_text + 1))


def _bucket(place: Position, seed: int) -> int:
    """A document's bucket, below BUCKETS: a hash of its position."""
    digest = hashlib.blake2b(f"{seed}/{place.file}/{place.item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS
