"""Detect router collapse in each layer: MaxVio stays flat for long, then climbs suddenly (report, eq. 42).

Shapes: M MoE layers, E experts.
"""

import math
from typing import Any

import torch
from torch import Tensor

WINDOW = 20
"""Steps over which MaxVio is averaged. Not from the report."""
KINDS = ("climbing", "dead")
"""The kinds of warning, in the order of the state's "warned"."""

Warnings = list[tuple[str, dict[str, Any]]]
"""A message and the fields of its event, each."""


class CollapseDetector:
    """Follows MaxVio and the experts without tokens in every layer.

    Args:
        factor: warn about a layer whose MaxVio, averaged over WINDOW steps, exceeds this many times its lowest average
            and exceeds 1 (some expert has twice its share); 0 turns this warning off.
        dead_steps: warn about a layer with an expert that got no token for this many steps in a row; 0 turns this
            warning off.
        first_layer: number of the first MoE layer in the model, so that messages give a layer its number there.
    """

    def __init__(self, factor: float, dead_steps: int, first_layer: int = 0) -> None:
        self.factor, self.dead_steps, self.first_layer = factor, dead_steps, first_layer
        self._recent: list[Tensor] = []
        self._lowest_M: Tensor | None = None
        self._empty_steps_ME: Tensor | None = None
        self._warned: set[tuple[str, int]] = set()

    def update(self, counts_ME: Tensor) -> Warnings:
        """Take the tokens per expert of one step; return warnings.

        A layer is warned about once, and again only after it recovered in between.

        Args:
            counts_ME: [M, E], over the global batch, on the CPU.
        """
        return [*self._climbing(counts_ME), *self._dead(counts_ME)]

    def state(self, layers: int, experts: int) -> dict[str, Tensor]:
        """The detector's state, in tensors whose shapes do not change during a run.

        Args:
            layers, experts: M and E of the model.
        Returns:
            recent [WINDOW, M] float64, newest last, and lowest [M] float64, ∞ in unused places; empty [M, E] int64,
            steps in a row without a token; warned [2, M] bool, in the order of KINDS.
        """
        recent = torch.full((WINDOW, layers), math.inf, dtype=torch.float64)
        if self._recent:
            recent[-len(self._recent) :] = torch.stack(self._recent)
        lowest_M, empty_ME = self._lowest_M, self._empty_steps_ME
        numbers = range(self.first_layer, self.first_layer + layers)
        warned = [[(kind, layer) in self._warned for layer in numbers] for kind in KINDS]
        return {
            "recent": recent,
            "lowest": torch.full((layers,), math.inf, dtype=torch.float64) if lowest_M is None else lowest_M.clone(),
            "empty": torch.zeros(layers, experts, dtype=torch.int64) if empty_ME is None else empty_ME.long(),
            "warned": torch.tensor(warned, dtype=torch.bool),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what state() returned."""
        self._recent = [row_M.clone() for row_M in state["recent"] if row_M.isfinite().all()]
        self._lowest_M = state["lowest"].clone() if state["lowest"].isfinite().all() else None
        self._empty_steps_ME = state["empty"].clone()
        warned = state["warned"].nonzero().tolist()
        self._warned = {(KINDS[kind], self.first_layer + layer) for kind, layer in warned}

    def _climbing(self, counts_ME: Tensor) -> Warnings:
        mean_M = counts_ME.double().mean(dim=1).clamp_min(1e-9)
        self._recent = [*self._recent, counts_ME.double().amax(dim=1) / mean_M - 1][-WINDOW:]
        if len(self._recent) < WINDOW:
            return []
        average_M = sum(self._recent, start=torch.zeros_like(mean_M)) / WINDOW
        self._lowest_M = average_M if self._lowest_M is None else self._lowest_M.minimum(average_M)
        warnings: Warnings = []
        for layer, (now, lowest) in enumerate(zip(average_M.tolist(), self._lowest_M.tolist()), self.first_layer):
            climbing = bool(self.factor) and now > 1 and now > self.factor * lowest
            if self._is_new("climbing", layer, climbing):
                message = f"MaxVio of MoE layer {layer} has climbed to {now:.2f} from {lowest:.2f}, over {WINDOW} steps"
                warnings.append((message, {"layer": layer, "max_violation": now, "lowest": lowest}))
        return warnings

    def _dead(self, counts_ME: Tensor) -> Warnings:
        empty_ME = counts_ME == 0
        before_ME = 0 if self._empty_steps_ME is None else self._empty_steps_ME
        self._empty_steps_ME = (before_ME + empty_ME.long()) * empty_ME
        warnings: Warnings = []
        for layer, empty_E in enumerate(self._empty_steps_ME, self.first_layer):
            experts = (empty_E >= self.dead_steps).nonzero().flatten().tolist() if self.dead_steps else []
            if self._is_new("dead", layer, bool(experts)):
                message = f"MoE layer {layer} has {len(experts)} experts without a token for {self.dead_steps} steps"
                warnings.append((f"{message}: {experts[:8]}", {"layer": layer, "dead": len(experts)}))
        return warnings

    def _is_new(self, kind: str, layer: int, present: bool) -> bool:
        """Whether a warning is present and was not given yet; one that is absent may be given again later."""
        key = (kind, layer)
        is_new = present and key not in self._warned
        if present:
            self._warned.add(key)
        else:
            self._warned.discard(key)
        return is_new
