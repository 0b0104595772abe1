"""Data: tokens/s of rows from shards in one process, sequential and RSDB, and how long a start and a resume take.

Peers: plain slices of the memory map, converted to int64 like the rows, and the `datasets` library streaming the same
documents from Parquet, already tokenised, and packing them. Every row has its tokens, targets and document ids.

Two corpora of random tokens: documents of log-normal length with a mean of about a thousand tokens, as of the web; and
10⁷ short ones with 10⁹ tokens in all (a hundredth of each with --quick), for the time of a start and a resume, and for
memory. Both are written first, and removed at the end.
"""

import gc
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from benchmarks.timing import Marks, medians, take_turns

from trinity.data import BatchPlan, SequenceStream, TokenSource
from trinity.data.prepare.shard_writer import KEPT, Encoded, ShardWriter
from trinity.data.sources.documents import Position
from trinity.data.sources.shards import VERSION, token_dtype
from trinity.data.stream.loader import Loader
from trinity.data.stream.mixture import Phase

S, V = 4096, 48
VOCABULARY = 200_000
RSDB_SIZE = 4096
BATCH = 16
DOCUMENTS_AT_ONCE = 20_000
MEGATOKENS = 8  # of a call that is timed
PEER = "datasets, Parquet, streamed and packed"


def run(quick: bool) -> dict[str, Any]:
    """Measure; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    scale = 100 if quick else 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numbers = np.random.default_rng(0)
        web = numbers.lognormal(6.4, 1.0, 200_000 // scale).astype(np.int64) + 1
        short = numbers.integers(2, 199, 10_000_000 // scale)
        sources = {name: corpus_of(folder / name, lengths) for name, lengths in (("web", web), ("short", short))}
        _parquet(folder / "web.parquet", sources["web"])
        rows = MEGATOKENS * 1_000_000 // scale // S // BATCH * BATCH
        contenders = _contenders(sources, folder / "web.parquet", rows)
        found = take_turns(contenders, rounds=1 if quick else 3)
        starts = {name: _start(source) for name, source in sources.items()}
    tokens = rows * S
    sizes = {name: (source.documents, source.tokens) for name, source in sources.items()}
    return {"on": machine(), "tokens": tokens, "sizes": sizes, "found": found, "starts": starts}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [f"{results['on']}; rows of {S} tokens, one process", "", "| | million tokens/s |", "|---|---|"]
    for name, row in results["found"].items():
        value = row.get("failed") or f"{results['tokens'] / row['seconds'][0] / 1e6:,.0f}"
        lines.append(f"| {name} | {value} |")
    lines += ["", "| | documents | tokens | open | first row | resume | state of a stream | memory |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, row in results["starts"].items():
        documents, tokens = results["sizes"][name]
        seconds = " | ".join(f"{row[key]:.3f} s" for key in ("open", "first", "resume"))
        sizes = f"{row['state_kib']:.0f} KiB | +{row['memory_mib']:.0f} MiB"
        lines.append(f"| {name} | {documents:,} | {tokens:,} | {seconds} | {sizes} |")
    return "\n".join(lines)


def _contenders(sources: dict[str, TokenSource], parquet: Path, rows: int) -> dict[str, Callable[[Marks], None]]:
    found: dict[str, Callable[[Marks], None]] = {"slices of the memory map": _slices(sources["web"], rows)}
    for name, source in sources.items():
        for packing, size in (("sequential", 0), (f"RSDB {RSDB_SIZE}", RSDB_SIZE)):
            stream = _stream(source, size)
            stream.take(V)  # the buffers are full from here on
            found[f"{packing}, {name}"] = partial(_batches, stream, rows)
    loader = Loader(_stream(sources["web"], RSDB_SIZE), 1, 64)
    found[f"RSDB {RSDB_SIZE}, web, by a worker process"] = partial(_batches, loader, rows)
    found[PEER] = _peer(parquet, rows)
    return found


def _batches(stream: SequenceStream | Loader, rows: int, _: Marks) -> None:
    for _ in range(rows // BATCH):
        stream.take(BATCH)


def _stream(source: TokenSource, rsdb_size: int) -> SequenceStream:
    """Of one of 48 ranks: it holds one stream."""
    plan = BatchPlan(V, [], S)
    phase = Phase((1.0,), rsdb_size)
    return SequenceStream({"all": source}, [phase], streams=V, seed=0, bos_id=0, plan=plan, rank=7, ranks=V)


def _slices(source: TokenSource, rows: int) -> Callable[[Marks], None]:
    (ids,) = source.chunks(source.tokens)
    state = {"at": 0}

    def call(_: Marks) -> None:
        for _ in range(rows):
            if state["at"] + S + 1 > len(ids):
                state["at"] = 0
            row = ids[state["at"] : state["at"] + S + 1].astype(np.int64)
            torch.from_numpy(row[:-1]), torch.from_numpy(row[1:])
            state["at"] += S

    return call


def _peer(parquet: Path, rows: int) -> Callable[[Marks], None]:
    """Documents from the library, concatenated and cut into rows with the same three tensors."""
    from datasets import load_dataset

    def documents() -> Iterator[np.ndarray]:
        while True:
            dataset = load_dataset("parquet", data_files=str(parquet), split="train", streaming=True)
            for row in dataset.with_format("numpy"):
                yield row["ids"]

    stream = documents()
    state: dict[str, Any] = {"left": np.empty(0, np.int64)}

    def call(_: Marks) -> None:
        for _ in range(rows):
            parts, lengths, room = [], [], S + 1
            while room:
                if not len(state["left"]):
                    state["left"] = next(stream)
                part = state["left"][:room]
                state["left"] = state["left"][room:]
                parts.append(part)
                lengths.append(len(part))
                room -= len(part)
            row = np.concatenate(parts).astype(np.int64)
            ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            torch.from_numpy(row[:-1]), torch.from_numpy(row[1:]), torch.from_numpy(ids[:-1])

    return call


def _start(source: TokenSource) -> dict[str, float]:
    """Seconds from nothing to an open source, from there to the first row, and from a saved state to the next row."""
    found, samples = {}, []
    for _ in range(3):
        gc.collect()
        before = _memory()
        times = [time.perf_counter()]
        opened = TokenSource(source.directory, "never")
        times.append(time.perf_counter())
        stream = _stream(opened, RSDB_SIZE)
        next(stream)
        times.append(time.perf_counter())
        memory = _memory() - before
        state = stream.state_dict()
        begin = time.perf_counter()
        again = _stream(TokenSource(source.directory, "never"), RSDB_SIZE)
        again.load_state_dict(state)
        next(again)
        samples.append([times[1] - times[0], times[2] - times[1], time.perf_counter() - begin])
        found.setdefault("memory_mib", memory / 2**20)
        found["state_kib"] = state["stream.00007"].nbytes / 1024
    return found | dict(zip(("open", "first", "resume"), medians(samples)))


def _memory() -> int:
    """Bytes of this process's largest resident set so far, mapped files counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def corpus_of(folder: Path, lengths: np.ndarray, vocabulary: int = VOCABULARY) -> TokenSource:
    """Documents of given lengths and of random tokens, in one shard; the writer gets arrays of many documents."""
    header = {"version": VERSION, "vocab_size": vocabulary, "bos_id": 0, "tokenizer": "none"}
    header["dtype"] = token_dtype(vocabulary).str
    writer = ShardWriter(folder, header, 1 << 40, [])
    print(f"making {len(lengths):,} documents", file=sys.stderr)
    numbers = np.random.default_rng(1)
    ids = numbers.integers(1, vocabulary, int(lengths.max()), dtype=np.uint32)
    ids[0] = 0
    for start in range(0, len(lengths), DOCUMENTS_AT_ONCE):
        part = lengths[start : start + DOCUMENTS_AT_ONCE]
        items = np.arange(start, start + len(part))
        text_bytes, status = 4 * part, np.full(len(part), KEPT, np.uint8)
        packed = np.concatenate([ids[:length] for length in part.tolist()])
        writer.write(Encoded(packed, status, np.zeros_like(items), items, part, text_bytes, None, 0))
    writer.finish(Position(1, 0))
    return TokenSource(folder, "never")


def _parquet(path: Path, source: TokenSource) -> None:
    documents = range(source.documents)
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("ids", pyarrow.list_(pyarrow.uint32()))])) as file:
        for start in documents[::1000]:
            ids = [source.read(d, 0, source.length(d)) for d in documents[start : start + 1000]]
            file.write_table(pyarrow.table({"ids": pyarrow.array(ids, pyarrow.list_(pyarrow.uint32()))}))
