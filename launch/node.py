"""Run one node of a job: torchrun with all processes of this node, on a laptop, under SLURM or under Kubernetes.

    python launch/node.py --run-dir runs/mini launch/pretrain.py configs/mini.yaml run.dir=runs/mini
    python launch/node.py --nodes 256 --head node-0 --run-dir runs/large launch/pretrain.py configs/large.yaml …

slurm.sh and kubernetes.yaml call it once on every node. torchrun runs inside this process, which adds two things:

- Exit codes. torchrun returns 1 for every failure. A scheduler must distinguish 75 (stop requested, saved: start
  again), 2 (user mistake) and 3 (too many bad steps), both not to be repeated, and 1 (anything else: start again, a few
  times). node.py returns the code of the node's processes, or if it cannot see them the one in status.json.
- Signals. torchrun accepts one SIGTERM and kills its processes 30 s later (--shutdown-timeout sets this from torch 2.12
  on). SLURM sends several, and a second one makes torchrun hang or leave its processes behind. node.py forwards every
  signal to the processes instead; they take the time they need to save, and only the scheduler limits it.
"""

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import FAILURE, USER_MISTAKE, UserError, run_main

FINISHED, TOO_MANY_BAD_STEPS, SAVED = 0, 3, 75


def parse() -> argparse.Namespace:
    """Parse the command line; the node's number defaults to SLURM's or Kubernetes' environment variable."""
    scheduler_index = os.environ.get("SLURM_NODEID") or os.environ.get("JOB_COMPLETION_INDEX") or "0"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run-dir", type=local_path, required=True, help="run directory, the same as run.dir")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument(
        "--node", type=int, default=int(scheduler_index), help="index of this node, from 0 (set by the scheduler)"
    )
    parser.add_argument("--head", default="localhost", help="host of node 0, the rendezvous endpoint")
    parser.add_argument("--port", type=int, default=29400, help="port of the rendezvous endpoint")
    parser.add_argument("--processes", default="8", help="processes a node: a number, or gpu for one per GPU")
    parser.add_argument(
        "--id", default="trinity", help="rendezvous id; a new one for each start keeps processes of an old start out"
    )
    parser.add_argument("--join-seconds", type=int, default=600, help="seconds that the nodes wait for each other")
    parser.add_argument("script", help="the script to run, such as launch/pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser.parse_args()


def main() -> int:
    """Run this node's processes and return the exit code for the scheduler."""
    arguments = parse()
    run, stop = arguments.run_dir, arguments.run_dir / "STOP"
    if stop.exists():
        raise UserError(f"{stop} says: {' '.join(stop.read_text().split())}; remove that file to run again")
    (run / "traces").mkdir(parents=True, exist_ok=True)
    set_environment(run)
    before = file_version(run / "status.json")
    forward_signals()
    code = run_torchrun(torchrun_arguments(arguments))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # no process is left to save; a SIGTERM now must not hide the code
    if code == FAILURE and file_version(run / "status.json") != before:  # ignore the status.json of an earlier start
        code = code_in(run / "status.json")
    if code in (SAVED, FAILURE) and stop.exists():
        code = USER_MISTAKE  # a STOP file that appears during a run forbids another start
    print(f"node {arguments.node} of {arguments.nodes}: exit code {code}", file=sys.stderr)
    return code


def set_environment(run: Path) -> None:
    """Set NCCL's and torch's environment variables for all processes, unless the caller has set them.

    A collective that exceeds its group's time-out (torch's 10 minutes if the code sets none) ends its process:
    TORCH_NCCL_ASYNC_ERROR_HANDLING=3, the default. Each rank then writes its last 2000 collectives
    (TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT: on by default) to TORCH_FR_DUMP_TEMP_FILE.
    """
    # With a shared store, a node that returns after a crash waits for an address that the others do not write again.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run.resolve() / "traces" / "rank_"))
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # failures; INFO also shows which networks were chosen
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # or the last output of a killed process would be lost


def torchrun_arguments(arguments: argparse.Namespace) -> list[str]:
    """torchrun's arguments.

    torchrun must not restart by itself, since it would also restart after 75; the scheduler does, by the exit code. It
    must not handle SIGTERM and SIGINT. Each process logs into the run directory; the node's first one is also printed.
    """
    seconds = arguments.join_seconds
    rendezvous = f"is_host={str(arguments.node == 0).lower()},join_timeout={seconds},read_timeout={seconds}"
    options = {
        "--nnodes": arguments.nodes,
        "--nproc-per-node": arguments.processes,
        "--max-restarts": 0,
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"{arguments.head}:{arguments.port}",
        "--rdzv-id": arguments.id,
        "--rdzv-conf": rendezvous,
        "--signals-to-handle": "SIGHUP,SIGQUIT",
        "--log-dir": arguments.run_dir / "logs" / f"node_{arguments.node}",
        "--redirects": "3",
        "--tee": "0:3",
    }
    words = [f"{option}={value}" for option, value in options.items()]
    return [*words, arguments.script, *arguments.arguments]


def run_torchrun(words: list[str]) -> int:
    """Run torchrun: 0 if every process finished; 2, 3 or 75 if a process ended with it; 1 for any other failure."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (USER_MISTAKE, TOO_MANY_BAD_STEPS, SAVED) if code in codes), FAILURE)
    except Exception as error:  # the rendezvous failed, or the head node is gone
        print(f"torchrun: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE
    return FINISHED


def forward_signals() -> None:
    """Forward SIGTERM and SIGINT to the child processes; without children, a signal ends this process.

    A thread does it, since torchrun's thread may be in a call that runs no signal handler, such as the rendezvous.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)

    def forward() -> None:
        while True:
            number = os.read(read, 1)[0]
            children = child_processes()
            for child in children:
                os.kill(child, number)
            if number in (signal.SIGTERM, signal.SIGINT) and not children:
                print("asked to stop before the rendezvous was complete", file=sys.stderr, flush=True)
                os._exit(FAILURE)

    threading.Thread(target=forward, daemon=True).start()


def child_processes() -> list[int]:
    """The ids of this process's children, from /proc."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        if parent == os.getpid():
            children.append(int(path.parent.name))
    return children


def file_version(status: Path) -> tuple[int, int] | None:
    """The file's inode and modification time, which change when status.json is replaced; None without the file."""
    try:
        return status.stat().st_ino, status.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def code_in(status: Path) -> int:
    """The exit code in status.json; 1 if it has none of those that a scheduler distinguishes."""
    try:
        code = json.loads(status.read_text())["code"]
    except (OSError, ValueError, KeyError):
        return FAILURE
    return code if code in (FINISHED, USER_MISTAKE, TOO_MANY_BAD_STEPS, SAVED) else FAILURE


if __name__ == "__main__":
    run_main(main)
