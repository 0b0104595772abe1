"""Signs that a router collapses, layer by layer: MaxVio stays flat for long, then climbs suddenly (report, eq. 42).

Shapes: M MoE layers, E experts.
"""

import math

import torch
from torch import Tensor

WINDOW = 20
"""Steps that a mean is taken over. Ours."""
KINDS = ("climbing", "dead")


class CollapseDetector:
    """Watches the loads of all layers.

    Args:
        factor: a layer is warned of when its mean MaxVio over the last steps is so many times its lowest such mean, and
            above 1 (some expert has twice its share); 0 warns of none.
        dead_steps: and when an expert had no token for so many steps in a row; 0 warns of none.
        first_layer: the first MoE layer's number in the model: what is said of a layer names it as the model does.
    """

    def __init__(self, factor: float, dead_steps: int, first_layer: int = 0) -> None:
        self.factor, self.dead_steps, self.first_layer = factor, dead_steps, first_layer
        self._recent: list[Tensor] = []
        self._lowest_M: Tensor | None = None
        self._empty_ME: Tensor | None = None
        self._warned: set[tuple[str, int]] = set()

    def look(self, counts_ME: Tensor) -> list[tuple[str, dict]]:
        """Take the tokens per expert of one step; what is to be warned of, as sentences with their figures.

        A layer is warned of once, and again only after it was well in between.

        Args:
            counts_ME: [M, E], over the global batch, on the CPU.
        """
        return [*self._climbing(counts_ME), *self._dead(counts_ME)]

    def state(self, layers: int, experts: int) -> dict[str, Tensor]:
        """What the watch remembers, in tensors of shapes that do not change during a run.

        Args:
            layers, experts: M and E of the model.
        Returns:
            recent [WINDOW, M] float64, newest last, and lowest [M] float64, ∞ where there is none; empty [M, E] int64,
            steps in a row without a token; warned [2, M] bool, of KINDS.
        """
        recent = torch.full((WINDOW, layers), math.inf, dtype=torch.float64)
        if self._recent:
            recent[-len(self._recent) :] = torch.stack(self._recent)
        lowest_M, empty_ME = self._lowest_M, self._empty_ME
        numbers = range(self.first_layer, self.first_layer + layers)
        warned = [[(kind, layer) in self._warned for layer in numbers] for kind in KINDS]
        return {
            "recent": recent,
            "lowest": torch.full((layers,), math.inf, dtype=torch.float64) if lowest_M is None else lowest_M.clone(),
            "empty": torch.zeros(layers, experts, dtype=torch.int64) if empty_ME is None else empty_ME.long(),
            "warned": torch.tensor(warned, dtype=torch.bool),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Remember what state() held."""
        self._recent = [row_M.clone() for row_M in state["recent"] if row_M.isfinite().all()]
        self._lowest_M = state["lowest"].clone() if state["lowest"].isfinite().all() else None
        self._empty_ME = state["empty"].clone()
        marked = state["warned"].nonzero().tolist()
        self._warned = {(KINDS[kind], self.first_layer + layer) for kind, layer in marked}

    def _climbing(self, counts_ME: Tensor) -> list[tuple[str, dict]]:
        mean_M = counts_ME.double().mean(dim=1).clamp_min(1e-9)
        self._recent = [*self._recent, counts_ME.double().amax(dim=1) / mean_M - 1][-WINDOW:]
        if len(self._recent) < WINDOW:
            return []
        now_M = sum(self._recent) / WINDOW
        self._lowest_M = now_M if self._lowest_M is None else self._lowest_M.minimum(now_M)
        found = []
        for layer, (now, lowest) in enumerate(zip(now_M.tolist(), self._lowest_M.tolist()), self.first_layer):
            climbing = bool(self.factor) and now > 1 and now > self.factor * lowest
            if self._is_new("climbing", layer, climbing):
                text = f"MaxVio of MoE layer {layer} has climbed to {now:.2f} from {lowest:.2f}, over {WINDOW} steps"
                found.append((text, {"layer": layer, "max_violation": now, "lowest": lowest}))
        return found

    def _dead(self, counts_ME: Tensor) -> list[tuple[str, dict]]:
        empty_ME = counts_ME == 0
        before_ME = 0 if self._empty_ME is None else self._empty_ME
        self._empty_ME = (before_ME + empty_ME.long()) * empty_ME
        found = []
        for layer, empty_E in enumerate(self._empty_ME, self.first_layer):
            experts = (empty_E >= self.dead_steps).nonzero().flatten().tolist() if self.dead_steps else []
            if self._is_new("dead", layer, bool(experts)):
                text = f"MoE layer {layer} has {len(experts)} experts without a token for {self.dead_steps} steps"
                found.append((f"{text}: {experts[:8]}", {"layer": layer, "dead": len(experts)}))
        return found

    def _is_new(self, what: str, layer: int, present: bool) -> bool:
        key = (what, layer)
        new = present and key not in self._warned
        (self._warned.add if present else self._warned.discard)(key)
        return new
