"""The log of a search, trials.jsonl: a line for each model of the recipe and for each trial."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity.errors import UserError
from trinity.io.json_files import number


@dataclass(frozen=True)
class Trial:
    """One merge and its figures.

    values: of the variables, in their order.
    objectives: name → value; empty if the merge failed.
    figures: name → all metrics.
    cost: what is minimised; infinity if the merge failed.
    seconds: to merge and evaluate.
    error: why the merge failed.
    """

    number: int
    values: list[float]
    objectives: dict[str, float]
    figures: dict[str, dict[str, float]]
    cost: float
    seconds: float
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """As a line of trials.jsonl."""
        content = {
            "trial": self.number, "values": self.values, "objectives": self.objectives, "cost": self.cost,
            "figures": self.figures, "seconds": self.seconds,
        }  # fmt: skip
        return content if self.error is None else content | {"error": self.error}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Trial":
        """From a line of trials.jsonl."""
        values = {name: number(value) for name, value in record["objectives"].items()}
        cost = math.inf if record["cost"] is None else record["cost"]
        return cls(
            record["trial"], record["values"], values, record["figures"], cost, record["seconds"], record.get("error")
        )


@dataclass
class Log:
    """trials.jsonl: the trials, and the values of the models of the recipe by label."""

    trials: list[Trial] = field(default_factory=list)
    models: dict[str, dict[str, float]] = field(default_factory=dict)


def read_log(path: Path) -> Log:
    """The log of a search; lines that a kill cut short are left out.

    Raises:
        UserError: a trial is missing.
    """
    log = Log()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "model" in record:
            log.models[record["model"]] = record["objectives"]
        elif record["trial"] == len(log.trials):
            log.trials.append(Trial.of_record(record))
        else:
            raise UserError(f"{path} lacks trial {len(log.trials)}; give another folder")
    return log
