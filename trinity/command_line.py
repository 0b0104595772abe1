"""Types of argparse arguments that several command lines share."""

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
