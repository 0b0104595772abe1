"""Shared by the programs of launch/ and tools/: argparse types for paths, checks of options, and the help formatter."""

import argparse
import os
from pathlib import Path

from trinity.errors import UserError


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


def file_to_write(text: str) -> Path:
    """A file on this machine (see local_path) that can be made, so that a mistake is found before the work.

    Raises:
        ArgumentTypeError: it is a folder, or its folder does not exist.
    """
    path = local_path(text)
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty; write one")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file, as {path / 'NAME.json'}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist; make it, or name another file")
    return path


def check_one_process(tool: str) -> None:
    """Refuse a launcher of several processes, for a tool that is one.

    Args:
        tool: its name in the message.
    Raises:
        UserError: it runs under torchrun or another launcher, with more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{tool} runs in one process; start it by python {tool}, without torchrun")


def check_device(name: str) -> None:
    """Refuse a --device on which this machine cannot compute.

    Raises:
        UserError: an unknown type, one that is not here, too high an index, or meta, which has no values.
    """
    import torch

    try:
        usable = torch.ones(1, device=name).device.type != "meta"
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UserError(f"--device {name} is not available; use cpu")


def check_text(option: str, text: str) -> None:
    """Refuse a text that has no UTF-8: bytes of another encoding on the command line, or half a surrogate pair.

    Raises:
        UserError: names the character's position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{option} has no valid character at position {error.start}; write it in UTF-8") from None


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
