"""Draw a run as one small picture: loss and expert imbalance over tokens.

    python tools/plot_run.py runs/smoke --out smoke.svg

The report (tools/report.py) has all of it, and more; this is a file to put into a README or a note.
"""

import argparse

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import run_main


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", required=True, help="the picture: an .svg or .png file"
    )
    return parser.parse_args()


def main() -> None:
    """Draw the picture and print where it is."""
    arguments = parse()
    from trinity.reporting.picture import save_picture

    print(save_picture(arguments.run, arguments.out))


if __name__ == "__main__":
    run_main(main)
