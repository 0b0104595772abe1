"""Read a run directory: metrics, events, router entries, samples, status and configs.

The run may still be running, or be from an older version without some of the files. Only metrics.jsonl is required.
The tails that a resume keeps aside (metrics.tail.N.jsonl) are not read.

Shapes: N entries of router.jsonl, M MoE layers, E experts.
"""

import bisect
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from trinity.config.load import load_config
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.io.json_files import to_json
from trinity.reporting.jsonl import Columns, read_objects, valid_step

ROUTER_FIELDS = ("max_violation", "dead", "entropy", "bias_range", "bias_step_norm")
"""Fields of router.jsonl with one number for each layer."""


NEEDLE_FIELDS = {"kind", "length", "samples", "score", "error", "by_depth"}


class Event(NamedTuple):
    """A line of events.jsonl. details: its other fields, as JSON."""

    time: str
    step: int | None
    kind: str
    rank: str
    message: str
    details: str


class Sample(NamedTuple):
    """A line of samples.jsonl: a prompt and the model's continuation at a step."""

    step: int
    prompt: str
    text: str


@dataclass
class Router:
    """router.jsonl: numbers by layer in memory; matrices of layers and experts are read from the file on demand.

    Attributes:
        columns: N entries; field `max_violation.3` belongs to the fourth MoE layer.
        layers: M.
        first: the first MoE layer's number in the model; dense layers may come before it.
        offsets: byte offset of each entry in the file.
    """

    path: Path
    columns: Columns = field(default_factory=Columns)
    layers: int = 0
    first: int = 0
    offsets: list[int] = field(default_factory=list)

    def by_layer(self, name: str) -> np.ndarray:
        """[M, N]: one of ROUTER_FIELDS."""
        return np.stack([self.columns[f"{name}.{layer}"] for layer in range(self.layers)])

    def matrix(self, entry: int, name: str) -> np.ndarray | None:
        """[M, E]: `load` or `bias` of one entry; None if it has none."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[entry])
            return as_matrix(json.loads(file.readline()).get(name))


@dataclass
class RunLog:
    """The contents of a run directory.

    Attributes:
        name: the run's name on the page.
        metrics: the columns of metrics.jsonl, at least one step.
        status: status.json; empty if it does not exist.
        configs: (file name, settings) of each start, in order.
        config_text: the newest config file's text.
        config: the newest config, loaded; None if this version cannot load it.
        router: None without router.jsonl.
        notes: sentences on what could not be read.
        needles: lines of needles.jsonl.
    """

    name: str
    path: Path
    metrics: Columns
    status: dict[str, Any]
    configs: list[tuple[str, dict]]
    config_text: str
    config: RunConfig | None
    events: list[Event]
    samples: list[Sample]
    router: Router | None
    notes: list[str]
    needles: list[dict[str, Any]]

    def index_at(self, step: int) -> int:
        """Index of the last recorded step that is not after `step`; 0 if all are."""
        return max(bisect.bisect_right(self.metrics.steps, step) - 1, 0)


def read_run(path: Path) -> RunLog:
    """Read a run directory.

    Raises:
        UserError: not a run directory, or the run has no step yet.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run directory, the folder that run.dir names")
    files = _config_files(path)
    if not (path / "metrics.jsonl").is_file():
        if files:
            raise UserError(f"{path} has no metrics.jsonl yet; report it after the run's first step")
        raise UserError(f"{path} is not a run directory: it has neither config.yaml nor metrics.jsonl")
    notes: list[str] = []
    configs, text = _read_configs(files, notes)
    metrics = _read_metrics(path / "metrics.jsonl", notes)
    section = configs[-1][1].get("run") if configs else None
    name = section.get("name") if isinstance(section, dict) else None
    config = _load_config(path / configs[-1][0]) if configs else None
    router = _read_router(path / "router.jsonl", notes)
    if router is not None and config is not None:
        router.first = config.model.dense_layers
    return RunLog(
        name=str(name or path.resolve().name),
        path=path,
        metrics=metrics,
        status=_read_status(path / "status.json", notes),
        configs=configs,
        config_text=text,
        config=config,
        events=_read_events(path / "events.jsonl", notes),
        samples=_read_samples(path / "samples.jsonl", notes),
        router=router,
        notes=notes,
        needles=_read_needles(path / "needles.jsonl", notes),
    )


