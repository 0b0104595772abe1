"""Turn text into token shards. After a kill, the same command resumes where it stopped.

python tools/prepare_data.py --input corpus/*.jsonl --tokenizer tokenizer --out shards
python tools/prepare_data.py --input corpus 'more/**/*.parquet' s3://bucket/web --tokenizer tokenizer --out shards
python tools/prepare_data.py --dataset allenai/c4 --config en --tokenizer tokenizer --out shards --deduplicate

An input is a file (text; lines of JSON as .jsonl, .ndjson, .jsonl.gz, .json.gz, .json.zst; .parquet), a folder (all
files of one kind in it and below), a pattern in quotes, or the URL of one of them. In a folder of several kinds,
Parquet files or lines are read, and text beside them is not; --kind chooses. Files left out are named on stderr.
The result does not depend on --workers.
"""

import argparse
import os
import sys

from trinity.command_line import HelpFormatter, local_path, path_or_url
from trinity.data.prepare.prepare import SHARD_TOKENS, prepare_data
from trinity.data.sources.file_formats import CHOICES
from trinity.data.sources.inputs import Dataset
from trinity.errors import run_main

STOPPED = 130
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        type=path_or_url,
        metavar="INPUT",
        help="files, folders, patterns, URLs, read in this order",
    )
    source.add_argument(
        "--dataset",
        type=path_or_url,
        metavar="NAME",
        help="a data set of the Hugging Face hub, or its folder; streamed",
    )
    parser.add_argument("--config", help="with --dataset: its configuration")
    parser.add_argument("--split", help="with --dataset: its split (train)")
    parser.add_argument("--tokenizer", type=local_path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=local_path, required=True, help="folder for the shards, on a local disk")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a full shard (%(default)s)")
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--kind", choices=CHOICES, help="kind of files to read where a folder or pattern has several")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out and count items that cannot be read")
    parser.add_argument("--deduplicate", action="store_true", help="of equal texts keep the first, count the others")
    parser.add_argument("--workers", type=int, default=CORES, help="processes that encode (one a core: %(default)s)")
    arguments = parser.parse_args()
    if arguments.dataset is None and (arguments.config or arguments.split):
        parser.error("--config and --split say which part of a --dataset to read; --input has none")
    if arguments.dataset is not None and arguments.kind:
        parser.error("--kind says which files of --input to read; --dataset has none")
    return arguments


def main() -> int | None:
    """Parse, prepare, print one line."""
    arguments = parse()
    if arguments.dataset is not None:
        inputs = Dataset(arguments.dataset, arguments.config, arguments.split or "train")
    else:
        inputs = arguments.input
    try:
        index, already = prepare_data(
            inputs,
            arguments.tokenizer,
            arguments.out,
            shard_tokens=arguments.shard_tokens,
            field=arguments.field,
            kind=arguments.kind,
            skip_bad_lines=arguments.skip_bad_lines,
            deduplicate=arguments.deduplicate,
            workers=arguments.workers,
            progress=True,
        )
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return STOPPED
    skipped = "".join(f", {count:,} {reason} skipped" for reason, count in index["skipped"].items())
    print(
        f"{arguments.out}{' was already done' if already else ''}: {index['documents']:,} documents, "
        f"{index['tokens']:,} tokens, {index['text_bytes']:,} bytes of text, {len(index['shards'])} shards{skipped}"
    )
    return None


if __name__ == "__main__":
    run_main(main)
