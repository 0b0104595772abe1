"""Muon (eq. 41): momentum, made orthogonal, for every matrix in the hidden layers.

What a matrix is, a role says and not the tensor's shape: a parameter may hold several, stacked in its rows (q, k, v and
gate) or in its leading dimensions (experts). Each is orthogonalised on its own; matrices of one shape, wherever they
come from, go through Newton-Schulz together, in batches of at most BATCH_BYTES.

With G the gradient of one matrix [m, n], μ the momentum, λ the weight decay and η the learning rate:

    M ← μM + G;   U = G + μM with Nesterov, else M
    W ← W·(1 − ηλ) − η·√max(1, m/n)·orthogonalize(U)

The decay is decoupled and on the unadjusted rate. There is no matching of AdamW's RMS. Where G is missing it is 0.

Starved experts (ours). Newton-Schulz does not see scale: an expert that gets no token would go on making full steps
along its old momentum for hundreds of steps. With starved="decay", the orthogonalised update of a matrix that has had
no gradient (all zeros) for k steps in a row is multiplied by μᵏ: by how much its momentum has shrunk since its last
gradient. With "full" it is not. Weight decay goes on in both.

Over a mesh. Each rank works on its own elements, but for orthogonalize: matrices that lie whole on a rank (experts) go
through it there; one that is spread over ranks is brought to its owner (`layout.py`), and the result back, while other
batches compute (`exchange.py`). Replicas may share the work.
"""

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.models.param_roles import Role
from trinity.optim.dtensor import local_tensor, spread, zeros_per_matrix
from trinity.optim.muon_comm import Job, Transfer, divided, from_owners, on_every_rank, overlap, pays, pieces, to_owners
from trinity.optim.muon_layout import MatrixBatch, lay_out
from trinity.optim.newton_schulz import coefficient_steps, orthogonalize

# The most bytes of matrices (in the momentum's dtype) in one batch on its owner, unless a single matrix is larger. A
# batch takes about four times as much on top of weights, gradients and state. Large enough to fill a GPU; ours.
BATCH_BYTES = 256 * 2**20

# Batches begun and not finished: the transfers of some overlap the maths of another. Ours.
UNDER_WAY = 3

STARVED, WIRE, SHARE = ("decay", "full"), ("auto", "bfloat16", "float32", "float64"), ("auto", "on", "off")


