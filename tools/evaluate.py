"""Measures a Hugging Face folder of an AfMoE model: perplexity and multiple choice of files, and tasks of lm-eval.

Files need no network and no other package: the folder is read by trinity itself, which computes as in training.
  --text      perplexity and bits per byte of texts (files as for prepare_data.py) or of token shards
  --choices   JSONL lines {"prompt": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}
  --tasks     names of lm-evaluation-harness, which runs transformers: pip install "trinity-moe[evaluation]"
With --packed, --window is the length of packed rows: the figure is then the validation loss of a run on the same rows.

Example: python tools/evaluate.py runs/smoke/hf/final --text data/smoke/corpus/code.validation.jsonl --limit 50
         python tools/evaluate.py out/nano --tasks arc_easy,hellaswag --limit 100 --device cuda --json figures.json
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from trinity.command_line import HelpFormatter, local_path, place
from trinity.data.sources.file_formats import CHOICES
from trinity.data.sources.find_files import note
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource
from trinity.data.tokenizer.tokenizer import load_text_encoder, load_tokenizer, token_byte_lengths
from trinity.errors import UserError, run_main
from trinity.evaluation.lm_eval import run_tasks
from trinity.evaluation.multiple_choice import accuracies, choice_scores, read_items
from trinity.evaluation.perplexity import ContextWindow, open_documents, packed_perplexity, perplexity
from trinity.interop import load_hf
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import write_json
from trinity.models.trinity import Trinity

Results = dict[str, dict[str, float]]
WINDOW = 2048
"""Tokens of a window where the model has as many positions. Ours."""


def main() -> None:
    """Measure all that is asked for and print one table."""
    options = parse()
    check(options)
    results: Results = {}
    if options.text or options.choices:
        model = load_hf(options.folder, dtype=getattr(torch, options.dtype)).to(options.device)
        window = options.window or min(WINDOW, model.config.max_positions)
        results |= text_results(model, window, options) | choice_results(model, window, options)
    if options.tasks:
        results |= run_tasks(
            options.folder,
            options.tasks.split(","),
            limit=options.limit,
            window=options.window,
            dtype=options.dtype,
            device=options.device,
            task_folder=options.task_folder,
        )
    print(table(results))
    if options.json:
        write_json(options.json, {"folder": str(options.folder), "results": results})


def text_results(model: Trinity, window: int, options: argparse.Namespace) -> Results:
    """Perplexity of each --text."""
    if not options.text:
        return {}
    byte_lengths_V = token_byte_lengths(load_tokenizer(options.folder))
    sliding = ContextWindow(window, min(options.stride or max(1, window // 2), window))
    results: Results = {}
    for given, source in text_sources(model.config.vocab_size, options):
        if options.packed:
            results[f"packed {given}"] = packed_perplexity(
                model,
                source,
                window,
                byte_lengths_V=byte_lengths_V,
                rows=options.limit,
                document_mask=options.document_mask,
                loss_on_document_start=not options.no_loss_on_document_start,
                batch_tokens=options.batch_tokens,
            )
        else:
            results[f"perplexity {given}"] = perplexity(
                model,
                source,
                sliding,
                byte_lengths_V=byte_lengths_V,
                documents=options.limit,
                batch_tokens=options.batch_tokens,
            )
    return results


def text_sources(vocab_size: int, options: argparse.Namespace) -> Iterator[tuple[str, TokenSource | TextSource]]:
    """Each --text and its documents; of several that name the same files the first alone."""
    measured: list[set[Path]] = []
    for given in options.text:
        source = open_documents(given, options.folder, options.field, vocab_size, options.kind)
        files = {path.resolve() for path in (source.files if isinstance(source, TextSource) else [source.directory])}
        if files in measured:
            note(f"--text {given} names the same files as one before it, so it is not measured again")
            continue
        measured.append(files)
        yield given, source


def choice_results(model: Trinity, window: int, options: argparse.Namespace) -> Results:
    """Accuracy of each --choices."""
    results: Results = {}
    for path in {path.resolve(): path for path in options.choices}.values():
        items = read_items(path, options.limit)
        bos = special_ids(options.folder, model.config.vocab_size).bos
        scores = choice_scores(
            model,
            load_text_encoder(options.folder),
            items,
            begin=[] if bos is None else [bos],
            window=window,
            batch_tokens=options.batch_tokens,
        )
        results[f"choices {path}"] = accuracies(items, scores)
    return results


def table(results: Results) -> str:
    """A line for each figure."""
    rows = [(task, name, f"{value:.6g}") for task, figures in results.items() for name, value in figures.items()]
    rows.insert(0, ("task", "figure", "value"))
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows)


def check(options: argparse.Namespace) -> None:
    """Refuse what means nothing."""
    if not (options.text or options.choices or options.tasks):
        raise UserError("there is nothing to measure; give --text, --choices or --tasks")
    for name in ("limit", "window", "stride", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError):  # no such kind, none here, or not so many
        raise UserError(f"--device {options.device} is not there; use cpu") from None


def parse() -> argparse.Namespace:
    """The command line's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_DIR", help="where the model and its tokenizer are")
    parser.add_argument("--text", nargs="+", type=place, default=[], metavar="FILES", help="texts, or token shards")
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--kind", choices=CHOICES, help="of a folder or pattern with several kinds of files, read this")
    parser.add_argument(
        "--choices", nargs="+", type=local_path, default=[], metavar="FILE", help="multiple choice, JSONL"
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval")
    parser.add_argument("--task-folder", type=local_path, metavar="DIR", help="YAML files of further tasks for lm-eval")
    parser.add_argument("--limit", type=int, metavar="N", help="documents, packed rows or items of each, at most")
    parser.add_argument("--window", type=int, help=f"context in tokens; by default {WINDOW}, or its positions if fewer")
    parser.add_argument("--stride", type=int, help="how far the window moves on; half of it by default")
    parser.add_argument("--packed", action="store_true", help="pack documents into rows, as validation in a run does")
    parser.add_argument("--document-mask", action="store_true", help="--packed: attention never crosses a document")
    parser.add_argument(
        "--no-loss-on-document-start", action="store_true", help="--packed: as data.loss_on_document_start=false"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a forward pass (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the figures as values")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
