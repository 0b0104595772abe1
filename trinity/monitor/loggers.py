"""Where the figures of each step go: metrics.jsonl, the console, and W&B and TensorBoard by one word.

metrics.jsonl is the record: one object a step, flushed; on resume it is cut back to the checkpoint's step and the tail
is kept aside, so that no step is missing or doubled. Numbers are written in full precision, null where they are not
finite.
"""

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.io.json_files import to_json
from trinity.io.local import write_atomically
from trinity.monitor.console import Console

Record = dict[str, Any]


class Sink(Protocol):
    """Takes one record a step."""

    def write(self, record: Record) -> None:
        """Take the record of one step."""

    def go_back(self, step: int) -> None:
        """The run goes on after an earlier step."""

    def close(self) -> None:
        """Write out what is still held."""


class JsonLines:
    """metrics.jsonl, continued after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            _cut_back(path, step)
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115 (open for the life of the run)

    def write(self, record: Record) -> None:
        """Append one line and flush it."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Keep the lines after `step` aside."""
        self._file.close()
        _cut_back(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_back(path: Path, step: int) -> None:
    kept, tail = [], []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            later = json.loads(line)["step"] > step or not step  # a run that begins anew makes step 0 anew too
        except (ValueError, KeyError, TypeError, RecursionError):
            later = True  # a line cut off by a crash, or somebody else's
        (tail if later else kept).append(line)
    if not tail:
        return
    number = 1 + len(list(path.parent.glob(f"{path.stem}.tail.*.jsonl")))
    aside = path.parent / f"{path.stem}.tail.{number}.jsonl"
    write_atomically(aside, (f"{line}\n" for line in tail))
    write_atomically(path, (f"{line}\n" for line in kept))


class WandB:
    """Weights & Biases; offline where there is no key, so that it never asks and never needs a network."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError('log.wandb needs wandb; install it: pip install "trinity-moe[wandb]"') from None

        offline = not (os.environ.get("WANDB_API_KEY") or _netrc_knows_wandb())
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

    def go_back(self, step: int) -> None:
        """W&B takes no step twice: the steps that are made again are missing there until they are past the old ones."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _wandb_id(directory: Path) -> str:
    """The id of the run, made at its first start, so that later ones go on with the same curves."""
    path = directory / "wandb_id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:16])
    return path.read_text()


def _netrc_knows_wandb() -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return path.is_file() and "wandb" in path.read_text(errors="replace")


class TensorBoard:
    """TensorBoard event files in the run directory, continued after `step`: what is shown of later steps is dropped."""

    def __init__(self, directory: Path, step: int) -> None:
        self._directory, self._writer = directory / "tensorboard", None
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Begin another file, which tells TensorBoard to forget the steps after `step`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                'log.tensorboard needs tensorboard; install it: pip install "trinity-moe[tensorboard]"'
            ) from None
        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add every number of one step."""
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def open_sinks(config: RunConfig, directory: Path, step: int, total: int) -> list[Sink]:
    """Every place that the config names, the record first."""
    sinks: list[Sink] = [JsonLines(directory / "metrics.jsonl", step), Console(step, total, config.log.every)]
    if config.log.wandb:
        sinks.append(WandB(config, directory))
    if config.log.tensorboard:
        sinks.append(TensorBoard(directory, step))
    return sinks
