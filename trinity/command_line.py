"""Shared by the programs of launch/ and tools/: argparse types for paths, and the help formatter."""

import argparse
import os
from pathlib import Path


def local_path(text: str) -> Path:
    """A path on this machine, with a leading ~ or ~user expanded to the home folder.

    A shell expands them only at the beginning of a word: not in --out=~/x, and not in quotes.

    Raises:
        ArgumentTypeError: there is no such user.
    """
    return Path(path_or_url(text))


def path_or_url(text: str) -> str:
    """A path on this machine (see local_path), or a URL, which is not changed.

    Raises:
        ArgumentTypeError: there is no such user.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        user = text.partition("/")[0]
        raise argparse.ArgumentTypeError(f"{user} is not a user's home folder; for a file of that name write ./{text}")
    return expanded


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, and append the default to the help of each option.

    A help text that already gives the default ("%(default)s", "by default", parentheses) is not changed.
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
