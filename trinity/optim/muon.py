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

Every method works on local tensors; sharded parameters are supported on meshes of size 1 only, for now.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.models.roles import Role
from trinity.optim.local import local
from trinity.optim.newton_schulz import coefficient_steps, orthogonalize

# The most bytes of matrices (in the momentum's dtype) in one batch, unless a single matrix is larger. A step takes
# about four times as much on top of weights, gradients and state. Large enough to fill a GPU; ours.
BATCH_BYTES = 256 * 2**20


class Slab(NamedTuple):
    """k matrices of one shape out of one parameter: views [k, m, n] that share its memory."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor | None
    fade: Tensor | None  # [k, 1, 1]: what the update is multiplied by; None is 1


class Muon(torch.optim.Optimizer):
    """Muon over the matrices that roles declare.

    Args:
        roles: the parameters to own, with `rows` given; their `kind` matters only for "experts".
        lr: the peak of the schedule, which sets param_groups[0]["lr"] step by step.
        momentum: μ.
        nesterov: look ahead by one momentum step.
        weight_decay: λ.
        coefficients, steps, dtype: as in `orthogonalize`.
        starved: what an expert matrix without gradient does; see the module's docstring.
    Attributes:
        starved_count: scalar int64 tensor: expert matrices without gradient in the last step. A starved expert counts
            three times, for its gate, up and down.
    Raises:
        UserError: an unknown set of coefficients or rule for starved experts.
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
        coefficient_steps(coefficients, steps)  # refuses what orthogonalize would, but before the first step
        if starved not in ("full", "decay"):
            raise UserError(f"optim.muon.starved={starved!r} is not known; use decay or full")
        for role in roles:
            rows = role.parameter.shape[-2] if role.parameter.ndim >= 2 else 0
            assert sum(role.rows) == rows > 0, f"{role.name}: rows {role.rows} do not add up to {rows}"
        super().__init__([role.parameter for role in roles], {"lr": lr})
        self.roles = roles
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.coefficients, self.steps, self.dtype, self.starved = coefficients, steps, dtype, starved
        self.starved_count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state that is not there yet, so that a checkpoint can be loaded before the first step.

        Per parameter: "momentum", fp32 (or float64 with the parameter), shape and placement of the parameter. Per
        parameter of experts: "starved_steps", fp32, [*batch, 1, 1]: consecutive steps without gradient, per matrix.
        """
        for role in self.roles:
            state = self.state[role.parameter]
            if "momentum" not in state:
                dtype = torch.promote_types(role.parameter.dtype, torch.float32)
                state["momentum"] = torch.zeros_like(role.parameter, dtype=dtype)
            if role.kind == "experts" and "starved_steps" not in state:
                state["starved_steps"] = torch.zeros_like(role.parameter[..., :1, :1], dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter, those without gradient too; `closure` is torch's, and not supported."""
        assert closure is None, "Muon takes no closure"
        self.init_state()
        rate = self.param_groups[0]["lr"]
        self._accumulate()
        torch._foreach_mul_([local(role.parameter) for role in self.roles], 1 - rate * self.weight_decay)
        same_shape: dict[torch.Size, list[Slab]] = defaultdict(list)
        self.starved_count = torch.zeros_like(self.starved_count, device=self.roles[0].parameter.device)
        for role in self.roles:
            for slab in self._slabs(role):
                same_shape[slab.weight.shape[-2:]].append(slab)
        for slabs in same_shape.values():
            for batch in _batches(slabs):
                self._update(batch, rate)

    def _accumulate(self) -> None:
        """M ← μM + G."""
        momenta = [local(self.state[role.parameter]["momentum"]) for role in self.roles]
        torch._foreach_mul_(momenta, self.momentum)
        pairs = [(m, local(r.parameter.grad)) for m, r in zip(momenta, self.roles) if r.parameter.grad is not None]
        if pairs:
            torch._foreach_add_([m for m, _ in pairs], [grad for _, grad in pairs])

    def _slabs(self, role: Role) -> Iterator[Slab]:
        """One slab per piece of a parameter's rows."""
        parameter = role.parameter
        gradient = None if parameter.grad is None else local(parameter.grad)
        fade = self._fade(role, gradient) if role.kind == "experts" else None
        first = 0
        for rows in role.rows:
            yield Slab(
                _piece(local(parameter), first, rows),
                _piece(local(self.state[parameter]["momentum"]), first, rows),
                None if gradient is None else _piece(gradient, first, rows),
                fade,
            )
            first += rows

    def _fade(self, role: Role, gradient: Tensor | None) -> Tensor | None:
        """Count the starved matrices of a parameter of experts; the factor μᵏ of each, [matrices, 1, 1]."""
        steps = local(self.state[role.parameter]["starved_steps"])
        steps.add_(1)
        if gradient is not None:
            # NaN is not 0 to either; two passes over the data are a fifth of what `any` takes on CPU
            zero = (gradient.amax(dim=(-2, -1), keepdim=True) == 0) & (gradient.amin(dim=(-2, -1), keepdim=True) == 0)
            steps.mul_(zero)
        self.starved_count += (steps > 0).sum()
        return self.momentum ** steps.double().view(-1, 1, 1) if self.starved == "decay" else None

    def _update(self, batch: list[Slab], rate: float) -> None:
        """W ← W − η·√max(1, m/n)·orthogonalize(U), for one batch of matrices of one shape."""
        sizes = [len(slab.weight) for slab in batch]
        u_Nmn = torch.cat([slab.momentum for slab in batch])
        if self.nesterov:
            u_Nmn.mul_(self.momentum)
            for u_kmn, slab in zip(u_Nmn.split(sizes), batch):
                if slab.gradient is not None:
                    u_kmn.add_(slab.gradient)
        updates = orthogonalize(u_Nmn, self.coefficients, self.steps, self.dtype).split(sizes)
        for update_kmn, slab in zip(updates, batch):
            if slab.fade is not None:
                update_kmn.mul_(slab.fade)
        rows, columns = u_Nmn.shape[-2:]
        torch._foreach_add_([slab.weight for slab in batch], updates, alpha=-rate * rate_factor(rows, columns))


def rate_factor(rows: int, columns: int) -> float:
    """What eq. 41 multiplies the learning rate of a matrix [rows, columns] by: √max(1, fan_out/fan_in)."""
    return math.sqrt(max(1.0, rows / columns))


def _piece(x: Tensor, first: int, rows: int) -> Tensor:
    """Rows first … first+rows of each matrix of x [..., m, n], as a view [k, rows, n]."""
    return x.narrow(-2, first, rows).view(-1, rows, x.shape[-1])


def _batches(slabs: list[Slab]) -> Iterator[list[Slab]]:
    """Slabs of one shape in batches of at most BATCH_BYTES, cut where they are larger; at least a matrix a batch."""
    _, m, n = slabs[0].momentum.shape
    most = max(1, BATCH_BYTES // (m * n * slabs[0].momentum.element_size()))
    batch: list[Slab] = []
    room = most
    for slab in slabs:
        for first in range(0, len(slab.weight), most):
            part = Slab(*(None if x is None else x[first : first + most] for x in slab))
            if len(part.weight) > room:
                yield batch
                batch, room = [], most
            batch.append(part)
            room -= len(part.weight)
    yield batch
