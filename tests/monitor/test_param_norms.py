"""Norms of weights and updates against the checkpoints before and after the step."""

from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, state, train
from trinity.models import ModelConfig, Trinity
from trinity.models.param_roles import parameter_roles


def test_norms_of_weights_and_updates(settings: dict) -> None:
    """Against the checkpoints before and after the step; sums of 50,000 squares in fp32 and float64 differ by 1e-6."""
    assert train(settings, "log.norms_every=4", "checkpoint.every=1", "checkpoint.keep=9") == 0
    run = Path(settings["run"]["dir"])
    lines = {line["step"]: line for line in metrics(run)}
    assert [step for step, line in lines.items() if "weight_norm.matrix" in line] == [4, 8]
    roles = parameter_roles(Trinity(ModelConfig(**settings["model"])))
    for step in (4, 8):
        before, after = state(run, step - 1), state(run, step)
        for kind in {role.kind for role in roles}:
            names = [f"model.{role.name}" for role in roles if role.kind == kind]
            weights = torch.cat([after[name].flatten() for name in names]).double()
            update = weights - torch.cat([before[name].flatten() for name in names]).double()
            assert lines[step][f"weight_norm.{kind}"] == pytest.approx(weights.norm().item(), rel=1e-6)
            assert lines[step][f"update_norm.{kind}"] == pytest.approx(update.norm().item(), rel=1e-5)
