"""The optimizers of a model: Muon for the matrices of the hidden layers, AdamW for embedding, head and gains.

The report leaves the router open ("hidden layers" gives it to Muon; `router="adamw"` is the alternative) and does not
say whether gains have weight decay. Here gains have none. Not from the report: the usual choice.

The state is saved as one flat dict of tensors under the parameters' names, which a distributed checkpoint can reshard.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.models.param_roles import Role
from trinity.optim.muon import Muon


@dataclass
class Optimizers:
    """Muon and AdamW of one model, with the interface of one optimizer. Built by `build_optimizers`."""

    muon: Muon
    adamw: torch.optim.AdamW
    muon_roles: list[Role]
    adamw_roles: list[Role]
    muon_lr: float  # peak of the schedule, as adamw_lr
    adamw_lr: float
    frozen_roles: list[Role] = field(default_factory=list)  # of neither

    def set_rates(self, scale: float) -> None:
        """Set both learning rates to `scale` (from `rate_scale`) times their peaks."""
        for optimizer, peak in ((self.muon, self.muon_lr), (self.adamw, self.adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = scale * peak

    def step(self) -> None:
        """Update every parameter once."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.muon.zero_grad()
        self.adamw.zero_grad()

    @torch.no_grad()
    def init_state(self) -> None:
        """Create all state that does not exist yet. The first step is the same, bit for bit, with or without it."""
        self.muon.init_state()
        for role in self.adamw_roles:
            state = self.adamw.state[role.parameter]
            if not state:
                # as a fused AdamW creates it at a parameter's first gradient
                state["step"] = torch.zeros((), dtype=torch.float32, device=role.parameter.device)
                state["exp_avg"] = torch.zeros_like(role.parameter)
                state["exp_avg_sq"] = torch.zeros_like(role.parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizers' tensors, not copies: "muon.momentum.NAME", "adamw.exp_avg.NAME", "adamw.step.NAME", …

        Calls init_state first, so the keys are the same before and after the first step. Learning rates are not
        included: they follow from the config and the step.
        """
        self.init_state()
        return dict(self._named_state())

    @torch.no_grad()
    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Copy a flat state into the optimizers' tensors.

        Raises:
            UserError: the keys or a shape differ from those of these optimizers.
        """
        own = self.state_dict()
        if different := sorted(own.keys() ^ flat.keys()):
            side = "lacks" if different[0] in own else "has a surplus"
            raise UserError(
                f"the saved optimizer state {side} {different[0]} ({len(different)} keys differ); "
                "use the model, optim.router and train.only it was saved with"
            )
        for key, tensor in own.items():
            saved = flat[key]
            if saved.shape != tensor.shape:
                raise UserError(
                    f"the saved {key} has shape {list(saved.shape)}, the model's has {list(tensor.shape)}; "
                    "use the model it was saved with"
                )
            tensor.copy_(saved)

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        optimizers: list[tuple[str, torch.optim.Optimizer, list[Role]]] = [
            ("muon", self.muon, self.muon_roles),
            ("adamw", self.adamw, self.adamw_roles),
        ]
        for prefix, optimizer, roles in optimizers:
            for role in roles:
                for key, tensor in optimizer.state[role.parameter].items():
                    yield f"{prefix}.{key}.{role.name}", tensor


def build_optimizers(
    roles: list[Role],
    parameters: Iterable[torch.nn.Parameter],
    *,
    muon: dict[str, Any],
    adamw: dict[str, Any],
    router: Literal["muon", "adamw"] = "muon",
    decay_gains: bool = False,
) -> Optimizers:
    """Assign every trainable parameter to one optimizer by its role's kind. Frozen parameters belong to neither.

    Args:
        roles: one for each parameter of the model.
        parameters: the model's parameters, to check that each trainable one has a role.
        muon: keyword arguments of Muon, including `lr`.
        adamw: `lr`, `betas`, `eps` and `weight_decay` of torch's AdamW.
        router: the optimizer of the routers.
        decay_gains: whether AdamW's weight decay applies to gains.
    Raises:
        UserError: an unknown `router`.
        AssertionError: a parameter or a name has two roles, or a trainable parameter has none.
    """
    if router not in ("muon", "adamw"):
        raise UserError(f"optim.router={router!r} is not known; use muon or adamw")
    _assert_partition(roles, parameters)
    trained = [role for role in roles if role.parameter.requires_grad]
    muon_kinds = {"matrix", "experts"} | ({"router"} if router == "muon" else set())
    muon_roles = [role for role in trained if role.kind in muon_kinds]
    adamw_roles = [role for role in trained if role.kind not in muon_kinds]
    gains = [role.parameter for role in adamw_roles if role.kind == "gain"]
    decayed = [role.parameter for role in adamw_roles if role.kind != "gain"]
    gain_decay = adamw["weight_decay"] if decay_gains else 0.0
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": gains, "weight_decay": gain_decay}]
    return Optimizers(
        Muon(muon_roles, **muon),
        torch.optim.AdamW(groups, **adamw, fused=True),  # one elementwise kernel, hence deterministic
        muon_roles,
        adamw_roles,
        muon["lr"],
        adamw["lr"],
        [role for role in roles if not role.parameter.requires_grad],
    )


def ownership_table(optimizers: Optimizers) -> str:
    """A table for the log, one line per kind: its optimizer and its numbers of tensors, matrices and parameters.

    Matrices are those that Muon orthogonalizes; AdamW has none. Frozen parameters are in no line.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for optimizer, roles in (("Muon", optimizers.muon_roles), ("AdamW", optimizers.adamw_roles)):
        for role in roles:
            matrices = role.parameter.shape[:-2].numel() * len(role.rows) if optimizer == "Muon" else 0
            row = counts.setdefault((role.kind, optimizer), [0, 0, 0])
            row[:] = row[0] + 1, row[1] + matrices, row[2] + role.parameter.numel()
    total = [sum(column) for column in zip(*counts.values())]
    lines = [f"{'group':<10} {'optimizer':<9} {'tensors':>8} {'matrices':>9} {'parameters':>16}"]
    for (kind, optimizer), (tensors, matrices, numel) in [*counts.items(), (("total", ""), total)]:
        lines.append(f"{kind:<10} {optimizer:<9} {tensors:>8,} {matrices:>9,} {numel:>16,}")
    return "\n".join(lines)


def _assert_partition(roles: list[Role], parameters: Iterable[torch.nn.Parameter]) -> None:
    """Assert that every trainable parameter has exactly one role, and that every name is used once."""
    owner: dict[int, str] = {}
    names: set[str] = set()
    for role in roles:
        assert id(role.parameter) not in owner, f"{role.name} has two roles: it is {owner[id(role.parameter)]} as well"
        assert role.name not in names, f"two parameters are called {role.name}"
        owner[id(role.parameter)] = role.name
        names.add(role.name)
    for parameter in parameters:
        assert not parameter.requires_grad or id(parameter) in owner, (
            f"a trainable parameter of shape {list(parameter.shape)} has no role, so no optimizer would update it"
        )
