"""Prepare shards: tokens/s of prepare_data against a bare encode_batch loop of the tokenizers library.

Both on all cores, over the same documents: Python's standard library (trinity.data.prepare.corpus) as JSON lines, with
a tokenizer trained on part of it. The bare loops have the texts in memory and drop the encodings; preparing also starts
workers, reads and parses JSON, checks UTF-8, and hashes, writes and fsyncs shards. The contenders take turns.
The count of tokens includes duplicates.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.timing import Marks, take_turns

from trinity.data.prepare.corpus import write_corpus
from trinity.data.prepare.prepare import prepare_data
from trinity.data.tokenizer.tokenizer import load_tokenizer
from trinity.data.tokenizer.train import train_from_files

VOCABULARY = 8000
BATCH_CHARACTERS = 1 << 20
SHARD_TOKENS = 1 << 20
BARE = "bare encode_batch"


def run(quick: bool) -> dict[str, Any]:
    """Measure; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder)
        names = ("prose",) if quick else ("prose", "code")
        inputs = [folder / f"{name}.train.jsonl" for name in names]
        train_from_files(inputs[:1], VOCABULARY, folder / "tokenizer")
        texts = [json.loads(line)["text"] for path in inputs for line in path.read_bytes().splitlines()]
        tok = load_tokenizer(folder / "tokenizer")
        outs = (folder / f"out{number}" for number in itertools.count())

        def prepare(**options: Any) -> dict:
            index, _ = prepare_data(inputs, folder / "tokenizer", next(outs), shard_tokens=SHARD_TOKENS, **options)
            return index

        contenders: dict[str, Callable[[Marks], Any]] = {
            BARE: lambda _: _bare(tok.encode_batch, texts),
            "bare encode_batch_fast": lambda _: _bare(tok.encode_batch_fast, texts),
            f"prepare_data, {cores} workers": lambda _: prepare(workers=cores),
            f"prepare_data, {cores} workers, --deduplicate": lambda _: prepare(workers=cores, deduplicate=True),
            "prepare_data in one process": lambda _: prepare(workers=0),
        }
        with _all_cores():
            print(f"{len(texts)} documents, {len(contenders)} contenders", file=sys.stderr)
            found = take_turns(contenders, rounds=1 if quick else 3)
            tokens = prepare(workers=cores)["tokens"]
    return {"on": machine(), "cores": cores, "tokens": tokens, "documents": len(texts), "found": found}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{results['on']}; {results['cores']} cores, {results['documents']:,} documents, {results['tokens']:,} tokens",
        "",
        "| | tokens/s | of bare encode_batch |",
        "|---|---|---|",
    ]
    found = results["found"]
    for name, row in found.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | |")
            continue
        share = found[BARE]["seconds"][0] / row["seconds"][0]
        lines.append(f"| {name} | {results['tokens'] / row['seconds'][0]:,.0f} | {share:.0%} |")
    return "\n".join(lines)


def _bare(encode: Callable, texts: list[str]) -> None:
    for batch in _batches(texts):
        encode(batch, add_special_tokens=False)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


@contextmanager
def _all_cores() -> Iterator[None]:
    """Switch the library's threads on, whatever the environment says."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
