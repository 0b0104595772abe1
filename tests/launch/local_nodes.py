"""Nodes of a run as processes of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.launch_fakes import ROOT


def start(run: Path, command: list[str], *options: str, index: int = 0) -> subprocess.Popen:
    """launch/node.py with the real torchrun and one process, which finds the run's folder in $RUN.

    Args:
        run: the run's folder.
        command: the script and its words.
        options: of node.py.
        index: which node this is.
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
    """Kill what `start` started for this run, and what that did."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"\0RUN={run}\0" in "\0" + path.read_text(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # it ended meanwhile, or is somebody else's
            continue


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(path: Path, seconds: float = 60) -> str:
    """The text of a file, once it is there."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written in {seconds} s"
        time.sleep(0.05)
    return path.read_text()
