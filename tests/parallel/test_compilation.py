"""Compiled blocks equal uncompiled ones, on a mesh with split experts too; and the warning of compile_blocks."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import trinity_kernels
from tests.parallel.mesh_runs import assert_same, run_steps, run_steps_alone
from trinity.config.model import ModelConfig
from trinity.models import Trinity, next_tokens
from trinity.parallel import compilation
from trinity.parallel.compilation import compile_blocks
from trinity_kernels.op import Op

# The same sums in another order in fp32: the bound for another mesh (test_every_mesh.FP32_BOUND).
BOUND = 1e-5
# AdamW with a large ε, as test_every_mesh.WIDE_EPSILON: with the usual one, rounding alone makes a full step.
WORDS = ["optim.adamw.eps=1e-4", "batch.sequences=4", "batch.ramp=[]", "batch.microbatch=2", "model.layers=3"]


def compiled_steps(settings: dict, words: list[str], steps: int) -> dict[str, Any]:
    """run_steps, and the number of compiled graphs."""
    counters["stats"].clear()
    return run_steps(settings, words, steps) | {"graphs": counters["stats"]["unique_graphs"]}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["parallel.expert=2", "parallel.context=2"])
def test_compiled_blocks(recipe: Callable, processes: Callable, tmp_path: Path, parallel: str) -> None:
    """Two steps on two processes that split experts or rows, against one without compilation; graphs were compiled."""
    settings = recipe(tmp_path / "run")
    words = [*WORDS, "compile=block", parallel]
    runs = processes(2).run(compiled_steps, settings, words, 2)
    assert all(run["graphs"] for run in runs)
    assert_same(runs, run_steps_alone(settings, WORDS, 2), BOUND)


class Toy(torch.nn.Module):
    """A block for compile_blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], int]]:
    """compiled(shapes): run compiled toy blocks on rows of `shapes` different lengths; return the number of graphs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    logger = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(logger, "filters", [])

    def run(shapes: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        model = SimpleNamespace(blocks=[Toy(), Toy()])
        compile_blocks(model)
        for length in range(2, 2 + shapes):
            for block in model.blocks:
                assert torch.equal(block(torch.ones(length)), torch.full((length,), 2.0))
        return counters["stats"]["unique_graphs"]

    with torch._dynamo.config.patch(recompile_limit=3):  # restored at the end
        yield run
    torch._dynamo.reset()


def test_triton_is_imported_before_anything_is_traced() -> None:
    """An import inside a traced forward breaks the graph."""
    ops = [op for op in vars(trinity_kernels).values() if isinstance(op, Op) and op.has_triton]
    assert len(ops) > 10
    for op in ops:
        vars(op).pop("triton", None)
    compile_blocks(SimpleNamespace(blocks=[]))
    assert all("triton" in vars(op) for op in ops)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_number_of_padding_tokens_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled once with padding, whatever its amount, and equal uncompiled ones: float64, 1e-12."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = ModelConfig(
        vocab_size=50, width=24, layers=2, dense_layers=1, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=5,
        experts=6, active_experts=2, shared_experts=2, expert_width=10, route_scale=2.5, rope_theta=100.0,
        max_positions=64,
    )  # fmt: skip
    tokens_BS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    models = [Trinity(config).double() for _ in range(2)]
    compile_blocks(models[1])
    graphs = []
    for padding in (1, 4, 9):
        counters["stats"].clear()
        ids_BS = torch.where(torch.arange(12) >= 12 - padding, -1, 0).expand(2, -1)
        losses = [model(tokens_BS, None, ids_BS, next_tokens(tokens_BS, ids_BS), 0.01) for model in models]
        gradients = [
            torch.autograd.grad(loss.token_loss + loss.sequence_loss_B.sum(), list(model.parameters()))
            for loss, model in zip(losses, models)
        ]
        assert torch.equal(losses[0].counts_ME, losses[1].counts_ME)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients))
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] > 0
    assert graphs[1:] == [0, 0]


def test_more_shapes_than_torchs_default_limit_stay_compiled(compiled: Callable, capfd: pytest.CaptureFixture) -> None:
    """20 shapes, above torch's default limit of 8: a graph for each."""
    assert compiled(20) == 20
    assert "warning" not in capfd.readouterr().err


def test_the_recompile_limit_is_warned_of_once(
    compiled: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "LIMIT", 3)
    assert compiled(3) == 3
    assert "warning: compile=block" not in capfd.readouterr().err
    assert compiled(6) == 3
    printed = capfd.readouterr().err
    assert printed.count("warning: compile=block: 'forward' (") == 1
    assert "was compiled 3 times" in printed
