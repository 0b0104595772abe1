"""Soak test: a run of two processes under torchrun that is killed repeatedly at random, against an undisturbed one.

python tests/training/soak.py --steps 1000 --kills 20 --out FOLDER

torchrun restarts the run after each kill. In the end all metrics of all steps must be equal, bit for bit, since the
number of processes is the same. Prints the time that the kills cost.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def soak(config: Path, run: Path, world: int, kills: int, seed: int = 1) -> dict[str, float]:
    """Start the config's run, kill a random worker `kills` times, and let the run end.

    The kills are spread over the run except its last 10 steps: each comes at a random moment, up to 0.3 s after a
    randomly chosen step.

    Args:
        config: of a run in `run` that saves often; a YAML file with run.steps.
        run: its directory.
        world: processes.
        kills: SIGKILLs to a worker.
    Returns:
        "kills", "redone" (number of repeated steps), "seconds".
    """
    numbers, began = random.Random(seed), time.monotonic()
    steps = yaml.safe_load(config.read_text())["run"]["steps"]
    process = start(config, world, restarts=kills + 5)
    killed = 0
    for step in sorted(numbers.sample(range(1, steps - 10), kills)):
        while process.poll() is None and lines_of(run / "metrics.jsonl") < step:
            time.sleep(0.01)
        time.sleep(numbers.uniform(0, 0.3))
        workers = pids_below(process.pid) if process.poll() is None else []
        if workers:
            os.kill(numbers.choice(workers), signal.SIGKILL)
            killed += 1
            wait_until_gone(workers)
    process.wait()
    assert process.returncode == 0, config.with_suffix(".log").read_text()[-3000:]
    redone = sum(lines_of(path) for path in run.glob("metrics.tail.*.jsonl"))
    return {"kills": killed, "redone": redone, "seconds": time.monotonic() - began}


def start(config: Path, world: int, restarts: int) -> subprocess.Popen:
    """Start the run under torchrun, as a user does."""
    torchrun = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "--max-restarts",
        str(restarts),
    ]
    command = [sys.executable, "-m", *torchrun, str(ROOT / "launch/pretrain.py"), str(config)]
    # A pipe that nobody reads would fill and stop the run.
    with open(config.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def pids_below(launcher: int) -> list[int]:
    """The launcher's workers: its children that run pretrain.py."""
    pids = []
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        if any(word.endswith(b"pretrain.py") for word in words):
            pids.append(int(pid))
    return pids


def wait_until_gone(pids: list[int]) -> None:
    """Wait until the launcher has ended all workers of a start, so that the next kill hits the next start."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def lines_of(path: Path) -> int:
    """Lines in a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def costs(run: Path, seconds: float) -> dict[str, float]:
    """How a run spent its time: `seconds` in total, all starts included.

    Returns:
        "in_steps": share of the time in steps that count; "stall": median seconds that training stood still for a
        checkpoint; "ready": median seconds from a process's start to its first step.
    """
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    stalls = [step["checkpoint_seconds"] for step in steps if "checkpoint_seconds" in step]
    ready = [event["seconds"] for event in events if event["kind"] in ("start", "resume")]
    return {
        "in_steps": sum(step["step_seconds"] for step in steps) / seconds,
        "stall": statistics.median(stalls),
        "ready": statistics.median(ready),
    }


def main() -> None:
    """Run both on the tests' corpus; print the results and compare the metrics."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import everything_on, make_corpus
    from tests.training.run_files import metrics

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    corpus = make_corpus(arguments.out / "corpus")
    runs = {}
    for name, kills in (("alone", 0), ("killed", arguments.kills)):
        settings = everything_on(corpus, arguments.out / name)
        settings["run"]["steps"] = arguments.steps
        settings["checkpoint"] = {"every": 10}
        settings["evaluation"]["every"] = 100
        config = arguments.out / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        outcome = soak(config, arguments.out / name, 2, kills)
        print(name, json.dumps(outcome | costs(arguments.out / name, outcome["seconds"])))
        runs[name] = metrics(arguments.out / name)
    assert [line["step"] for line in runs["killed"]] == list(range(1, arguments.steps + 1))
    assert runs["killed"] == runs["alone"]
    print("all metrics of all steps are equal")


if __name__ == "__main__":
    main()