class Muon(torch.optim.Optimizer):
    """Muon over the matrices that roles declare.

    Args:
        roles: the parameters to own, with `rows` given, alike on all ranks; `kind` matters only for "experts".
        lr: the peak of the schedule, which sets param_groups[0]["lr"] step by step.
        momentum: μ.
        nesterov: look ahead by one momentum step.
        weight_decay: λ.
        coefficients, steps, dtype: as in `orthogonalize`.
        starved: what an expert matrix without gradient does; see the module's docstring.
        wire: the number format in which matrices travel, and results among replicas; auto is `dtype`.
        share: whether replicas divide the work and gather the results; auto weighs it batch by batch (`pays`).
        kernel: which implementation of Newton-Schulz.
    Raises:
        UserError: an unknown set of coefficients, or another word that is not known.
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
        coefficient_steps(coefficients, steps)  # refuses what orthogonalize would, but before the first step
        for word, value, known in (("starved", starved, STARVED), ("wire", wire, WIRE), ("share", share, SHARE)):
            if value not in known:
                raise UserError(f"optim.muon.{word}={value!r} is not known; use {' or '.join(known)}")
        for role in roles:
            rows = role.parameter.shape[-2] if role.parameter.ndim >= 2 else 0
            assert sum(role.rows) == rows > 0, f"{role.name}: rows {role.rows} do not add up to {rows}"
        super().__init__([role.parameter for role in roles], {"lr": lr})
        self.roles = roles
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.coefficients, self.steps, self.dtype, self.starved = coefficients, steps, dtype, starved
        self.kernel = kernel
        self.wire, self.share = dtype if wire == "auto" else getattr(torch, wire), share

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state that is not there yet, so that a checkpoint can be loaded before the first step.

        Per parameter: "momentum", fp32 (or float64 with the parameter), shape and placement of the parameter. Per
        parameter of experts: "starved_steps", fp32, [*batch, 1, 1]: consecutive steps without gradient, per matrix;
        placed as the parameter, but whole on all ranks over which its matrices are spread.
        """
        for role in self.roles:
            state = self.state[role.parameter]
            if "momentum" not in state:
                dtype = torch.promote_types(role.parameter.dtype, torch.float32)
                state["momentum"] = torch.zeros_like(role.parameter, dtype=dtype)
            if role.kind == "experts" and "starved_steps" not in state:
                state["starved_steps"] = zeros_per_matrix(role.parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter, those without gradient too, by all ranks together; `closure` is torch's."""
        assert closure is None, "Muon takes no closure"
        self.init_state()
        rate = self.param_groups[0]["lr"]
        self._accumulate()
        torch._foreach_mul_([local_tensor(role.parameter) for role in self.roles], 1 - rate * self.weight_decay)
        fades = self._fades()
        overlap((self._update(batch, fades, rate) for batch in self.batches), UNDER_WAY)

    @cached_property
    def batches(self) -> list[MatrixBatch]:
        """What goes through Newton-Schulz together, and what of it travels; settled at the first step."""
        return lay_out(self.roles, BATCH_BYTES)

    def _accumulate(self) -> None:
        """M ← μM + G."""
        momenta = [local_tensor(self.state[role.parameter]["momentum"]) for role in self.roles]
        torch._foreach_mul_(momenta, self.momentum)
        pairs = [
            (m, local_tensor(r.parameter.grad)) for m, r in zip(momenta, self.roles) if r.parameter.grad is not None
        ]
        if pairs:
            torch._foreach_add_([m for m, _ in pairs], [grad for _, grad in pairs])

    def _fades(self) -> dict[str, Tensor]:
        """Count starved steps; the factors μᵏ, by name of a parameter of experts: [matrices held, 1, 1]."""
        experts = {role.name: role.parameter for role in self.roles if role.kind == "experts"}
        starving = {name: _without_gradient(parameter) for name, parameter in experts.items()}
        cuts = {name: spread(parameter) for name, parameter in experts.items()}
        for group in dict.fromkeys(cut.group for cut in cuts.values() if cut.group):
            together = [name for name in experts if cuts[name].group is group]
            starving |= zip(together, on_every_rank([starving[name] for name in together], group))
        fades = {}
        for name, parameter in experts.items():
            steps = local_tensor(self.state[parameter]["starved_steps"])
            steps.add_(1).mul_(starving[name])
            if self.starved == "decay":
                fades[name] = self.momentum ** steps.double().view(-1, 1, 1)
        return fades

    def _update(self, batch: MatrixBatch, fades: dict[str, Tensor], rate: float) -> Job:
        """W ← W − η·√max(1, m/n)·orthogonalize(U), for one batch of matrices of one shape."""
        if batch.travel is None:
            o = yield from self._orthogonalize(self._look_ahead(batch).view(-1, *batch.shape), batch)
        else:
            u_Nmn = yield from to_owners(self._look_ahead(batch).to(self.wire), batch)
            o_Nmn = yield from self._orthogonalize(u_Nmn, batch)
            o = yield from from_owners(o_Nmn, batch)
        weights = [run.of(run.role.parameter) for run in batch.held]
        updates = pieces(o.flatten().to(torch.promote_types(weights[0].dtype, torch.float32)), weights)
        for update_kmn, run in zip(updates, batch.held):
            if run.role.name in fades:
                update_kmn.mul_(fades[run.role.name][run.first : run.first + run.count])
        torch._foreach_add_(weights, updates, alpha=-rate * rate_factor(*batch.shape))

    def _look_ahead(self, batch: MatrixBatch) -> Tensor:
        """U of all that this rank holds of a batch, flat, in the momentum's dtype."""
        momenta = [run.of(self.state[run.role.parameter]["momentum"]) for run in batch.held]
        u = torch.cat([momentum_kmn.flatten() for momentum_kmn in momenta])
        if self.nesterov:
            u.mul_(self.momentum)
            for u_kmn, run in zip(pieces(u, momenta), batch.held):
                if run.role.parameter.grad is not None:
                    u_kmn.add_(run.of(run.role.parameter.grad))
        return u

    def _orthogonalize(self, u_Nmn: Tensor, batch: MatrixBatch) -> Transfer:
        """O of whole matrices, perhaps with the replicas' help."""

        def newton_schulz(x_kmn: Tensor) -> Tensor:
            return orthogonalize(x_kmn, self.coefficients, self.steps, self.dtype, self.kernel)

        if batch.replicas is None:
            return newton_schulz(u_Nmn)
        worth = self.share != "off" and len(u_Nmn) > 1
        if self.share == "auto":
            worth = pays(u_Nmn.shape, self.steps, batch.replicas.size(), self.wire, u_Nmn.device.type)
        return (yield from divided(u_Nmn, newton_schulz, batch.replicas, self.wire, worth))


def rate_factor(rows: int, columns: int) -> float:
    """What eq. 41 multiplies the learning rate of a matrix [rows, columns] by: √max(1, fan_out/fan_in)."""
    return math.sqrt(max(1.0, rows / columns))


def _without_gradient(parameter: Tensor) -> Tensor:
    """Which matrices held here have no gradient, or only zeros, on this rank: bool [*batch, 1, 1]."""
    if parameter.grad is None:
        part = local_tensor(parameter)
        return torch.ones((*part.shape[:-2], 1, 1), dtype=torch.bool, device=part.device)
    gradient = local_tensor(parameter.grad)
    # NaN is not 0 to either; two passes over the data are a fifth of what `any` takes on CPU
    return (gradient.amax(dim=(-2, -1), keepdim=True) == 0) & (gradient.amin(dim=(-2, -1), keepdim=True) == 0)
