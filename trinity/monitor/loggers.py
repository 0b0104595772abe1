"""Loggers of each step's metrics: metrics.jsonl, the console, and W&B and TensorBoard if configured.

metrics.jsonl is authoritative: one object a step, flushed. On resume it is cut back to the checkpoint's step and the
tail goes to a file of its own, so no step is missing or doubled. Numbers have full precision; those that are not finite
are null.
"""

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.io.json_files import to_json
from trinity.io.local import write_atomically
from trinity.monitor.console import Console

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Logger(Protocol):
    """Receives one record a step."""

    def write(self, record: Record) -> None:
        """Log the record of one step."""

    def rewind(self, step: int) -> None:
        """Prepare for the run to continue after an earlier step: a rollback."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """A file of one JSON object a step, such as metrics.jsonl, continued after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            _cut_back(path, step)
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115 (open for the life of the run)

    def write(self, record: Record) -> None:
        """Append one line and flush it."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Move the lines after `step` to a file of their own."""
        self._file.close()
        _cut_back(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_back(path: Path, step: int) -> None:
    """Move the lines after `step` to NAME.tail.N.jsonl."""
    kept: list[str] = []
    tail: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            later = json.loads(line)["step"] > step or not step  # a run that starts over repeats step 0 too
        except (ValueError, KeyError, TypeError, RecursionError):
            later = True  # a line that a crash cut off, or not written by a run
        (tail if later else kept).append(line)
    if not tail:
        return
    number = 1 + len(list(path.parent.glob(f"{path.stem}.tail.*.jsonl")))
    tail_path = path.parent / f"{path.stem}.tail.{number}.jsonl"
    write_atomically(tail_path, (f"{line}\n" for line in tail))
    write_atomically(path, (f"{line}\n" for line in kept))


class WandB:
    """Weights & Biases; offline without an API key, so it never prompts and never needs a network."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError('log.wandb needs wandb; install it: pip install "trinity-moe[wandb]"') from None

        offline = not (os.environ.get("WANDB_API_KEY") or _netrc_has_wandb())
        self._run = wandb.init(
            project=config.log.wandb,
            name=config.run.name,
            dir=directory,
            id=_wandb_id(directory),
            resume="allow",
            config=asdict(config),
            mode="offline" if offline else None,
        )

    def write(self, record: Record) -> None:
        """Log one step."""
        self._run.log(record, step=record["step"])

    def rewind(self, step: int) -> None:
        """Do nothing. W&B ignores a step that it has, so repeated steps are missing there up to the old last one."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _wandb_id(directory: Path) -> str:
    """The run's id at W&B, created at its first start, so that later starts continue the same curves."""
    path = directory / "wandb_id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:16])
    return path.read_text()


def _netrc_has_wandb() -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return path.is_file() and "wandb" in path.read_text(errors="replace")


class TensorBoard:
    """TensorBoard event files in the run directory, continued after `step`; later steps are purged from its display."""

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory / "tensorboard"
        self._writer = self._open(step)

    def _open(self, step: int) -> "SummaryWriter":
        """Start another file, which tells TensorBoard to purge the steps after `step`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                'log.tensorboard needs tensorboard; install it: pip install "trinity-moe[tensorboard]"'
            ) from None
        return SummaryWriter(str(self._directory), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Purge the steps after `step`."""
        self._writer.close()
        self._writer = self._open(step)

    def write(self, record: Record) -> None:
        """Log every number of one step."""
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def open_loggers(config: RunConfig, directory: Path, step: int, total: int) -> list[Logger]:
    """Every logger that the config names, metrics.jsonl first."""
    console = Console(step, total, config.log.every, config.health.forgetting)
    loggers: list[Logger] = [JsonLines(directory / "metrics.jsonl", step), console]
    if config.log.wandb:
        loggers.append(WandB(config, directory))
    if config.log.tensorboard:
        loggers.append(TensorBoard(directory, step))
    return loggers
