"""One node of a run: torchrun with all processes of this node, the same on a laptop, under SLURM and under Kubernetes.

    python launch/node.py --run-dir runs/mini launch/pretrain.py configs/mini.yaml run.dir=runs/mini
    python launch/node.py --nodes 256 --head node-0 --run-dir runs/large launch/pretrain.py configs/large.yaml …

slurm.sh and kubernetes.yaml call it once on every node. torchrun runs inside this process, for two things that it does
not do by itself:

- Its exit code is 1 for whatever went wrong. A scheduler must tell 75 (saved because it was asked to stop: start it
  again) from 2 (the user's mistake) and 3 (too many bad steps), which it must not repeat, and 1 (anything else: start
  it again, a few times). Here the code is that of the node's processes, else the one in status.json.
- It takes one SIGTERM, and kills its processes 30 s later (--shutdown-timeout, from torch 2.12 on, is how long). SLURM
  sends several, and a second one makes it hang or leave its processes behind. Here signals pass it by: the processes
  get each of them, save in their own time, and only the scheduler bounds it.
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
    """The command line; SLURM and Kubernetes say in the environment which node this is."""
    here = os.environ.get("SLURM_NODEID") or os.environ.get("JOB_COMPLETION_INDEX") or "0"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run-dir", type=local_path, required=True, help="the run's folder, the same as run.dir")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the run")
    parser.add_argument(
        "--node", type=int, default=int(here), help="this one among them, from 0 (as the scheduler says)"
    )
    parser.add_argument("--head", default="localhost", help="host of node 0, where the nodes meet")
    parser.add_argument("--port", type=int, default=29400, help="port there")
    parser.add_argument("--processes", default="8", help="processes of a node: a number, or gpu for one each GPU")
    parser.add_argument(
        "--id", default="trinity", help="name of this start; another one each time keeps stragglers out"
    )
    parser.add_argument("--join-seconds", type=int, default=600, help="how long the nodes wait for each other")
    parser.add_argument("script", help="what to run, such as launch/pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args()


def main() -> int:
    """Run this node's processes and return the code that the scheduler acts on."""
    arguments = parse()
    run, stop = arguments.run_dir, arguments.run_dir / "STOP"
    if stop.exists():
        raise UserError(f"{stop} says: {' '.join(stop.read_text().split())}; remove that file to run again")
    (run / "traces").mkdir(parents=True, exist_ok=True)
    set_environment(run)
    before = writing_of(run / "status.json")
    pass_signals_on()
    code = run_torchrun(torchrun_words(arguments))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nobody is left who could save; one more must not hide the code
    if code == FAILURE and writing_of(run / "status.json") != before:  # an earlier start's says nothing of this one
        code = code_in(run / "status.json")
    if code in (SAVED, FAILURE) and stop.exists():
        code = USER_MISTAKE  # whoever puts a STOP into a run that goes on does not want it started again
    print(f"node {arguments.node} of {arguments.nodes}: exit code {code}", file=sys.stderr)
    return code


def set_environment(run: Path) -> None:
    """What NCCL and torch are told, where the caller has not said otherwise. All of it reaches every process.

    A collective that waits longer than its group's time-out (torch's 10 minutes, if the code gives none) ends its
    process: TORCH_NCCL_ASYNC_ERROR_HANDLING=3, the default. Each rank then writes its last 2000 collectives
    (TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT: on by default), to where the variable below says.
    """
    # Else a node that comes back after a crash waits for an address that the others do not write a second time.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run.resolve() / "traces" / "rank_"))
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # what failed; INFO also says which networks were chosen
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # the last words of a killed process are the interesting ones


def torchrun_words(arguments: argparse.Namespace) -> list[str]:
    """The words after `torchrun`.

    No restarts of its own: it would start again after 75 too, and the scheduler does it by the code. It handles no
    SIGTERM and SIGINT. Each process logs into the run's folder, and of each node the first one is shown.
    """
    seconds = arguments.join_seconds
    meeting = f"is_host={str(arguments.node == 0).lower()},join_timeout={seconds},read_timeout={seconds}"
    options = {
        "--nnodes": arguments.nodes,
        "--nproc-per-node": arguments.processes,
        "--max-restarts": 0,
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"{arguments.head}:{arguments.port}",
        "--rdzv-id": arguments.id,
        "--rdzv-conf": meeting,
        "--signals-to-handle": "SIGHUP,SIGQUIT",
        "--log-dir": arguments.run_dir / "logs" / f"node_{arguments.node}",
        "--redirects": "3",
        "--tee": "0:3",
    }
    words = [f"{option}={value}" for option, value in options.items()]
    return [*words, arguments.script, *arguments.arguments]


def run_torchrun(words: list[str]) -> int:
    """0 where every process of the node finished; 2, 3 or 75 where one ended so; 1 for all else, torchrun's own too."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (USER_MISTAKE, TOO_MANY_BAD_STEPS, SAVED) if code in codes), FAILURE)
    except Exception as error:  # the nodes did not meet, or the head is gone
        print(f"torchrun: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE
    return FINISHED


def pass_signals_on() -> None:
    """From now on SIGTERM and SIGINT go to the processes that this one started; without any, they end it.

    In a thread: torchrun's may be deep in a call that lets no signal handler run, as when it waits for the other nodes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)

    def work() -> None:
        while True:
            number = os.read(read, 1)[0]
            children = children_of_this()
            for child in children:
                os.kill(child, number)
            if number in (signal.SIGTERM, signal.SIGINT) and not children:
                print("asked to stop before the nodes had met", file=sys.stderr, flush=True)
                os._exit(FAILURE)

    threading.Thread(target=work, daemon=True).start()


def children_of_this() -> list[int]:
    """The processes whose parent is this one, as /proc has them."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        if parent == os.getpid():
            children.append(int(path.parent.name))
    return children


def writing_of(status: Path) -> tuple[int, int] | None:
    """Which writing of a file this is: status.json is replaced as a whole, so that its inode and time change."""
    try:
        return status.stat().st_ino, status.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def code_in(status: Path) -> int:
    """The code in status.json; 1 where it has none that a scheduler acts on."""
    try:
        code = json.loads(status.read_text())["code"]
    except (OSError, ValueError, KeyError):
        return FAILURE
    return code if code in (FINISHED, USER_MISTAKE, TOO_MANY_BAD_STEPS, SAVED) else FAILURE


if __name__ == "__main__":
    run_main(main)
