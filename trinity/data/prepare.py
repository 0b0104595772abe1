"""From documents to token shards: encode in batches, write, and go on where a killed run stopped.

The shards depend on the inputs, the tokenizer and the shard size only, not on batches or interruptions: a run that was
killed and started again leaves the same bytes as one that was not.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from trinity.data.documents import BEGINNING, Document, Place, read_documents
from trinity.data.files import SUFFIX, check_inputs, identity, read_json
from trinity.data.shard_writer import ShardWriter
from trinity.data.shards import VERSION, damage, small_enough, token_dtype
from trinity.data.tokenizer import bos_id, fingerprint, load_tokenizer
from trinity.errors import UserError

SHARD_TOKENS = 1 << 28
BATCH_CHARACTERS = 1 << 22


def prepare_data(
    inputs: list[Path],
    tokenizer: Path,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    field: str = "text",
    skip_bad_lines: bool = False,
    progress: bool = False,
) -> tuple[dict, bool]:
    """Make the token shards of the inputs in `out`, or finish or mend those that a run with the same arguments began.

    Args:
        inputs: text, .jsonl, .jsonl.gz and .parquet files, read in this order.
        tokenizer: folder with tokenizer.json.
        out: folder for the shards; new, empty, or of an earlier run with the same inputs and tokenizer.
        shard_tokens: tokens at which a shard is full (512 MiB of uint16 by default).
        field: name of the text in a JSON line or Parquet row.
        skip_bad_lines: leave out what cannot be read, and count it.
        progress: draw a progress bar on stderr.
    Returns:
        The content of index.json, and whether there was nothing to do.
    Raises:
        UserError: bad inputs (see read_documents), none with a document in it, or an `out` that holds something else.
    """
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens} must be at least 1")
    check_inputs(inputs)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    tok = load_tokenizer(tokenizer)
    # A document is data: where it spells out a special token, that is text like any other.
    tok.encode_special_tokens = True
    header = _header(inputs, tokenizer, tok, shard_tokens, field)
    index = read_json(out / "index.json")
    shards = _whole_shards(out, header, index)
    if index is not None and len(shards) == len(index["shards"]):
        (out / "progress.json").unlink(missing_ok=True)  # a kill may have come between the two files
        return index, True
    writer = ShardWriter(out, header, shard_tokens, shards)
    start = Place(*shards[-1]["next"]) if shards else BEGINNING
    _write(writer, read_documents(inputs, field, start, skip_bad_lines), tok, _bar(inputs, progress))
    if writer.tokens == 0:
        names = ", ".join(str(path) for path in inputs)
        raise UserError(f"--input {names} holds no document with text; give a file that does")
    return writer.finish(Place(len(inputs), 0)), False


def _write(writer: ShardWriter, documents: Iterable[Document], tok: Tokenizer, bar: tqdm) -> None:
    earlier = writer.tokens
    with bar:
        for ids, document in _encode(documents, tok):
            if ids is None:
                writer.skip("empty" if document.text is not None else "unreadable")
            else:
                writer.add(ids, len(document.text.encode()), document.place)
            _advance(bar, document, writer.tokens - earlier)


def _header(inputs: list[Path], tokenizer: Path, tok: Tokenizer, shard_tokens: int, field: str) -> dict:
    vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
    return {
        "version": VERSION,
        "dtype": token_dtype(vocab_size).str,
        "vocab_size": vocab_size,
        "bos_id": bos_id(tok),
        "tokenizer": fingerprint(tokenizer),
        "inputs": [identity(path) for path in inputs],
        "field": field,
        "shard_tokens": shard_tokens,
    }


def _whole_shards(out: Path, header: dict, index: dict | None) -> list[dict]:
    """Entries of the shards in `out` that need not be made again, up to the first that is missing or damaged."""
    found = index or read_json(out / "progress.json")
    if found is None:
        strangers = [path.name for path in out.iterdir() if not path.name.endswith(SUFFIX)] if out.is_dir() else []
        if strangers:
            raise UserError(f"--out {out} holds something else ({strangers[0]}); give a new folder")
        return []
    shards = found["shards"]
    differing = [key for key, value in header.items() if found.get(key) != value]
    if differing and shards:
        raise UserError(
            f"--out {out} holds shards whose {', '.join(differing)} differ from this command's; "
            "give a new folder, or remove that one"
        )
    checksums = small_enough(shards)
    whole = takewhile(lambda pair: damage(out, *pair, checksums) is None, enumerate(shards))
    return [entry for _, entry in whole]


def _encode(documents: Iterable[Document], tok: Tokenizer) -> Iterator[tuple[np.ndarray | None, Document]]:
    """Pair each document with its ids, BOS first; None for one without text."""
    bos = bos_id(tok)
    for batch in _batches(documents):
        texts = [document.text for document in batch if document.text]
        encodings = iter(tok.encode_batch_fast(texts, add_special_tokens=False))
        for document in batch:
            ids = np.array([bos, *next(encodings).ids], np.uint32) if document.text else None
            yield ids, document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "") + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _bar(inputs: list[Path], show: bool) -> tqdm:
    """A bar of the bytes of input that are done, with the time left."""
    total = sum(path.stat().st_size for path in inputs)
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, unit="B", unit_scale=True, mininterval=every, disable=not show)


def _advance(bar: tqdm, document: Document, tokens: int) -> None:
    """Move the bar to a document's end and show the speed, in tokens of this run."""
    if not tokens:
        bar.initial = document.bytes_read  # what an earlier run did is no part of this one's speed
    elapsed = bar.format_dict["elapsed"]
    if elapsed > 0:
        bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
    bar.update(document.bytes_read - bar.n)
