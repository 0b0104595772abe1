"""Benchmarks: ratios in one run on one machine, against named peers.

python tools/bench.py step
python tools/bench.py step --json step.json
python tools/bench.py --list
"""

import argparse
import json
from pathlib import Path

from benchmarks import mesh, muon, step

from trinity.errors import run_main

SUITES = {"step": step, "mesh": mesh, "muon": muon}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", choices=SUITES, help="what to measure")
    parser.add_argument("--list", action="store_true", help="list the suites")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quick", action="store_true", help="few repetitions, one peer: to see that it works")
    arguments = parser.parse_args()
    if not arguments.list and arguments.suite is None:
        parser.error("name a suite; see --list")
    return arguments


def main() -> None:
    """Run one suite and print its table."""
    arguments = parse()
    if arguments.list:
        for name, suite in SUITES.items():
            print(f"{name:<10} {suite.__doc__.splitlines()[0]}")
        return
    results = SUITES[arguments.suite].run(quick=arguments.quick)
    print(SUITES[arguments.suite].table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
