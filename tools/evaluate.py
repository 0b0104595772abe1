"""Evaluate a Hugging Face folder of an AfMoE model: perplexity, multiple choice, and tasks of lm-eval.

--text and --choices need no network and no other package: Trinity loads the folder and computes as in training.
  --text      perplexity and bits per byte of text (files as for prepare_data.py) or of token shards
  --choices   multiple choice: JSONL lines {"prompt": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}
  --tasks     tasks of lm-evaluation-harness, run by transformers: pip install "trinity-moe[evaluation]"
With --packed, --window is the length of packed rows: the result is the validation loss of a run on the same rows, and
the balance of the experts. Of shards with a loss mask (prepare_data.py --chat) the trained tokens count; for the rows
of configs/sft.yaml give --document-mask and --best-fit-rows 16 too.

Example: python tools/evaluate.py runs/smoke/hf/final --text data/smoke/corpus/code.validation.jsonl --limit 50
         python tools/evaluate.py out/nano --tasks arc_easy,hellaswag --limit 100 --device cuda --json figures.json
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch

from trinity.command_line import HelpFormatter, check_device, file_to_write, local_path, path_or_url
from trinity.data.sources.file_formats import CHOICES
from trinity.data.sources.find_files import note
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource
from trinity.data.tokenizer.tokenizer import load_text_encoder, load_tokenizer, token_byte_lengths
from trinity.errors import UserError, run_main
from trinity.evaluation.expert_load import ExpertLoad
from trinity.evaluation.lm_eval import run_tasks
from trinity.evaluation.multiple_choice import accuracies, choice_scores, read_items
from trinity.evaluation.perplexity import ContextWindow, open_documents, packed_perplexity, perplexity
from trinity.interop import load_hf
from trinity.interop.tokenizer_files import special_ids
from trinity.io.json_files import write_json
from trinity.io.local import resolve_path
from trinity.models.trinity import Trinity

Results = dict[str, dict[str, float]]
WINDOW = 2048
"""Default context, in tokens, if the model has as many positions. Not from the report."""


def main() -> None:
    """Run all evaluations of the command line and print one table."""
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
    """Perplexity of each --text argument."""
    if not options.text:
        return {}
    byte_lengths_V = token_byte_lengths(load_tokenizer(options.folder))
    sliding = ContextWindow(window, min(options.stride or max(1, window // 2), window))
    results: Results = {}
    for given, source in text_sources(model.config.vocab_size, options):
        if options.packed:
            with ExpertLoad(model) as load:
                metrics = packed_perplexity(
                    model,
                    source,
                    window,
                    byte_lengths_V=byte_lengths_V,
                    rows=options.limit,
                    document_mask=options.document_mask,
                    loss_on_document_start=not options.no_loss_on_document_start,
                    best_fit_rows=options.best_fit_rows,
                    masked=False if options.all_tokens else None,
                    batch_tokens=options.batch_tokens,
                    by_position=options.by_position,
                )
            results[f"packed {given}"] = metrics | load.metrics()
        else:
            results[f"perplexity {given}"] = perplexity(
                model,
                source,
                sliding,
                byte_lengths_V=byte_lengths_V,
                documents=options.limit,
                batch_tokens=options.batch_tokens,
                by_position=options.by_position,
            )
    return results


def text_sources(vocab_size: int, options: argparse.Namespace) -> Iterator[tuple[str, TokenSource | TextSource]]:
    """(argument, documents) of each --text argument; of arguments with the same files only the first."""
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
    """Accuracy of each --choices file."""
    results: Results = {}
    for path in {resolve_path(path): path for path in options.choices}.values():
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
    """Format the results: one line per metric."""
    rows = [(task, name, f"{value:.6g}") for task, figures in results.items() for name, value in figures.items()]
    rows.insert(0, ("task", "figure", "value"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used."""
    if not (options.text or options.choices or options.tasks):
        raise UserError("there is nothing to measure; give --text, --choices or --tasks")
    for name in ("limit", "window", "stride", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.best_fit_rows < 0:
        raise UserError(f"--best-fit-rows {options.best_fit_rows} must be 0 or more")
    if options.best_fit_rows and not options.document_mask:
        raise UserError(
            "--best-fit-rows puts documents side by side that must not see each other; give --document-mask"
        )
    check_device(options.device)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="HF_DIR", help="folder with the model and its tokenizer")
    parser.add_argument(
        "--text", nargs="+", type=path_or_url, default=[], metavar="FILES", help="text files or token shards"
    )
    parser.add_argument("--field", default="text", help="name of the text in a JSON line or Parquet row (%(default)s)")
    parser.add_argument("--kind", choices=CHOICES, help="kind of files to read, if there are several")
    parser.add_argument(
        "--choices", nargs="+", type=local_path, default=[], metavar="FILE", help="multiple choice items, JSONL"
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval")
    parser.add_argument("--task-folder", type=local_path, metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="most documents, packed rows or items of each")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens of context (default: {WINDOW}, or the model's number of positions if that is smaller)",
    )
    parser.add_argument("--stride", type=int, help="tokens by which the window moves; by default half of it")
    parser.add_argument("--packed", action="store_true", help="pack documents into rows, as in a run's validation")
    parser.add_argument("--document-mask", action="store_true", help="--packed: no attention between documents")
    parser.add_argument(
        "--no-loss-on-document-start", action="store_true", help="--packed: as data.loss_on_document_start=false"
    )
    parser.add_argument(
        "--best-fit-rows",
        type=int,
        default=0,
        metavar="N",
        help="--packed: as data.packing=best_fit with data.best_fit_rows=N; 0: in file order (%(default)s)",
    )
    parser.add_argument(
        "--all-tokens", action="store_true", help="--packed: count tokens that a loss mask leaves out, as data.loss=all"
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="--text: also the loss of tokens with 1, 2-3, 4-7, ... tokens of context (loss_at.1, loss_at.2, ...)",
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="most tokens in a forward pass (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="data type of the matrices (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the results as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
