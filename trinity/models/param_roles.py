"""What each parameter is to the optimizer: said by the module that owns it, never guessed from its shape."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Role:
    """One parameter's place in the optimizer.

    name: full name in the model, e.g. "blocks.3.moe.experts.gate_up".
    parameter: the parameter itself; a DTensor once the model is sharded.
    kind: "matrix", "experts", "router", "embedding", "head" or "gain".
    rows: the matrices it holds. The last two dimensions are a matrix [sum(rows), n], made of pieces of these row
        counts; dimensions before them are a batch. Empty for what is not orthogonalised: gains, embedding, head.
    """

    name: str
    parameter: torch.nn.Parameter
    kind: str
    rows: tuple[int, ...] = ()


def parameter_roles(model: torch.nn.Module) -> list[Role]:
    """Every parameter of the model with its role, in the model's own order.

    A module says what its parameters are in an attribute `roles`: local name → (kind, rows).

    Raises:
        AssertionError: a parameter whose module does not say what it is.
    """
    found = []
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            roles = getattr(module, "roles", {})
            assert local in roles, f"{name} has no role: {type(module).__name__} must declare it"
            kind, rows = roles[local]
            found.append(Role(name, parameter, kind, tuple(rows)))
    return found
