"""Activation checkpointing: the same bits as without it, on one process and over meshes, and what is recomputed."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trinity_kernels
from tests.parallel.process_pool import ProcessPool
from trinity.config.model import ModelConfig
from trinity.config.run import PrecisionConfig
from trinity.models import Trinity
from trinity.parallel import token_dispatcher
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.fsdp import shard_model
from trinity.parallel.mesh import Sizes, join_meshes
from trinity.planning.activations import LiveBytes

LAYERS, SPARSE = 3, 2
CONFIG = ModelConfig(
    vocab_size=50, width=24, layers=LAYERS, dense_layers=LAYERS - SPARSE, dense_width=40, heads=4, kv_heads=2,
    head_dim=8, window=5, global_every=3, experts=8, active_experts=3, shared_experts=2, expert_width=10,
    route_scale=2.5, rope_theta=100.0, max_positions=64,
)  # fmt: skip

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
EXCHANGE = "_c10d_functional::all_to_all_single"


class OperationCounter(TorchDispatchMode):
    """Counts executed operations; a saved output does not run again and is not counted again."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.times[op.name()] += 1
        return op(*args, **(kwargs or {}))


def gradients(model: Trinity, random: torch.Generator, tokens: int) -> tuple[dict[str, Tensor], Counter[str]]:
    """Every gradient after two batches, and how often each operation ran."""
    with OperationCounter() as count:
        for _ in range(2):
            tokens_BS = torch.randint(50, (2, tokens), generator=random)
            losses = model(tokens_BS, targets_BS=tokens_BS.roll(1), z=1e-3)
            (losses.token_loss + losses.sequence_loss_B.sum()).backward()
    grads = {name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for name, p in model.named_parameters()}
    return grads, count.times


def model_with(kind: str) -> Trinity:
    """In fp32: a recomputed sum in another order would change bits."""
    model = Trinity(CONFIG)
    model.init_weights(0)
    recompute(model, kind)
    return model


def recompute(model: Trinity, kind: str) -> None:
    """Apply "none", "selective", "block", or "block to compile": `block` as it is where the blocks will be compiled."""
    if kind != "none":
        recompute_blocks(model, kind.split()[0], will_compile="compile" in kind)


def on_one_process(kind: str) -> tuple[dict[str, Tensor], Counter[str]]:
    """In this process."""
    return gradients(model_with(kind), torch.Generator().manual_seed(0), 9)


@pytest.mark.parametrize(
    ("kind", "experts", "attention"), [("block", 2, 2), ("block to compile", 2, 2), ("selective", 1, 1)]
)
def test_one_process(kind: str, experts: int, attention: int) -> None:
    """Routing runs once per layer and forward pass; experts and attention twice if recomputed, else once."""
    (recomputed, ran), (expected, _) = on_one_process(kind), on_one_process("none")
    assert ran["trinity::route"] == 2 * SPARSE
    assert ran["trinity::expert_mlp"] == 2 * SPARSE * experts
    assert ran[ATTENTION] == 2 * LAYERS * attention
    for name, gradient in expected.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("kind", ["block", "block to compile", "selective"])
def test_without_an_observer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As above without the counter, which is a dispatch mode itself; each router alternates between two choices.

    A second choice would differ from the first, so recomputation with another one would change every gradient.
    """
    ran: Counter[str] = Counter()

    def alternating(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
        ran["route"] += 1
        return route(scores_TE * (-1) ** ran["route"], bias_E, active)

    route = trinity_kernels.route.reference
    monkeypatch.setattr(trinity_kernels.route, "reference", alternating)
    tokens_BS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for chosen in ("none", kind):
        ran.clear()
        model = model_with(chosen)
        model(tokens_BS, targets_BS=tokens_BS.roll(1)).token_loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        # the dispatch mode sees the op inside, so the function around it runs again, and its result is the saved one
        assert ran["route"] == (SPARSE if chosen in ("none", "block") else 2 * SPARSE)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_block_keeps_as_many_bytes_with_either_context() -> None:
    """The recorded results are the tensors that the dispatch mode keeps: the same bytes live after forward."""
    kept = {}
    tokens_BS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    for kind in ("none", "block", "block to compile", "selective"):
        model = model_with(kind)
        with LiveBytes() as live:
            losses = model(tokens_BS, targets_BS=tokens_BS.roll(1))
            kept[kind] = live.now
            losses.token_loss.backward()
    assert kept["block"] == kept["block to compile"] < kept["selective"] < kept["none"]


def on_mesh(kind: str, sizes: Sizes, on_its_own: bool = False) -> tuple[dict[str, Tensor], Counter[str]]:
    """On every rank of a mesh, in bf16, with different tokens on each rank.

    on_its_own: tokens are exchanged in the order for a GPU.
    """
    ranks = join_meshes(sizes, torch.device("cpu"))
    with torch.device("meta"):
        model = Trinity(CONFIG)
    recompute(model, kind)
    shard_model(model, ranks, PrecisionConfig(compute="bfloat16"))
    model.to_empty(device="cpu")
    model.init_weights(0)
    with mock.patch.object(token_dispatcher, "works_on_its_own", return_value=on_its_own):
        return gradients(model, torch.Generator().manual_seed(ranks.rank), 6 + ranks.rank)


@pytest.mark.parametrize(
    ("sizes", "world"), [(Sizes(1, 2, 2, 1, "experts"), 2), (Sizes(1, 4, 2, 2, "experts"), 4)], ids=["2", "4 in pairs"]
)
def test_over_meshes(processes: Callable[[int], ProcessPool], sizes: Sizes, world: int) -> None:
    """Under FSDP with split experts: only `block` exchanges tokens again, and counts are never exchanged again.

    A layer exchanges counts, tokens, choices and sums in forward, sums, tokens and choices in backward.
    """
    expected = processes(world).run(on_mesh, "none", sizes)
    for kind, exchanges, experts in (("block", 10, 2), ("block to compile", 10, 2), ("selective", 7, 1)):
        results = processes(world).run(on_mesh, kind, sizes)
        for (recomputed, ran), (plain, ran_without) in zip(results, expected):
            assert ran_without[EXCHANGE] == 2 * SPARSE * 7
            assert ran[EXCHANGE] == 2 * SPARSE * exchanges
            assert ran["trinity::route"] == ran["trinity::exchanged_counts"] == 2 * SPARSE
            assert ran["trinity::expert_mlp"] == 2 * SPARSE * experts
            for name, gradient in plain.items():
                assert torch.equal(recomputed[name], gradient), name


def test_the_exchange_in_the_order_for_a_gpu(processes: Callable[[int], ProcessPool]) -> None:
    """Counts awaited after the shared expert: the same bits with and without recompute, and still awaited once."""
    sizes = Sizes(1, 2, 2, 1, "experts")
    expected = processes(2).run(on_mesh, "none", sizes)
    for kind, exchanges in (("none", 7), ("block", 10), ("selective", 7)):
        for (actual, ran), (plain, _) in zip(processes(2).run(on_mesh, kind, sizes, True), expected):
            assert ran[EXCHANGE] == 2 * SPARSE * exchanges
            assert ran["trinity::exchanged_counts"] == 2 * SPARSE
            for name, gradient in plain.items():
                assert torch.equal(actual[name], gradient), name
