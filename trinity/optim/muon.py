"""Muon (eq. 41): momentum, orthogonalized, for every matrix of the hidden layers. Read `muon_reference.py` first.

A parameter's role, not its shape, says which matrices it holds: it may pack several in its rows (q, k, v and gate) or
stack them in its leading dimensions (experts). Each matrix is orthogonalized alone. Matrices of one shape, from all
parameters, go through Newton-Schulz together, in batches of at most BATCH_BYTES.

With G the gradient of one matrix [m, n], μ the momentum, λ the weight decay and η the learning rate:

    M ← μM + G;   U = G + μM with Nesterov, else M
    W ← W·(1 − ηλ) − η·√max(1, m/n)·orthogonalize(U)

The decay is decoupled and uses the unadjusted rate. The update is not scaled to AdamW's RMS. A missing G counts as 0.

Starved experts. Newton-Schulz ignores scale: an expert without tokens would keep making full steps along its old
momentum for hundreds of steps. With starved="decay", the orthogonalized update of a matrix whose gradient has been zero
for k steps in a row is multiplied by μᵏ, the factor by which its momentum has shrunk since its last gradient. With
"full" it is not. Weight decay applies in both cases. Not from the report: it does not treat starved experts.

Over a mesh. Momentum, decay and the update are elementwise on each rank's shards. Matrices that are whole on a rank
(experts) are orthogonalized there. A sharded matrix is sent to its owner (`muon_layout.py`), and the result back, while
other batches are computed (`muon_comm.py`). Replicas may share the work.
"""

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.models.param_roles import Role
from trinity.optim.dtensor import local_tensor, matrix_sharding, zeros_per_matrix
from trinity.optim.muon_comm import (
    Job,
    Transfer,
    all_reduce_and,
    map_over_replicas,
    overlap,
    return_from_owners,
    send_to_owners,
    sharing_pays,
    split_like,
)
from trinity.optim.muon_layout import MatrixBatch, make_batches
from trinity.optim.newton_schulz import coefficient_steps, orthogonalize

# Bytes of matrices (in the momentum's dtype) in one batch on its owner, unless a single matrix is larger. A batch takes
# about four times as much on top of weights, gradients and state. Not from the report: large enough to fill a GPU.
BATCH_BYTES = 256 * 2**20

# Batches started and not finished: the transfers of some overlap the computation of another. Not from the report.
MAX_IN_FLIGHT = 3

STARVED, WIRE, SHARE = ("decay", "full"), ("auto", "bfloat16", "float32", "float64"), ("auto", "on", "off")


