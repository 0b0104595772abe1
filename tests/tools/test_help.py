"""--help of every command shows the default of each option."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from trinity.command_line import HelpFormatter

ROOT = Path(__file__).parents[2]
PARSES = re.compile(r"ArgumentParser\(|run_experiment\(|command_line\(")
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("launch", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if PARSES.search(text := path.read_text(encoding="utf-8")) and "__main__" in text
)


class Parsed(Exception):
    """Raised with the parser in place of parsing."""


def parser_of(script: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script builds in parse() or main()."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    spec = importlib.util.spec_from_file_location(f"words_of_{script.stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    spec.loader.exec_module(module)
    with pytest.raises(Parsed) as made:
        getattr(module, "parse", getattr(module, "main", None))()
    return made.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_shows_every_default(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option with a value shows its default, or describes it in parentheses at the end."""
    parser = parser_of(script, monkeypatch)
    assert parser.formatter_class is HelpFormatter
    for action in parser._actions:
        if not action.option_strings or action.required or action.nargs == 0:
            continue
        text = parser._get_formatter()._expand_help(action)
        if action.default in (None, []):
            assert "default" in text or text.endswith(")"), action.option_strings
        else:
            assert f"{action.default})" in text[text.rindex("(") :], action.option_strings


def test_all_scripts_are_found() -> None:
    assert {"launch/pretrain.py", "tools/plan.py", "tools/prepare_data.py"} <= {str(script) for script in SCRIPTS}
    assert len(SCRIPTS) >= 16
