"""Make a tokenizer for chat: a chat template, and a token for each marker that the template prints.

python tools/chat_tokenizer.py --tokenizer tokenizer --out chat_tokenizer
python tools/chat_tokenizer.py --tokenizer tokenizer --out chat_tokenizer --template my.jinja --ids last

The new tokens take the ids of unused ones, so the model keeps its size. Prepare chat data, and fine-tune, with the new
folder: data.tokenizer=chat_tokenizer. Exports of the run have the template.
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.data.chat.tokenizer import make_chat_tokenizer
from trinity.errors import run_main


def main() -> None:
    """Parse, write, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tokenizer", type=local_path, required=True, help="folder of the base model's tokenizer")
    parser.add_argument("--out", type=local_path, required=True, help="folder for the new tokenizer")
    parser.add_argument("--template", type=local_path, help="file of a chat template (Trinity's own by default)")
    parser.add_argument(
        "--ids",
        choices=("reserved", "last"),
        default="reserved",
        help="where new tokens go. reserved: ids of unused special tokens, such as <|reserved_0|>; last: ids of the "
        "last learned tokens, the rarest (%(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace another tokenizer in --out")
    arguments = parser.parse_args()
    new = make_chat_tokenizer(
        arguments.tokenizer, arguments.out, arguments.template, arguments.ids, force=arguments.force
    )
    print(f"{arguments.out}: {f'new tokens {chr(32).join(new)}' if new else 'no new token'}")


if __name__ == "__main__":
    run_main(main)
