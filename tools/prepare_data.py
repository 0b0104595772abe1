"""Turn text into token shards. After a kill, the same command resumes where it stopped.

python tools/prepare_data.py --input corpus/*.jsonl --tokenizer tokenizer --out shards
python tools/prepare_data.py --input corpus 'more/**/*.parquet' s3://bucket/web --tokenizer tokenizer --out shards
python tools/prepare_data.py --dataset allenai/c4 --config en --tokenizer tokenizer --out shards --deduplicate

With --chat, rows are conversations (messages with role and content) or have a prompt and a completion, and shards get a
loss mask: config data.loss=masked trains the assistant's tokens alone. trinity/data/chat/README.md has the format.
python tools/prepare_data.py --chat --input chats.jsonl --tokenizer chat_tokenizer --out shards --max-tokens 4096

An input is a file (text; lines of JSON as .jsonl, .ndjson, .jsonl.gz, .json.gz, .json.zst; .parquet), a folder (all
files of one kind in it and below), a pattern in quotes, or the URL of one of them. In a folder of several kinds,
Parquet files or lines are read, and text beside them is not; --kind chooses. Files left out are named on stderr.
The result does not depend on --workers.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from trinity.command_line import HelpFormatter, local_path, path_or_url
from trinity.data.chat.encode import ChatOptions, Loss, TooLong, Turns
from trinity.data.prepare.prepare import SHARD_TOKENS, prepare_data
from trinity.data.sources.file_formats import CHOICES
from trinity.data.sources.inputs import Dataset
from trinity.errors import UserError, run_main

STOPPED = 130
TOKENIZERS_OWN = "tokenizer"
CHAT_OPTIONS = ("template", *ChatOptions._fields)
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
    add_chat_arguments(parser)
    parser.add_argument("--workers", type=int, default=CORES, help="processes that encode (one a core: %(default)s)")
    arguments = parser.parse_args()
    if arguments.dataset is None and (arguments.config or arguments.split):
        parser.error("--config and --split say which part of a --dataset to read; --input has none")
    if arguments.dataset is not None and arguments.kind:
        parser.error("--kind says which files of --input to read; --dataset has none")
    given = [name for name in CHAT_OPTIONS if getattr(arguments, name) is not None]
    if given and not arguments.chat:
        parser.error(f"--{given[0].replace('_', '-')} is about conversations; add --chat")
    return arguments


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of --chat; None where one is not given."""
    chat = parser.add_argument_group("conversations")
    chat.add_argument("--chat", action="store_true", help="rows are conversations, or prompts with completions")
    chat.add_argument(
        "--template",
        type=template_file,
        metavar="FILE|tokenizer",
        help="chat template; tokenizer: its chat_template.jinja (tokenizer)",
    )
    chat.add_argument(
        "--loss",
        choices=get_args(Loss),
        help="trained tokens. assistant: all turns of the assistant, and completions; completion: completions, and a "
        "conversation's last turn; all: every token (assistant)",
    )
    chat.add_argument(
        "--turns",
        choices=get_args(Turns),
        help="whole: a conversation is one example; split: one example for each turn of the assistant, with all before "
        "it (whole)",
    )
    chat.add_argument("--max-tokens", type=int, help="most tokens of an example, as data.sequence_length (any number)")
    chat.add_argument(
        "--too-long",
        choices=get_args(TooLong),
        help="longer examples. refuse: stop; drop: leave out and count them; truncate-prompt: leave out as many tokens "
        "as needed of those between BOS and the first trained token (refuse)",
    )


def template_file(text: str) -> Path | None:
    """Parse FILE|tokenizer."""
    return Path(TOKENIZERS_OWN) if text == TOKENIZERS_OWN else local_path(text)


def chat_options(arguments: argparse.Namespace) -> ChatOptions | None:
    """The options of --chat, None without it.

    Raises:
        UserError: they do not fit together.
    """
    if not arguments.chat:
        return None
    given = {name: getattr(arguments, name) for name in ChatOptions._fields if getattr(arguments, name) is not None}
    options = ChatOptions(**given)
    if options.max_tokens is not None and options.max_tokens < 2:
        raise UserError(f"--max-tokens {options.max_tokens} must be at least 2, BOS and a token to train")
    if options.max_tokens is None and options.too_long != "refuse":
        raise UserError(f"--too-long {options.too_long} has no length; add --max-tokens, as data.sequence_length")
    if options.turns == "split" and options.loss == "all":
        raise UserError(
            "--turns split repeats earlier turns, and --loss all would train them again; use one of the two"
        )
    return options


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
            chat=chat_options(arguments),
            template=None if arguments.template == Path(TOKENIZERS_OWN) else arguments.template,
        )
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return STOPPED
    skipped = "".join(f", {count:,} {reason} skipped" for reason, count in index["skipped"].items())
    tokens = f"{index['tokens']:,} tokens" + (f" ({index['trained']:,} trained)" if "trained" in index else "")
    print(
        f"{arguments.out}{' was already done' if already else ''}: {index['documents']:,} documents, "
        f"{tokens}, {index['text_bytes']:,} bytes of text, {len(index['shards'])} shards{skipped}"
    )
    return None


if __name__ == "__main__":
    run_main(main)
