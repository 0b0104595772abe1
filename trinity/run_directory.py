"""A run directory: its lock, its configs, status.json, and the STOP and SAVE files.

lock is held with flock, so a crashed process does not keep it. status.json, config files and STOP are written
atomically (trinity/io/local.py). STOP is written after a user's mistake or too many bad steps: a launcher that restarts
by itself must not repeat a mistake, so a start refuses while STOP exists.
"""

import errno
import json
import socket
import time
from pathlib import Path
from typing import IO

from trinity.config.load import load_config, save_config
from trinity.config.paths import absolute_paths, config_files
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.io.json_files import write_json
from trinity.io.local import make_folder, try_lock, write_atomically


class RunDirectory:
    """The directory of one run, locked by rank 0 until it ends.

    Args:
        path: the folder; created if missing.
        first: whether this is rank 0; other ranks do not touch the folder.

    Raises:
        UserError: the folder cannot be written, another process holds the lock, or STOP exists.
    """

    def __init__(self, path: Path, first: bool = True) -> None:
        self.path, self._first, self._lock = path, first, None
        if first:
            self._lock = self._acquire(path)

    def _acquire(self, path: Path) -> IO[str]:
        stop = path / "STOP"
        if stop.exists():
            reason = " ".join(stop.read_text(errors="replace").split())
            raise UserError(f"{stop} says: {reason}; remove that file to run again")
        saved = path / "checkpoints"
        if saved.exists() and not saved.is_dir():
            raise UserError(f"{saved} is not a folder, but checkpoints are saved there; move it away, or set run.dir")
        try:
            make_folder(path)
            return self._acquire_lock()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(f"the run directory {path} cannot be written ({error.strerror}); set run.dir") from None

    def _acquire_lock(self) -> IO[str]:
        lock = open(self.path / "lock", "a+")  # noqa: SIM115 (held until the process ends)
        if not try_lock(lock.fileno()):
            lock.seek(0)
            raise UserError(f"{self.path} is in use by another run ({lock.read().strip()}); wait for it or set run.dir")
        lock.truncate(0)
        lock.write(f"host {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        return lock

    def add_config(self, config: RunConfig) -> None:
        """Write the resolved config of this start, with absolute paths: config.yaml first, then config.N.yaml."""
        if not self._first:
            return
        numbered = config_files(self.path)
        number = max(numbered) + 1 if numbered else 0
        save_config(absolute_paths(config), self.path / (f"config.{number}.yaml" if number else "config.yaml"))

    def set_status(self, state: str, code: int | None, step: int, reason: str = "") -> None:
        """Write status.json; state is running, finished, saved or stopped."""
        if self._first:
            status = {"state": state, "code": code, "step": step, "reason": reason}
            write_json(self.path / "status.json", status, indent=None)

    def forbid_restart(self, reason: str) -> None:
        """Write STOP."""
        if self._first:
            write_atomically(self.path / "STOP", reason + "\n")

    def take_save_request(self) -> bool:
        """Whether someone touched SAVE ("save now and go on"); deletes the file."""
        if not self._first:
            return False
        request = self.path / "SAVE"
        if not request.is_file():  # unlink of a missing file is an error on a read-only file system
            return False
        request.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()


def newest_config(run: Path) -> RunConfig:
    """The config of a run directory's last start.

    Raises:
        UserError: not a run directory.
    """
    numbered = config_files(run)
    if not numbered:
        folder = ", but config.json: it is a Hugging Face folder" if (run / "config.json").is_file() else ""
        raise UserError(f"{run} is not a run directory: it has no config.yaml{folder}")
    return load_config(numbered[max(numbered)])


def describe_run(run: Path, config: RunConfig, step: int) -> str:
    """Describe a run for messages: directory, name, model, first start, newest checkpoint.

    Args:
        run: the run directory.
        config: its newest config.
        step: the step of its newest checkpoint.
    """
    return f"{run} (run {config.run.name}, model {config.model.name}, started {_first_start(run)}, at step {step})"


def _first_start(run: Path) -> str:
    """Time of the run's first event, or else of its oldest config file, to the minute, in UTC."""
    try:
        with open(run / "events.jsonl", encoding="utf-8") as file:
            return json.loads(file.readline())["time"][:16].replace("T", " ") + " UTC"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        oldest = min(path.stat().st_mtime for path in config_files(run).values())
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(oldest))
