"""Pretrain a config.

    python launch/pretrain.py configs/smoke.yaml
    torchrun --standalone --nproc-per-node 1 launch/pretrain.py configs/smoke.yaml run.steps=20

The same command again resumes from the newest complete checkpoint. Every config key: --help-config, or docs/config.md.
"""

import argparse
from typing import Any

from trinity.command_line import HelpFormatter
from trinity.errors import run_main


class HelpConfig(argparse.Action):
    """Print the reference of config keys and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Print the keys below the prefixes `values`, or all."""
        from trinity.config.reference import reference

        print(reference(*values), end="")
        parser.exit()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/smoke.yaml")
    parser.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that win over the file's")
    parser.add_argument("--dry-run", action="store_true", help="print config and plan for this machine; train nothing")
    parser.add_argument(
        "--accept-change", action="append", default=[], metavar="a.b", help="on resume, this setting may differ"
    )
    parser.add_argument(
        "--help-config", nargs="*", action=HelpConfig, metavar="PREFIX",
        help="explain the config keys that begin so, such as optim.muon, and exit (default: all)",
    )  # fmt: skip
    return parser.parse_intermixed_args()


def main() -> int:
    """Check the config before anything is started, then run it."""
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
