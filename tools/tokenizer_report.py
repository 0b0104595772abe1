"""Bytes per token of a tokenizer, by file or language, beside other tokenizers.

python tools/tokenizer_report.py --tokenizer tokenizer --against other corpus/*.validation.jsonl
python tools/tokenizer_report.py --tokenizer a --against b --against c --group-by language multilingual.jsonl
A ratio above 1: the tokenizer needs fewer tokens for that text than the other one.
"""

import argparse
import json
from pathlib import Path

from trinity.command_line import HelpFormatter
from trinity.data.tokenizer_report import as_text, as_values, tokenizer_report
from trinity.errors import run_main


def main() -> None:
    """Parse, count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "files", nargs="+", metavar="FILES", help="files, folders, patterns, URLs: text, .jsonl(.gz, .zst), .parquet"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="another folder with tokenizer.json; may be given several times",
    )
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--group-by", metavar="FIELD", help="a row for each value of this field, not for each file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as values")
    arguments = parser.parse_args()
    folders = [arguments.tokenizer, *arguments.against]
    rows = tokenizer_report(folders, arguments.files, field=arguments.field, group_by=arguments.group_by, progress=True)
    names = [str(folder) for folder in folders]
    print(as_text(rows, names))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_values(rows, names), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
