"""Train a byte-level BPE tokenizer.

Example: python tools/train_tokenizer.py --input corpus/*.train.jsonl --vocab-size 8192 --out tokenizer
The size of the report's tokenizer, from a sample: --vocab-size 200000 --pad-to-multiple 512 --sample-bytes 48e9
"""

import argparse

from trinity.command_line import HelpFormatter, local_path, path_or_url
from trinity.data.sources.file_formats import CHOICES
from trinity.data.tokenizer.tokenizer import load_tokenizer, vocabulary_size
from trinity.data.tokenizer.train import train_from_files
from trinity.errors import run_main


def main() -> None:
    """Parse, train, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        type=path_or_url,
        required=True,
        help="files, folders, patterns or URLs (see prepare_data.py)",
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="ids before padding; 259 of them are bytes and special tokens"
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder for the tokenizer")
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--kind", choices=CHOICES, help="kind of files to read where a folder or pattern has several")
    parser.add_argument(
        "--sample-bytes",
        type=count,
        metavar="N",
        help="learn from about N bytes of text, documents chosen evenly over all inputs (48e9 is enough)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument(
        "--pad-to-multiple",
        type=int,
        metavar="M",
        help="pad the vocabulary with unused special tokens to a multiple of M",
    )
    parser.add_argument("--force", action="store_true", help="replace the contents of --out")
    arguments = parser.parse_args()
    made = train_from_files(
        arguments.input,
        arguments.vocab_size,
        arguments.out,
        field=arguments.field,
        kind=arguments.kind,
        sample_bytes=arguments.sample_bytes,
        seed=arguments.seed,
        pad_to_multiple=arguments.pad_to_multiple,
        force=arguments.force,
        progress=True,
    )
    ids = vocabulary_size(load_tokenizer(arguments.out))
    print(f"{arguments.out}: {ids:,} ids{'' if made else ', already there'}")


def count(text: str) -> int:
    """Parse a whole number: 48000000000, or 48e9."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


if __name__ == "__main__":
    run_main(main)
