"""Pretrain a model from a config.

    python launch/pretrain.py configs/smoke.yaml
    torchrun --standalone --nproc-per-node 1 launch/pretrain.py configs/smoke.yaml run.steps=20

The same command again resumes from the newest complete checkpoint. All config keys: --help-config, or docs/config.md.
"""

import argparse
from typing import Any

from trinity.command_line import HelpFormatter
from trinity.errors import run_main


class HelpConfig(argparse.Action):
    """The --help-config option: print the reference of the config keys and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Print the keys that begin with the prefixes `values`, or all keys."""
        from trinity.config.reference import reference

        print(reference(*values), end="")
        parser.exit()


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/smoke.yaml")
    parser.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that override the file's")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config and its plan on this machine, without training"
    )
    parser.add_argument(
        "--accept-change", action="append", default=[], metavar="a.b",
        help="on resume, accept that this setting differs from the checkpoint's (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--help-config", nargs="*", action=HelpConfig, metavar="PREFIX",
        help="explain the config keys that begin with PREFIX, such as optim.muon, and exit (default: all)",
    )  # fmt: skip
    return parser.parse_intermixed_args()


def main() -> int:
    """Check the config, then train, or print the plan for --dry-run. Returns the exit code."""
    arguments = parse()
    from trinity.config import load_config, to_yaml

    config = load_config(arguments.config, arguments.settings)
    if arguments.dry_run:
        from trinity.planning.dry_run import dry_run

        dry_run(config, to_yaml(config))
        return 0
    from trinity.training.trainer import pretrain

    return pretrain(config, arguments.accept_change)


if __name__ == "__main__":
    run_main(main)
