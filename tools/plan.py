"""What a run costs on a cluster: memory, traffic and time of a GPU, worked out here in seconds.

python tools/plan.py configs/large.yaml --gpus 2048 --gpu b300
python tools/plan.py configs/nano_1gpu.yaml recompute=none batch.microbatch=4 --json plan.json
"""

import argparse
import json
from pathlib import Path

from trinity.command_line import HelpFormatter
from trinity.errors import run_main


def parse() -> argparse.Namespace:
    """The command line."""
    from trinity.training.hardware import GPUS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that win over the file's")
    parser.add_argument("--gpus", type=int, help="how many; by default what the mesh's fixed sizes make")
    parser.add_argument("--gpu", choices=list(GPUS), default="h200", help="which (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as values")
    return parser.parse_intermixed_args()


def main() -> None:
    """Plan and print."""
    arguments = parse()
    from trinity.config import load_config
    from trinity.planning.plan import make_plan
    from trinity.planning.text import as_text, as_values

    plan = make_plan(load_config(arguments.config, arguments.settings), arguments.gpus, arguments.gpu)
    print(as_text(plan))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_values(plan), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
