"""Keep the loss and the gradient norm of every step of a run, for the page of results.

python tools/experiments/record_run.py runs/smoke --config configs/smoke.yaml

Writes tools/experiments/results/runs/NAME.json, with NAME from the config's file.
"""

import argparse
from pathlib import Path
from typing import Any

from experiment import package_versions
from spikes import RESULTS

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.json_files import write_json
from trinity.reporting.jsonl import read_objects, valid_step

FIELDS = ("loss", "grad_norm")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--config", required=True, type=local_path, help="the config that it was started with, as configs/smoke.yaml"
    )
    parser.add_argument(
        "--out", type=local_path, default=RESULTS / "runs", help="folder (tools/experiments/results/runs)"
    )
    parser.add_argument("--replace", action="store_true", help="write over an earlier record of this config")
    arguments = parser.parse_args()
    path, out = arguments.run / "metrics.jsonl", arguments.out / f"{arguments.config.stem}.json"
    if not arguments.config.is_file():
        raise UserError(f"--config {arguments.config} does not exist; give the file that the run was started with")
    if out.exists() and not arguments.replace:
        raise UserError(f"{out} exists; add --replace to write over it, or give another --out")
    steps = read_steps(path)
    if not steps:
        raise UserError(f"{path} has no step; give the directory of a run that has made steps")
    curves = {name: [steps[step].get(name) for step in sorted(steps)] for name in FIELDS}
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = {"config": str(arguments.config), "versions": package_versions(("torch",)), "steps": len(steps)}
    write_json(out, head | curves, indent=None)
    print(out)


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """Step → its record in metrics.jsonl, as it was made last; {} if the file does not exist."""
    if not path.exists():
        return {}
    records = [record for _, record in read_objects(path) if record is not None and "loss" in record]
    return {record["step"]: record for record in records if valid_step(record) is not None}


if __name__ == "__main__":
    run_main(main)
