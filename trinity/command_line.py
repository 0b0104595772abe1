"""What the command lines of launch/ and tools/ share: types of path arguments, and how help is printed."""

import argparse
import os
from pathlib import Path


def local_path(text: str) -> Path:
    """A path on this machine; ~ and ~user at its beginning are home folders, as in a shell.

    A shell itself expands them only where they begin a word: not in --out=~/x, nor between quotes.

    Raises:
        ArgumentTypeError: there is no such user.
    """
    return Path(place(text))


def place(text: str) -> str:
    """A path on this machine (see local_path), or the URL of something that lies elsewhere, which stays as it is.

    Raises:
        ArgumentTypeError: there is no such user.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        user = text.partition("/")[0]
        raise argparse.ArgumentTypeError(f"{user} is no user's home folder; for a file of that name write ./{text}")
    return expanded


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends the help of each option with its default.

    What an option's help says of its default itself, as "%(default)s", "by default" or in parentheses, stays alone.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        if not text or not action.option_strings or action.required or value is argparse.SUPPRESS:
            return text
        if "default" in text or action.nargs == 0:  # a switch is off
            return text
        if value is None or value == []:
            return text if text.endswith(")") else f"{text} (default: none)"
        return f"{text} (default: %(default)s)"
