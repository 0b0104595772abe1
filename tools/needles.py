"""Ask a model for needles in a haystack: MK-NIAH 1, 2 and 3 of RULER, of any length, without a network.

--scoring forced   one forward pass a question: is each token of the answer the likeliest?
--scoring greedy   generate the answer, and search the value in it: slower, and also right after other words
The table has score and standard error of each length and kind, and the loss of an answer in nats, summed over its
tokens (by chance ln V each, of 5 to 40). Score, nats and score by depth go to OUT/needles.json, the heat map of length
and depth to OUT/needles.html. Finished cells are kept: after an interruption the same command continues.

Example: python tools/needles.py runs/smoke --lengths 512,1024,2048 --kinds 1,2,3
         python tools/needles.py out/nano --lengths 4096,131072 --haystack books.jsonl --device cuda --dtype bfloat16
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.command_line import HelpFormatter, check_device, local_path, path_or_url
from trinity.data.prepare.corpus import topics
from trinity.data.sources.file_formats import CHOICES
from trinity.data.tokenizer.tokenizer import fingerprint, load_text_encoder
from trinity.errors import UserError, run_main
from trinity.evaluation.needle import KINDS, Haystack, NeedleTask
from trinity.evaluation.needle_score import Cell, Outcome, forced, greedy
from trinity.evaluation.perplexity import open_documents
from trinity.interop import load_hf
from trinity.interop.tensors import storage_dtypes
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import make_folder, resolve_path, write_atomically
from trinity.models import Trinity
from trinity.reporting.page import Section, check_out, plotly_script, render_page
from trinity.terminal import Progress
from trinity.training.load_run import load_model
from trinity.training.run_tokenizer import run_tokenizer


def main() -> None:
    """Score the missing cells, print the table, and write needles.json and needles.html."""
    options = parse()
    check(options)
    lengths, kinds = numbers("--lengths", options.lengths, "4096,8192"), numbers("--kinds", options.kinds, "1,3")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kinds {unknown[0]} is no kind of needles; use {', '.join(map(str, KINDS))}")
    out = options.out or options.folder
    check_questions(options)
    check_out(out / "needles.html")
    model, tokenizer, weights = load(options)
    check_lengths(lengths, model)
    haystack = haystack_of(options, tokenizer, model.config.vocab_size) if 1 in kinds else None
    settings = {
        "model": str(options.folder.resolve()),
        "weights": weights,
        "tokenizer": fingerprint(tokenizer),
        "haystack": None if haystack is None else {"name": haystack.name, "text": haystack.fingerprint},
        "samples": options.samples,
        "seed": options.seed,
        "scoring": options.scoring,
        "dtype": options.dtype,
    }
    cells = kept_cells(out / "needles.json", settings, options.force)
    tasks = {
        (kind, length): NeedleTask(tokenizer, model.config.vocab_size, kind, length, haystack, options.seed)
        for kind in kinds
        for length in lengths
    }
    for task in tasks.values():
        task.sample(0)  # a length that is too small is refused before hours of work
    make_folder(out)
    results = {"settings": settings, "cells": list(cells.values())}
    write_json(out / "needles.json", results)  # now, so that a folder that cannot be written is known at once
    if options.jsonl:
        make_folder(options.jsonl.parent)
        write_atomically(options.jsonl, questions(list(tasks.values()), options.samples))
    missing = [key for key in tasks if key not in cells]
    with Progress("asking", options.samples * len(missing), "question") as bar:
        for kind, length in missing:
            outcomes = ask(model, tasks[kind, length], tokenizer, options, bar)
            cells[kind, length] = {"kind": kind, "length": length, **Cell.of(outcomes)._asdict()}
            write_json(out / "needles.json", results | {"cells": list(cells.values())})
    print(table([cells[key] for key in tasks], options.scoring))
    write_page(out / "needles.html", options, [cells[key] for key in sorted(cells)])
    print(f"heat map  {out / 'needles.html'}\nresults   {out / 'needles.json'}")


def ask(model: Trinity, task: NeedleTask, tokenizer: Path, options: argparse.Namespace, bar: Progress) -> list[Outcome]:
    """The outcomes of one cell, in the order of the samples."""
    outcomes: list[Outcome] = []
    text_encoder, stop = load_text_encoder(tokenizer), special_ids(tokenizer, model.config.vocab_size).stop
    device = torch.device(options.device)
    rows = max(1, options.batch_tokens // task.length) if options.scoring == "forced" else 1
    for start in range(0, options.samples, rows):
        samples = [task.sample(index) for index in range(start, min(start + rows, options.samples))]
        if options.scoring == "forced":
            outcomes += forced(model, samples, task.length, device)
        else:
            outcomes += [greedy(model, sample, text_encoder, stop) for sample in samples]
        bar.update(len(samples))
    return outcomes


def questions(tasks: list[NeedleTask], count: int) -> Iterator[str]:
    """The lines of a JSONL file with the samples of all tasks, under RULER's names."""
    for task in tasks:
        for index in range(count):
            sample = task.sample(index)
            line = {
                "index": index,
                "task": task.kind.ruler_name,
                "length": task.length,
                "input": sample.prompt,
                "answer_prefix": sample.answer_prefix,
                "outputs": [sample.value],
                "depth": sample.depth,
            }
            yield to_json(line) + "\n"


def table(cells: list[dict[str, Any]], scoring: str) -> str:
    """A line for each cell: kind, length, score with its standard error, and nats of an answer or RULER's score."""
    last = "nats" if scoring == "forced" else "substring"
    rows = [("kind", "length", "score", "error", "nats an answer" if last == "nats" else last)]
    rows += [
        (str(cell["kind"]), f"{cell['length']:,}", f"{cell['score']:.3f}", f"{cell['error']:.3f}", f"{cell[last]:.4g}")
        for cell in cells
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows)


