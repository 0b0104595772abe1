"""Write the report of a run as one HTML file that needs no network: loss, optimizer, speed, routing, events, settings.

    python tools/report.py runs/smoke
    python tools/report.py runs/smoke runs/other --out compared.html

Several runs are drawn in the same charts, and the settings that differ are listed. A run may still be running.
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import run_main


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="the HTML file (report.html in the first RUN_DIR)"
    )
    return parser.parse_args()


def main() -> None:
    """Write the report and print its path."""
    arguments = parse()
    from trinity.reporting import write_report

    print(write_report(arguments.runs, arguments.out))


if __name__ == "__main__":
    run_main(main)
