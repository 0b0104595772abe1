"""DAM.yaml: what is merged, on which texts the coefficients are learned, and how. Every word is known and checked."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trinity.config.run import ParallelConfig
from trinity.config.yaml_scalars import read_yaml, resolve_scalars
from trinity.dam.model import PARTS
from trinity.errors import UserError
from trinity.merging.parameters import nearest

GRANULARITIES = ("column", "tensor", "group")
DTYPES = ("bfloat16", "float16", "float32")
_MESH = ("replicate", "shard", "expert")


@dataclass(frozen=True)
class SourceModel:
    """One of the models.

    model: a folder, a run directory, or RUN_DIR@step.
    text: on which the merged model shall give this one's logits; None: nowhere.
    weights: whether the merged weights are made of this one's too; else it is a teacher alone.
    """

    model: str
    text: str | None = None
    weights: bool = True


@dataclass(frozen=True)
class DamConfig:
    """The content of DAM.yaml; README.md explains each word."""

    models: list[SourceModel]
    base_model: str | None = None
    granularity: str = "column"
    learn: tuple[str, ...] = ("attention", "ffn", "router", "head")
    loss: str = "kl"
    temperature: float = 2.0
    similarity: float = 0.01
    l1: float = 0.0
    l2: float = 0.0
    overlap: float = 0.0
    rows: int = 2000
    window: int | None = None
    sequences: int = 8
    microbatch: int = 1
    lr: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    text_field: str = "text"
    start: str | None = None
    save_every: int = 50
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: str = "float32"
    recompute: bool = False
    out_dtype: str | None = None
    source: str = ""

    @property
    def steps(self) -> int:
        """Optimizer steps: one pass over the rows."""
        return self.rows // self.sequences

    @property
    def texts(self) -> list[int]:
        """Numbers of the models that have a text."""
        return [number for number, each in enumerate(self.models) if each.text is not None]

    @property
    def mixed(self) -> list[str]:
        """The N models whose weights are mixed; they come first in `models`."""
        return [each.model for each in self.models if each.weights]


def read_config(path: str | Path | dict[str, Any]) -> DamConfig:
    """Read and check DAM.yaml.

    Args:
        path: the file, or its content as a mapping.
    Raises:
        UserError: the file cannot be read, or naming the wrong word or value.
    """
    if isinstance(path, dict):
        return _checked(path, yaml.safe_dump(path, sort_keys=False, allow_unicode=True))
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = resolve_scalars(read_yaml(text), DamConfig, "", str(path))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "does not exist or is a folder"
        raise UserError(f"{path} {reason}; give a YAML file, such as recipes/dam/dam.yaml") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping; see recipes/dam/dam.yaml")
    return _checked(content, text)


def _checked(content: dict[str, Any], text: str) -> DamConfig:
    known = [each.name for each in fields(DamConfig) if each.name != "source"]
    _check_keys(content, known, "")
    values = {key: _READ[key](value, key) for key, value in content.items() if value is not None}
    if "models" not in values:
        raise UserError("models is missing; list the models to merge: models: [{model: DIR, text: FILES}, …]")
    config = DamConfig(**values, source=text)
    if not config.texts:
        raise UserError("no model has a text to learn on; write text: FILES beside at least one model")
    if config.rows % config.sequences:
        raise UserError(
            f"rows: {config.rows} does not divide by sequences: {config.sequences}; write rows: "
            f"{max(1, round(config.rows / config.sequences)) * config.sequences}"
        )
    return config


def _check_keys(content: dict[Any, Any], known: list[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{where}{key} is not a known word; {nearest(key, known)}")


def _models(value: Any, key: str) -> list[SourceModel]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{key} is {value!r}; list the models to merge: models: [{{model: DIR, text: FILES}}, …]")
    found = []
    for number, entry in enumerate(value):
        where = f"{key}[{number}]"
        entry = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}; write {{model: DIR, text: FILES}}")
        _check_keys(entry, ["model", "text", "weights"], f"{where}.")
        if entry.get("model") is None:
            raise UserError(f"{where} names no model; write {{model: DIR, text: FILES}}")
        label, text = _text(entry["model"], f"{where}.model"), entry.get("text")
        weights = _switch(entry.get("weights", True), f"{where}.weights")
        if text is None and not weights:
            raise UserError(f"{where} has weights: false and no text, so it does nothing; give it a text")
        found.append(SourceModel(label, None if text is None else _text(text, f"{where}.text"), weights))
    if not any(each.weights for each in found):
        raise UserError(f"{key} has weights: false everywhere; leave it out where weights shall be mixed")
    return sorted(found, key=lambda each: not each.weights)  # teachers last, else in order


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{key} is {value!r}; write a text")
    return value


def _word(*words: str) -> Callable[[Any, str], str]:
    def read(value: Any, key: str) -> str:
        if value not in words:
            raise UserError(f"{key} is {value!r}; write one of {', '.join(words)}")
        return value

    return read


def _whole(least: int) -> Callable[[Any, str], int]:
    def read(value: Any, key: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 2e3
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise UserError(f"{key} is {value!r}; write a whole number of at least {least}")
        return value

    return read


def _number(positive: bool) -> Callable[[Any, str], float]:
    def read(value: Any, key: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not good or (positive and value == 0):
            raise UserError(f"{key} is {value!r}; write a number {'above' if positive else 'of at least'} 0")
        return float(value)

    return read


def _switch(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}; write true or false")
    return value


def _learn(value: Any, key: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if each not in PARTS:
            raise UserError(f"{key} names {each!r}; write a list of {', '.join(PARTS)}")
    if not values:
        raise UserError(f"{key} is empty; write a list of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in values)


def _parallel(value: Any, key: str) -> ParallelConfig:
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}; write a mapping of {', '.join(_MESH)}")
    _check_keys(value, list(_MESH), f"{key}.")
    for name, size in value.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise UserError(f"{key}.{name} is {size!r}; write a whole number")
    return ParallelConfig(**value)


_READ: dict[str, Callable[[Any, str], Any]] = {
    "models": _models,
    "base_model": _text,
    "granularity": _word(*GRANULARITIES),
    "learn": _learn,
    "loss": _word("kl", "mse"),
    "temperature": _number(positive=True),
    "similarity": _number(positive=False),
    "l1": _number(positive=False),
    "l2": _number(positive=False),
    "overlap": _number(positive=False),
    "rows": _whole(1),
    "window": _whole(2),
    "sequences": _whole(1),
    "microbatch": _whole(1),
    "lr": _number(positive=True),
    "clip": _number(positive=True),
    "seed": _whole(0),
    "text_field": _text,
    "start": _text,
    "save_every": _whole(1),
    "threads": _whole(1),
    "parallel": _parallel,
    "compute": _word("float32", "bfloat16", "float64"),
    "recompute": _switch,
    "out_dtype": _word(*DTYPES),
}
