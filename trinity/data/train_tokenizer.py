"""Training a tokenizer from files, once: the same command again finds it there."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from trinity.data.documents import read_documents
from trinity.data.files import check_inputs, identity, read_json, write_atomically
from trinity.data.tokenizer import save_tokenizer, train_tokenizer
from trinity.errors import UserError

MADE_FROM = "made_from.json"


def train_from_files(
    inputs: list[Path],
    vocab_size: int,
    out: Path,
    *,
    field: str = "text",
    bytes_limit: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> bool:
    """Train a tokenizer on the documents of the files and save it in `out`.

    Args:
        inputs: text, .jsonl, .jsonl.gz and .parquet files.
        vocab_size: ids, exactly.
        out: folder for the tokenizer; new, empty, or that of an equal command.
        field: name of the text in a JSON line or Parquet row.
        bytes_limit: stop after the document with which the text reaches this many bytes.
        force: replace what is in `out`.
        progress: draw bars on stderr.
    Returns:
        True; False if the tokenizer was there already, made from the same inputs with the same settings.
    Raises:
        UserError: bad inputs, too little text for `vocab_size`, or something else in `out`.
    """
    check_inputs(inputs)
    made_from = {
        "inputs": [identity(path) for path in inputs],
        "vocab_size": vocab_size,
        "field": field,
        "bytes_limit": bytes_limit,
    }
    if not force and out.exists() and (not out.is_dir() or any(out.iterdir())):
        if out.is_dir() and read_json(out / MADE_FROM) == made_from:
            return False
        raise UserError(f"--out {out} holds something else already; give a new folder, or --force to write over it")
    tok = train_tokenizer(_texts(inputs, field, bytes_limit, progress), vocab_size, progress)
    save_tokenizer(tok, out)
    write_atomically(out / MADE_FROM, [json.dumps(made_from, indent=1), "\n"])
    return True


def _texts(inputs: list[Path], field: str, bytes_limit: int | None, progress: bool) -> Iterator[str]:
    taken = 0
    every = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=bytes_limit, unit="B", unit_scale=True, mininterval=every, disable=not progress) as bar:
        for document in read_documents(inputs, field):
            size = len(document.text.encode())
            yield document.text
            bar.update(size)
            taken += size
            if bytes_limit is not None and taken >= bytes_limit:
                return