def as_matrix(value: object) -> np.ndarray | None:
    """A list of equally long lists of numbers as float64; None for anything else."""
    try:
        matrix = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return matrix if matrix.ndim == 2 and matrix.size else None


def _read_metrics(path: Path, notes: list[str]) -> Columns:
    columns, broken = Columns(), 0
    for _, record in read_objects(path):
        step = valid_step(record)
        if record is None or step is None:
            broken += 1
        else:
            columns.add(step, record)
    if not columns.steps:
        raise UserError(f"{path} holds no step yet; report the run after its first step")
    _note_broken(path, broken, notes)
    if count := columns.not_finite.total():
        names = ", ".join(sorted(name for name, times in columns.not_finite.items() if times))
        notes.append(f"{count} values are not finite numbers and are not drawn: {names}")
    return columns


def _read_router(path: Path, notes: list[str]) -> Router | None:
    if not path.is_file():
        return None
    router, broken = Router(path), 0
    for offset, record in read_objects(path):
        step = valid_step(record)
        load = None if record is None or step is None else as_matrix(record.get("load"))
        if record is None or step is None or load is None or (router.layers and len(load) != router.layers):
            broken += 1
            continue
        router.layers = len(load)
        values = {"tokens": record.get("tokens")}
        for name in ROUTER_FIELDS:
            column = record.get(name)
            values |= {f"{name}.{layer}": x for layer, x in enumerate(column if isinstance(column, list) else [])}
        kept = router.columns.add(step, values)
        router.offsets[kept:] = [offset]
    _note_broken(path, broken, notes)
    return router if router.offsets else None


def _read_events(path: Path, notes: list[str]) -> list[Event]:
    if not path.is_file():
        return []
    events, broken = [], 0
    for _, record in read_objects(path):
        if record is None or not isinstance(record.get("kind"), str):
            broken += 1
            continue
        own_columns = {"time", "step", "kind", "rank", "message"}
        rest = {name: value for name, value in record.items() if name not in own_columns}
        time, rank, message = (str(record.get(name, "")) for name in ("time", "rank", "message"))
        details = to_json(rest, ensure_ascii=False) if rest else ""
        events.append(Event(time, valid_step(record), record["kind"], rank, message, details))
    _note_broken(path, broken, notes)
    return events


def _read_samples(path: Path, notes: list[str]) -> list[Sample]:
    if not path.is_file():
        return []
    samples: list[Sample] = []
    broken = 0
    for _, record in read_objects(path):
        step = valid_step(record)
        if record is None or step is None or not all(isinstance(record.get(name), str) for name in ("prompt", "text")):
            broken += 1
        else:
            samples.append(Sample(step, record["prompt"], record["text"]))
    _note_broken(path, broken, notes)
    return samples


def _read_needles(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    broken = 0
    for _, record in read_objects(path):
        if (
            record is None
            or valid_step(record) is None
            or not record.keys() >= NEEDLE_FIELDS
            or not isinstance(record["by_depth"], list)
            or not record["by_depth"]
        ):
            broken += 1
        else:
            lines.append(record)
    _note_broken(path, broken, notes)
    return lines


def _load_config(path: Path) -> RunConfig | None:
    try:
        return load_config(path)
    except UserError:
        return None


def _read_status(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        status = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        status = None
    if isinstance(status, dict):
        return status
    notes.append(f"{path.name} cannot be read")
    return {}


def _config_files(path: Path) -> list[Path]:
    """config.yaml, config.1.yaml, config.2.yaml, …"""
    first = [path / "config.yaml"] if (path / "config.yaml").is_file() else []
    numbered = [file for file in path.glob("config.*.yaml") if re.fullmatch(r"config\.\d+\.yaml", file.name)]
    return first + sorted(numbered, key=lambda file: (int(file.name.split(".")[1]), file))


def _read_configs(files: list[Path], notes: list[str]) -> tuple[list[tuple[str, dict]], str]:
    """(file name, settings) of each readable file, and the text of the newest."""
    configs, newest = [], ""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            settings = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            settings = None
        if isinstance(settings, dict):
            configs.append((file.name, settings))
            newest = text
        else:
            notes.append(f"{file.name} cannot be read as settings")
    return configs, newest


def _note_broken(path: Path, broken: int, notes: list[str]) -> None:
    if broken:
        notes.append(f"{broken} {'line' if broken == 1 else 'lines'} of {path.name} cannot be read and are left out")


def last_finite(values: np.ndarray) -> float:
    """The last finite value; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan
