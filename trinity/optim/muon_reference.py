"""Plain Muon on one process (eq. 41), to read first: one parameter after the other, no batching, no communication.

`muon.py` computes the same update for sharded parameters and large batches; its tests compare it with this class. With
G the gradient of one matrix [m, n], μ the momentum, λ the weight decay and η the learning rate:

    M ← μM + G                                       momentum
    U = G + μM with Nesterov, else M
    O = newton_schulz(U)                             nearest semi-orthogonal matrix, approximately
    W ← W·(1 − ηλ) − η·√max(1, m/n)·μᵏ·O             k: steps since the last gradient (experts only, else 0)

A parameter [*batch, rows, n] is a batch of matrices (experts), and its rows may pack several matrices (q, k, v and
gate): `Role.rows` says how many rows each has. Every matrix is orthogonalized alone.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from trinity.models.param_roles import Role
from trinity.optim.newton_schulz import coefficient_steps
from trinity_kernels.newton_schulz import Triple


class ReferenceMuon(torch.optim.Optimizer):
    """Muon without sharding. State ("momentum", "starved_steps") and arguments are those of `muon.Muon` on one process.

    Args:
        roles: the parameters to update, none of them a DTensor.
        lr: η; param_groups[0]["lr"] may change it before each step.
        momentum: μ.
        nesterov: whether U looks one momentum step ahead.
        weight_decay: λ.
        coefficients, steps: the set of Newton-Schulz coefficients, and how many steps to take.
        dtype: what the products of Newton-Schulz are computed in.
        starved: "decay" multiplies the update of an expert matrix without gradient by μᵏ; "full" does not.
    """

    def __init__(
        self,
        roles: list[Role],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        coefficients: str = "dion",
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
        starved: Literal["full", "decay"] = "decay",
    ) -> None:
        super().__init__([role.parameter for role in roles], {"lr": lr})
        self.roles = roles
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.triples, self.dtype, self.starved = coefficient_steps(coefficients, steps), dtype, starved

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's closures are not supported
        """Update every parameter once. A missing gradient counts as zeros."""
        assert closure is None, "Muon takes no closure"
        for role in self.roles:
            self._update(role, self.param_groups[0]["lr"])

    def _update(self, role: Role, lr: float) -> None:
        weight, state = role.parameter, self.state[role.parameter]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        state["momentum"].mul_(self.momentum).add_(gradient)

        u = gradient + self.momentum * state["momentum"] if self.nesterov else state["momentum"]
        update = torch.cat([self._scaled_orthogonal(matrix) for matrix in u.split(role.rows, dim=-2)], dim=-2)
        if role.kind == "experts":
            update *= self._starved_factor(state, gradient)
        weight.mul_(1 - lr * self.weight_decay).sub_(lr * update)

    def _scaled_orthogonal(self, u: Tensor) -> Tensor:
        """√max(1, m/n)·O for matrices u [..., m, n]."""
        m, n = u.shape[-2:]
        return math.sqrt(max(1.0, m / n)) * newton_schulz(u, self.triples, self.dtype)

    def _starved_factor(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """μᵏ [*batch, 1, 1]; k counts consecutive steps in which a matrix's gradient was zero.

        Newton-Schulz normalizes U, so without this factor an expert without tokens would keep making full steps along
        its shrinking momentum.
        """
        starved = (gradient == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        if "starved_steps" not in state:
            state["starved_steps"] = torch.zeros(starved.shape, device=starved.device)
        state["starved_steps"].add_(1).mul_(starved)
        k = state["starved_steps"].to(state["momentum"].dtype)
        return self.momentum**k if self.starved == "decay" else torch.ones_like(k)


def newton_schulz(x: Tensor, triples: list[Triple], dtype: torch.dtype) -> Tensor:
    """X ← aX + b(XXᵀ)X + c(XXᵀ)²X for each triple (a, b, c), from X = x/‖x‖ (Frobenius); x [..., m, n]."""
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-14)  # a zero matrix stays zero
    y = (x / norm).to(dtype)
    for a, b, c in triples:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype)
