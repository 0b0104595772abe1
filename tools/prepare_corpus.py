"""Write a small corpus of code and prose from Python's own standard library.

Example: python tools/prepare_corpus.py --out data/smoke/corpus
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.data.prepare.corpus import write_corpus
from trinity.errors import run_main


def main() -> None:
    """Parse, write, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="folder for the four .jsonl files")
    arguments = parser.parse_args()
    print(f"{'file':<26}{'documents':>10}{'bytes':>14}")
    for file in write_corpus(arguments.out):
        print(f"{file.name:<26}{file.documents:>10,}{file.bytes:>14,}")


if __name__ == "__main__":
    run_main(main)
