"""Train a byte-level BPE tokenizer.

Example: python tools/train_tokenizer.py --input corpus/*.train.jsonl --vocab-size 8192 --out tokenizer
"""

import argparse
from pathlib import Path

from trinity.data.train_tokenizer import train_from_files
from trinity.errors import run_main


def main() -> None:
    """Parse, train, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text, .jsonl, .jsonl.gz, .parquet files")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids in all: 259 of them are bytes and special")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--bytes-limit", type=int, help="learn from the first so many bytes of text only")
    parser.add_argument("--force", action="store_true", help="write over what is in --out")
    arguments = parser.parse_args()
    made = train_from_files(
        arguments.input,
        arguments.vocab_size,
        arguments.out,
        field=arguments.field,
        bytes_limit=arguments.bytes_limit,
        force=arguments.force,
        progress=True,
    )
    print(f"{arguments.out}: {arguments.vocab_size:,} ids{'' if made else ', already there'}")


if __name__ == "__main__":
    run_main(main)
