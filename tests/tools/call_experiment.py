"""Call a command of tools/experiments in this process."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "tools" / "experiments"

EXIT_CODE = 0 if find_spec("matplotlib") else 2
"""Of a finished experiment; without matplotlib it writes everything but the plot."""


class Lines(list):
    """A text stream that keeps the strings written to it."""

    write, flush, isatty = list.append, staticmethod(lambda: None), staticmethod(lambda: False)


def call_experiment(command: str, *words: object) -> tuple[int, str, str]:
    """Run a command; returns exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        output, errors = Lines(), Lines()
        patch.setattr(sys, "argv", [f"{command}.py", *map(str, words)])
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXPERIMENTS / f"{command}.py"), run_name="__main__")
    return end.value.code or 0, "".join(output), "".join(errors)
