"""Turn text into token shards. Run the same command again after a kill: it goes on where it stopped.

Example: python tools/prepare_data.py --input corpus/*.jsonl --tokenizer tokenizer --out shards
"""

import argparse
from pathlib import Path

from trinity.data.prepare import SHARD_TOKENS, prepare_data
from trinity.errors import run_main


def main() -> None:
    """Parse, prepare, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text, .jsonl, .jsonl.gz, .parquet files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a full shard (%(default)s)")
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out and count what cannot be read")
    arguments = parser.parse_args()
    index, already = prepare_data(
        arguments.input,
        arguments.tokenizer,
        arguments.out,
        shard_tokens=arguments.shard_tokens,
        field=arguments.field,
        skip_bad_lines=arguments.skip_bad_lines,
        progress=True,
    )
    skipped = "".join(f", {count:,} {reason} skipped" for reason, count in index["skipped"].items())
    print(
        f"{arguments.out}{' was already done' if already else ''}: {index['documents']:,} documents, "
        f"{index['tokens']:,} tokens, {index['text_bytes']:,} bytes of text, {len(index['shards'])} shards{skipped}"
    )


if __name__ == "__main__":
    run_main(main)
