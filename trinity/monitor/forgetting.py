"""Forgetting of a continued model: how much the loss of a validation set has risen since step 0 of the run.

Step 0 is the model that `init` loads, before its first update. health.forgetting gives the nats by which the loss of a
set may rise. The losses of step 0 are kept in every checkpoint, each with a hash of the rows that were evaluated: a
resumed run compares with the same losses, and refuses to compare with those of other text.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.errors import UserError

LOSS, ROWS = "loss.", "rows."
"""Prefixes of the names in state(): the loss of step 0 of a set, and the hash of its rows."""
HASH_BYTES = 16


class Excess(NamedTuple):
    """A validation set whose loss has risen by more than its budget.

    name: of the set. rise: in nats per token since step 0; NaN for a loss that is not finite. budget: in nats.
    """

    name: str
    rise: float
    budget: float

    @property
    def message(self) -> str:
        """One sentence."""
        return (
            f"the loss of validation set {self.name} has risen by {self.rise:.4f} nats since step 0, more than "
            f"health.forgetting.{self.name}={self.budget:g}"
        )


class Forgetting:
    """The losses of step 0, and the budgets of a run.

    Args:
        budgets: validation set → nats per token.
        fingerprints: every validation set → hash of its content.
        sequences: evaluation.sequences, the rows that are evaluated of each set.
    """

    def __init__(self, budgets: Mapping[str, float], fingerprints: Mapping[str, str], sequences: int) -> None:
        self.budgets = dict(budgets)
        self._rows = {name: _hash(f"{fingerprint} {sequences}") for name, fingerprint in fingerprints.items()}
        self._losses: dict[str, float] = {}
        self._of_other_rows: list[str] = []

    def begin(self, losses: Mapping[str, float]) -> None:
        """Keep the losses of step 0, by set."""
        self._losses = dict(losses)

    def rises(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Loss minus that of step 0, in nats per token, of each set with a budget."""
        return {name: losses[name] - self._losses[name] for name in self.budgets}

    def excesses(self, rises: Mapping[str, float]) -> list[Excess]:
        """The sets whose rise is above their budget, or not a number."""
        return [
            Excess(name, rise, self.budgets[name]) for name, rise in rises.items() if not rise <= self.budgets[name]
        ]

    def check(self) -> None:
        """Refuse budgets of sets without a loss of step 0, or with that of other rows.

        Raises:
            UserError: naming the set and what to do.
        """
        for name in self.budgets:
            if name in self._of_other_rows:
                raise UserError(
                    f"health.forgetting.{name} compares with the loss at step 0, when data.validation.{name} held "
                    "other text or evaluation.sequences was another number; restore them, or leave "
                    f"health.forgetting.{name} out"
                )
            if name not in self._losses:
                raise UserError(
                    f"health.forgetting.{name} compares with the loss at step 0, and this run did not measure "
                    f"data.validation.{name} then; leave health.forgetting.{name} out, or start a new run"
                )

    def state(self) -> dict[str, Tensor]:
        """For each validation set "loss.NAME", scalar float64, NaN without a loss of step 0; "rows.NAME" [16] uint8."""
        losses = {name: self._losses.get(name, math.nan) for name in self._rows}
        state = {f"{LOSS}{name}": torch.tensor(loss, dtype=torch.float64) for name, loss in losses.items()}
        return state | {f"{ROWS}{name}": rows.clone() for name, rows in self._rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what state() returned; a loss of other rows than this start evaluates is dropped."""
        self._losses, self._of_other_rows = {}, []
        for name, rows in self._rows.items():
            saved = state.get(f"{LOSS}{name}")
            if saved is None or not saved.isfinite():
                continue
            if torch.equal(state[f"{ROWS}{name}"], rows):
                self._losses[name] = saved.item()
            else:
                self._of_other_rows.append(name)


def _hash(text: str) -> Tensor:
    return torch.tensor(list(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()), dtype=torch.uint8)
