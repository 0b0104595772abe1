"""Start the nodes of a run as processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.launch_fakes import ROOT


def start(run: Path, command: list[str], *options: str, index: int = 0) -> subprocess.Popen:
    """Start launch/node.py with the real torchrun and one process, which gets the run directory in $RUN.

    Args:
        run: the run directory.
        command: the script and its arguments.
        options: of node.py.
        index: the node's index.
    """
    node = ["launch/node.py", "--processes=1", f"--node={index}", f"--run-dir={run}"]
    return subprocess.Popen(
        [sys.executable, *node, *options, *command],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RUN": str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_all(run: Path) -> None:
    """Kill all processes that `start` started for this run, with their children."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"\0RUN={run}\0" in "\0" + path.read_text(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # the process has ended, or belongs to another user
            continue


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(path: Path, seconds: float = 60) -> str:
    """Wait until a file exists and is not empty; returns its text."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written in {seconds} s"
        time.sleep(0.05)
    return path.read_text()
