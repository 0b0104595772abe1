"""Roles: every parameter has a declared role in the optimizer and a list of the matrices stacked in it."""

import pytest
import torch

from trinity.config.model import ModelConfig
from trinity.models import Trinity, parameter_roles


def test_every_parameter_has_one_role(tiny: ModelConfig) -> None:
    """In the model's order, each the parameter itself."""
    model = Trinity(tiny)
    roles = parameter_roles(model)
    named = dict(model.named_parameters())
    assert [role.name for role in roles] == list(named)
    assert all(role.parameter is named[role.name] for role in roles)


def test_kinds_and_matrices(tiny: ModelConfig) -> None:
    """The whole table of a dense and of a sparse block, from the architecture: q, k, v, gate; gate, up; experts."""
    declared = {
        role.name: (role.kind, role.rows, tuple(role.parameter.shape)) for role in parameter_roles(Trinity(tiny))
    }
    attention = {
        "attention.qkvg.weight": ("matrix", (32, 16, 16, 32), (96, 24)),
        "attention.out.weight": ("matrix", (24,), (24, 32)),
        "attention.q_norm.gain": ("gain", (), (8,)),
        "attention.k_norm.gain": ("gain", (), (8,)),
    }
    norms = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")
    common = attention | {f"{norm}.gain": ("gain", (), (24,)) for norm in norms}
    dense = {
        "ffn.gate_up.weight": ("matrix", (40, 40), (80, 24)),
        "ffn.down.weight": ("matrix", (24,), (24, 40)),
    }
    sparse = {
        "ffn.router.weight": ("router", (6,), (6, 24)),
        "ffn.experts.gate_up": ("experts", (10,), (6, 2, 10, 24)),
        "ffn.experts.down": ("experts", (24,), (6, 24, 10)),
        "ffn.shared.gate_up.weight": ("matrix", (20, 20), (40, 24)),
        "ffn.shared.down.weight": ("matrix", (24,), (24, 20)),
    }
    expected = {
        "embed.weight": ("embedding", (), (50, 24)),
        "norm.gain": ("gain", (), (24,)),
        "head.weight": ("head", (), (50, 24)),
    }
    for layer in range(5):
        parts = common | (dense if layer == 0 else sparse)
        expected |= {f"blocks.{layer}.{name}": value for name, value in parts.items()}
    assert declared == expected


def test_rows_fill_the_matrix(tiny: ModelConfig) -> None:
    for role in parameter_roles(Trinity(tiny)):
        if role.rows:
            assert sum(role.rows) == role.parameter.shape[-2], role.name
        else:
            assert role.kind in ("gain", "embedding", "head"), role.name


def test_a_parameter_without_a_role_is_an_error() -> None:
    """Roles are not guessed: torch's own Linear declares none."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(AssertionError, match=r"0\.weight has no role: Linear must declare it"):
        parameter_roles(model)
