"""Start the project's programs without their imports: each is forked from a server that has imported torch and trinity.

A program is a process of its own with its own command line, environment, signals and exit code, as one that a user
starts; only its imports (3 s of CPU) are done once, in the server.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["trinity.training.trainer", "torch.distributed.checkpoint", "torch.distributed.fsdp"])


class Program:
    """A running program, with the methods of subprocess.Popen that tests use."""

    def __init__(self, script: Path, words: list[str], cwd: Path = ROOT) -> None:
        """Start it in this process's environment; what it prints goes into files until it is asked for."""
        self._files = [Path(tempfile.mkstemp(prefix=name)[1]) for name in ("output", "errors")]
        environment = dict(os.environ)
        self._process = SERVER.Process(target=_run, args=(script, words, cwd, environment, self._files))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, the negative signal number of a killed process, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As returncode."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        output, errors = (path.read_text() for path in self._files)
        for path in self._files:
            path.unlink()
        return output, errors


def _run(script: Path, words: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """What `python script words` does once Python has started."""
    from trinity.training import trainer  # imports Triton, for which the root conftest sets TRITON_INTERPRET first

    for number, path in enumerate(files, start=1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    trainer.STARTED = time.monotonic()  # not the server's start
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
