"""The optimizer's role of each parameter, declared by the module that owns it and not guessed from its shape."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Role:
    """How the optimizer treats one parameter.

    name: full name in the model, e.g. "blocks.3.ffn.experts.gate_up".
    parameter: the parameter itself; a DTensor once the model is sharded.
    kind: "matrix", "experts", "router", "embedding", "head" or "gain".
    rows: row counts of the matrices stacked in it. The last two dimensions are one matrix [sum(rows), n]; dimensions
        before them are a batch. Empty for parameters that Muon does not orthogonalise: gains, embedding, head.
    """

    name: str
    parameter: torch.nn.Parameter
    kind: str
    rows: tuple[int, ...] = ()


def parameter_roles(model: torch.nn.Module) -> list[Role]:
    """Every parameter of the model with its role, in the order of model.named_parameters().

    A module declares the roles of its own parameters in an attribute `roles`: local name → (kind, rows).

    Raises:
        AssertionError: a parameter whose module declares no role for it.
    """
    roles = []
    for prefix, module in model.named_modules():
        for local_name, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local_name}" if prefix else local_name
            declared = getattr(module, "roles", {})
            assert local_name in declared, f"{name} has no role: {type(module).__name__} must declare it"
            kind, rows = declared[local_name]
            roles.append(Role(name, parameter, kind, tuple(rows)))
    return roles
