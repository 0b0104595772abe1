"""Write a small corpus of code and prose, or of conversations, from Python's own standard library.

python tools/prepare_corpus.py --out data/smoke/corpus
python tools/prepare_corpus.py --chat --out data/smoke/corpus
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.data.prepare.chat_corpus import write_chat_corpus
from trinity.data.prepare.corpus import write_corpus
from trinity.errors import run_main


def main() -> None:
    """Parse, write, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="folder for the .jsonl files")
    parser.add_argument(
        "--chat", action="store_true", help="write questions and answers (chat.*.jsonl), not code and prose"
    )
    arguments = parser.parse_args()
    write = write_chat_corpus if arguments.chat else write_corpus
    print(f"{'file':<26}{'documents':>10}{'bytes':>14}")
    for file in write(arguments.out):
        print(f"{file.name:<26}{file.documents:>10,}{file.bytes:>14,}")


if __name__ == "__main__":
    run_main(main)