class Muon(torch.optim.Optimizer):
    """Muon over the matrices that roles declare.

    Args:
        roles: the parameters to update, each with `rows`, the same on all ranks; `kind` matters only for "experts".
        lr: initial η; param_groups[0]["lr"] sets it for each step.
        momentum: μ.
        nesterov: whether U looks one momentum step ahead.
        weight_decay: λ.
        coefficients, steps, dtype: as in `orthogonalize`.
        starved: update of an expert matrix without gradient; see the module's docstring.
        wire: dtype in which matrices, and results among replicas, are sent; auto is `dtype`.
        share: whether replicas divide the work and gather the results; auto decides batch by batch (`sharing_pays`).
        kernel: implementation of Newton-Schulz.
    Raises:
        UserError: an unknown set of coefficients, or an unknown value of starved, wire or share.
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
        wire: Literal["auto", "bfloat16", "float32", "float64"] = "auto",
        share: Literal["auto", "on", "off"] = "auto",
        kernel: Literal["auto", "triton", "reference"] = "auto",
    ) -> None:
        coefficient_steps(coefficients, steps)  # refuse wrong values before the first step
        for word, value, known in (("starved", starved, STARVED), ("wire", wire, WIRE), ("share", share, SHARE)):
            if value not in known:
                raise UserError(f"optim.muon.{word}={value!r} is not known; use {' or '.join(known)}")
        for role in roles:
            rows = role.parameter.shape[-2] if role.parameter.ndim >= 2 else 0
            assert sum(role.rows) == rows > 0, f"{role.name}: rows {role.rows} do not add up to {rows}"
        # one group, which may be empty: with train.only, Muon may have nothing to update
        super().__init__([{"params": [role.parameter for role in roles]}], {"lr": lr})
        self.roles = roles
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.coefficients, self.steps, self.dtype, self.starved = coefficients, steps, dtype, starved
        self.kernel = kernel
        self.wire, self.share = dtype if wire == "auto" else getattr(torch, wire), share

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state that does not exist yet, so that a checkpoint can be loaded before the first step.

        "momentum" of each parameter: fp32 (float64 for a float64 parameter), shape and placement of the parameter.
        "starved_steps" of each parameter of experts: fp32 [*batch, 1, 1], consecutive steps without gradient of each
        matrix; placed as the parameter, but replicated over the ranks that shard its matrices.
        """
        for role in self.roles:
            state = self.state[role.parameter]
            if "momentum" not in state:
                dtype = torch.promote_types(role.parameter.dtype, torch.float32)
                state["momentum"] = torch.zeros_like(role.parameter, dtype=dtype)
            if role.kind == "experts" and "starved_steps" not in state:
                state["starved_steps"] = zeros_per_matrix(role.parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's closures are not supported
        """Update every parameter once, those without gradient too; every rank calls this."""
        assert closure is None, "Muon takes no closure"
        if not self.roles:
            return
        self.init_state()
        rate = self.param_groups[0]["lr"]
        self._update_momentum()
        torch._foreach_mul_([local_tensor(role.parameter) for role in self.roles], 1 - rate * self.weight_decay)
        factors = self._starved_factors()
        overlap((self._update_batch(batch, factors, rate) for batch in self.batches), MAX_IN_FLIGHT)

    @cached_property
    def batches(self) -> list[MatrixBatch]:
        """The layout of every step, computed at the first one."""
        return make_batches(self.roles, BATCH_BYTES)

    def _update_momentum(self) -> None:
        """M ← μM + G."""
        momenta = [local_tensor(self.state[role.parameter]["momentum"]) for role in self.roles]
        torch._foreach_mul_(momenta, self.momentum)
        pairs = [
            (m, local_tensor(r.parameter.grad)) for m, r in zip(momenta, self.roles) if r.parameter.grad is not None
        ]
        if pairs:
            torch._foreach_add_([m for m, _ in pairs], [grad for _, grad in pairs])

    def _starved_factors(self) -> dict[str, Tensor]:
        """Count starved steps; return the factors μᵏ by name of each parameter of experts: [local matrices, 1, 1]."""
        experts = {role.name: role.parameter for role in self.roles if role.kind == "experts"}
        starved = {name: _has_no_gradient(parameter) for name, parameter in experts.items()}
        groups = {name: matrix_sharding(parameter).group for name, parameter in experts.items()}
        for group in dict.fromkeys(groups.values()):
            if group:
                names = [name for name in experts if groups[name] is group]
                starved |= zip(names, all_reduce_and([starved[name] for name in names], group))
        factors = {}
        for name, parameter in experts.items():
            steps = local_tensor(self.state[parameter]["starved_steps"])
            steps.add_(1).mul_(starved[name])
            if self.starved == "decay":
                factors[name] = self.momentum ** steps.double().view(-1, 1, 1)
        return factors

    def _update_batch(self, batch: MatrixBatch, starved_factors: dict[str, Tensor], rate: float) -> Job:
        """W ← W − η·√max(1, m/n)·orthogonalize(U), for one batch of matrices of one shape."""
        if batch.exchange is None:
            o = yield from self._orthogonalize(self._flat_u(batch).view(-1, *batch.shape), batch)
        else:
            u_Nmn = yield from send_to_owners(self._flat_u(batch).to(self.wire), batch.exchange, batch.shape)
            o_Nmn = yield from self._orthogonalize(u_Nmn, batch)
            o = yield from return_from_owners(o_Nmn, batch.exchange)
        weights = [stack.view(stack.role.parameter) for stack in batch.stacks]
        updates = split_like(o.flatten().to(torch.promote_types(weights[0].dtype, torch.float32)), weights)
        for update_kmn, stack in zip(updates, batch.stacks):
            if stack.role.name in starved_factors:
                update_kmn.mul_(starved_factors[stack.role.name][stack.first : stack.first + stack.length])
        torch._foreach_add_(weights, updates, alpha=-rate * rate_factor(*batch.shape))

    def _flat_u(self, batch: MatrixBatch) -> Tensor:
        """U of this rank's stacks of a batch, flattened one after the other, in the momentum's dtype."""
        momenta = [stack.view(self.state[stack.role.parameter]["momentum"]) for stack in batch.stacks]
        u = torch.cat([momentum_kmn.flatten() for momentum_kmn in momenta])
        if self.nesterov:
            u.mul_(self.momentum)
            for u_kmn, stack in zip(split_like(u, momenta), batch.stacks):
                if stack.role.parameter.grad is not None:
                    u_kmn.add_(stack.view(stack.role.parameter.grad))
        return u

    def _orthogonalize(self, u_Nmn: Tensor, batch: MatrixBatch) -> Transfer:
        """O of whole matrices; replicas share the work where that is set or pays."""

        def newton_schulz(x_kmn: Tensor) -> Tensor:
            return orthogonalize(x_kmn, self.coefficients, self.steps, self.dtype, self.kernel)

        if batch.replicas is None:
            return newton_schulz(u_Nmn)
        share = self.share != "off" and len(u_Nmn) > 1
        if self.share == "auto":
            replicas, device = batch.replicas.size(), u_Nmn.device.type
            share = sharing_pays(len(u_Nmn), batch.shape, self.steps, replicas, self.wire, device)
        return (yield from map_over_replicas(newton_schulz, u_Nmn, batch.replicas, self.wire, share))


def rate_factor(rows: int, columns: int) -> float:
    """Factor of eq. 41 on the learning rate of a matrix [rows, columns]: √max(1, fan_out/fan_in)."""
    return math.sqrt(max(1.0, rows / columns))


def _has_no_gradient(parameter: Tensor) -> Tensor:
    """For each local matrix, whether its gradient on this rank is missing or all zeros: bool [*batch, 1, 1]."""
    if parameter.grad is None:
        part = local_tensor(parameter)
        return torch.ones((*part.shape[:-2], 1, 1), dtype=torch.bool, device=part.device)
    gradient = local_tensor(parameter.grad)
    # NaN equals 0 in neither; on CPU the two passes take a fifth of the time of `any`
    return (gradient.amax(dim=(-2, -1), keepdim=True) == 0) & (gradient.amin(dim=(-2, -1), keepdim=True) == 0)
