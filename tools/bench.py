"""Benchmarks: ratios in one run on one machine, against named peers.

python tools/bench.py step
python tools/bench.py experts --json experts.json
python tools/bench.py tune experts
python tools/bench.py --list
"""

import argparse
from importlib import import_module
from types import ModuleType

from trinity.command_line import HelpFormatter, file_to_write
from trinity.errors import UserError, run_main
from trinity.io.json_files import write_json

SUITES = (
    "step",
    "experts",
    "attention",
    "head",
    "norms",
    "routing",
    "muon",
    "mesh",
    "dispatcher",
    "data",
    "prepare",
    "overhead",
    "merge",
    "host",
    "generate",
)
"""Modules of tools/benchmarks, each with run(quick) and table(results)."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("suite", nargs="?", choices=[*SUITES, "tune"], help="what to measure; tune: an op's tiles")
    parser.add_argument("op", nargs="?", help="with tune: the op; see benchmarks/tune.py")
    parser.add_argument("--list", action="store_true", help="list the suites")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions, few contenders: only to see that it works"
    )
    arguments = parser.parse_args()
    if not arguments.list and arguments.suite is None:
        parser.error("name a suite; see --list")
    if (arguments.suite == "tune") != (arguments.op is not None):
        parser.error("tune, and tune alone, needs the name of an op, as: tune experts")
    return arguments


def main() -> None:
    """Run one suite and print its table."""
    arguments = parse()
    if arguments.list:
        for name in SUITES:
            print(f"{name:<10} {_about(name)}")
        return
    suite = _module(arguments.suite)
    words = {"op": arguments.op} if arguments.op else {}
    results = suite.run(quick=arguments.quick, **words)
    print(suite.table(results))
    if arguments.json:
        write_json(arguments.json, results)


def _module(name: str) -> ModuleType:
    """Import one suite; suites that are not asked for need not be importable."""
    try:
        return import_module(f"benchmarks.{name}")
    except ImportError as error:
        raise UserError(f"the suite {name} cannot be imported here: {error}") from error


def _about(name: str) -> str:
    try:
        return (_module(name).__doc__ or "").partition("\n")[0]
    except Exception as error:  # a broken suite is listed with its error
        return f"({error})"


if __name__ == "__main__":
    run_main(main)
