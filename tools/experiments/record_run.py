"""Keep the loss and the gradient norm of every step of a run, for the page of results.

python tools/experiments/record_run.py runs/smoke --config configs/smoke.yaml

Writes tools/experiments/results/runs/NAME.json, with NAME from the config's file.
"""

import argparse
from pathlib import Path

from experiment import package_versions
from spikes import RESULTS

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.json_files import write_json
from trinity.reporting.jsonl import read_objects

FIELDS = ("loss", "grad_norm")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument("--config", required=True, help="the config that it was started with, as configs/smoke.yaml")
    parser.add_argument(
        "--out", type=local_path, default=RESULTS / "runs", help="folder (tools/experiments/results/runs)"
    )
    arguments = parser.parse_args()
    path = arguments.run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a run that has made steps")
    steps = {record["step"]: record for _, record in read_objects(path) if record is not None and "loss" in record}
    curves = {name: [steps[step].get(name) for step in sorted(steps)] for name in FIELDS}
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = {"config": arguments.config, "versions": package_versions(("torch",)), "steps": len(steps)}
    out = arguments.out / f"{Path(arguments.config).stem}.json"
    write_json(out, head | curves, indent=None)
    print(out)


if __name__ == "__main__":
    run_main(main)
