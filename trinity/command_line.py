"""How the command lines of launch/ and tools/ print their help."""

import argparse


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