def write_page(path: Path, options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Write the heat maps as one HTML file."""
    plotly_script()  # refuses where plotly is missing; table and JSON are written by now
    from trinity.reporting.needles import needle_charts

    title = f"Needles: {options.folder}, {options.scoring} scoring"
    write_atomically(path, render_page(title, [Section("Score by length and depth", needle_charts(cells))]))


def load(options: argparse.Namespace) -> tuple[Trinity, Path, Any]:
    """(the model, the folder of its tokenizer, what tells these weights from others)."""
    folder, dtype = options.folder, getattr(torch, options.dtype)
    if (folder / "config.json").is_file():
        files = sorted(folder.glob("*.safetensors"))
        weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return load_hf(folder, dtype=dtype).to(options.device), folder, weights
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has neither a config.json nor a config.yaml; give a Hugging Face folder or a run's")
    model, config, step = load_model(folder, options.step)
    tokenizer = run_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(f"{folder} is a run without data.tokenizer, so it cannot read needles")
    for name, stored in storage_dtypes(model, dtype).items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(stored)
    checkpoint = CheckpointDirectory.at(folder, config.checkpoint.url).checkpoint(step)
    return model.to(options.device), tokenizer, {"step": step, "files": checkpoint.listed_sums()}


def haystack_of(options: argparse.Namespace, tokenizer: Path, vocab_size: int) -> Haystack:
    """The text of --haystack, or pydoc's chapters on the language, which every machine has."""
    if options.haystack is not None:
        source = open_documents(
            options.haystack, tokenizer, options.field, vocab_size, options.haystack_kind, option="--haystack"
        )
        return Haystack.of_source(source, load_text_encoder(tokenizer), options.haystack)
    text = "\n".join(text for _, text in topics())
    if not text:
        raise UserError("this Python has no chapters of pydoc to hide needles in; give --haystack FILE")
    return Haystack(text, "pydoc")


def kept_cells(path: Path, settings: dict[str, Any], force: bool) -> dict[tuple[int, int], dict[str, Any]]:
    """(kind, length) → cell of an earlier call with the same settings, whose haystack stays if this call needs none."""
    if force:
        return {}
    before = read_json(path, "remove this file, or give --force")
    if before is None:
        return {}
    cells = _cells(before)
    if cells is None:
        raise UserError(f"{path} is not a file of results; give another --out, or --force to write over it")
    old, new = before.get("settings", {}), json.loads(to_json(settings))
    if new["haystack"] is None or old.get("haystack") is None:  # kinds 2 and 3 need none
        settings["haystack"] = new["haystack"] or old.get("haystack")
        old = old | {"haystack": new["haystack"]}
    changed = [name for name, value in new.items() if old.get(name) != value]
    if changed:
        raise UserError(
            f"{path} has results with other settings ({', '.join(changed)}); give another --out, or --force to "
            "write over it"
        )
    return cells


def _cells(results: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]] | None:
    """(kind, length) → cell; None if these are no results of this tool."""
    cells, fields = results.get("cells"), {"kind", "length", *Cell._fields}
    if not isinstance(results.get("settings"), dict) or not isinstance(cells, list):
        return None
    if not all(isinstance(cell, dict) and fields <= set(cell) for cell in cells):
        return None
    return {(cell["kind"], cell["length"]): cell for cell in cells}


def numbers(option: str, text: str, example: str) -> list[int]:
    """The numbers of a list such as `example`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text} is not a list of numbers; write for example {option} {example}")
    return list(dict.fromkeys(map(int, parts)))


def check_lengths(lengths: list[int], model: Trinity) -> None:
    """Refuse lengths beyond the model's positions."""
    positions = model.config.max_positions
    if max(lengths) > positions:
        raise UserError(
            f"--lengths {max(lengths)} is more than the model's {positions} positions; give {positions} or less"
        )


def check_questions(options: argparse.Namespace) -> None:
    """Refuse to write --jsonl over a file that exists."""
    if options.jsonl and options.jsonl.exists() and not options.force:
        raise UserError(f"--jsonl {options.jsonl} exists; give another file, or --force to write over it")
    if options.jsonl and options.haystack and resolve_path(options.jsonl) == resolve_path(options.haystack):
        raise UserError(f"--jsonl {options.jsonl} is the haystack; give another file")


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used."""
    for name in ("samples", "batch_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    check_device(options.device)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_OR_RUN", help="Hugging Face folder, or run directory")
    parser.add_argument("--lengths", required=True, metavar="A,B", help="tokens of a sample, its answer included")
    parser.add_argument("--kinds", default="1", metavar="A,B", help="kinds of needles, of 1, 2 and 3 (%(default)s)")
    parser.add_argument("--scoring", choices=("forced", "greedy"), default="forced", help="see above (%(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        default=500,
        help="questions of each length and kind, by default as many as in RULER (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of keys, values and places (%(default)s)")
    parser.add_argument(
        "--haystack",
        type=path_or_url,
        metavar="FILES",
        help="text or token shards that hide the needles of kind 1; by default pydoc's chapters on Python",
    )
    parser.add_argument("--field", default="text", help="name of the text in a JSON line or Parquet row (%(default)s)")
    parser.add_argument("--haystack-kind", choices=CHOICES, help="kind of files to read, if there are several")
    parser.add_argument("--step", type=int, help="of a run's checkpoint; by default the newest")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="folder for the results; by default HF_OR_RUN")
    parser.add_argument("--force", action="store_true", help="write over results with other settings")
    parser.add_argument("--jsonl", type=local_path, metavar="FILE", help="also write the questions, in RULER's format")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="most tokens in a forward pass of --scoring forced (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="data type of the matrices (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
