"""Bytes per token of a tokenizer, by file or language, beside other tokenizers.

python tools/tokenizer_report.py --tokenizer tokenizer --against other corpus/*.validation.jsonl
python tools/tokenizer_report.py --tokenizer a --against b --against c --group-by language multilingual.jsonl
A ratio above 1: the tokenizer needs fewer tokens for that text than the other one.
"""

import argparse

from trinity.command_line import HelpFormatter, file_to_write, local_path, path_or_url
from trinity.data.sources.file_formats import CHOICES
from trinity.data.tokenizer.report import as_text, as_values, tokenizer_report
from trinity.errors import run_main
from trinity.io.json_files import write_json


def main() -> None:
    """Parse, count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "files",
        nargs="+",
        type=path_or_url,
        metavar="FILES",
        help="files, folders, patterns or URLs (see prepare_data.py)",
    )
    parser.add_argument("--tokenizer", type=local_path, required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--against",
        type=local_path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="another folder with tokenizer.json; may be given several times",
    )
    parser.add_argument("--field", default="text", help="name of the text in a line or row (%(default)s)")
    parser.add_argument("--kind", choices=CHOICES, help="kind of files to read where a folder or pattern has several")
    parser.add_argument("--group-by", metavar="FIELD", help="a row for each value of this field, not for each file")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the rows as values")
    arguments = parser.parse_args()
    folders = [arguments.tokenizer, *arguments.against]
    chosen = {"field": arguments.field, "kind": arguments.kind, "group_by": arguments.group_by}
    rows = tokenizer_report(folders, arguments.files, **chosen, progress=True)
    names = [str(folder) for folder in folders]
    print(as_text(rows, names))
    if arguments.json:
        write_json(arguments.json, as_values(rows, names))


if __name__ == "__main__":
    run_main(main)
