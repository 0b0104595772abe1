"""Plot a run as a small picture for a README or a note: loss and expert imbalance over tokens.

    python tools/plot_run.py runs/smoke --out smoke.svg

For all charts write a report with tools/report.py.
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import run_main


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", required=True, help="the picture: an .svg or .png file"
    )
    return parser.parse_args()


def main() -> None:
    """Write the plot and print its path."""
    arguments = parse()
    from trinity.reporting.run_plot import save_plot

    print(save_plot(arguments.run, arguments.out))


if __name__ == "__main__":
    run_main(main)
