"""FSDP2's copies against what it does on one rank, and the host's time by hand."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.hardware import GPU, GPUS
from trinity.planning.fake_rank import FsdpGroup
from trinity.planning.schedule_segments import RankLoad
from trinity.planning.step_overheads import (
    DENSE,
    HOST,
    HOST_PASSES,
    SPARSE,
    STATISTICS,
    copy_terms,
    host_seconds,
    wait_seconds,
)
from trinity.planning.step_terms import PRESENT, SHARES, Implementation

CARD = GPU(bf16=1e12, fp32=1e11, memory=1.0, bandwidth=1e10, node_link=1e9, network=1e8)
RATE = 1e10 * SHARES["memory"]
LOAD = RankLoad(rows=6, microbatch=2, microbatches=3, tokens=60)
MOVES = ("aten._to_copy.default", "aten.copy_.default", "aten.div.Tensor", "aten.add_.Tensor", "fsdp.chunk_cat.default")
WIDTH, LAYERS = 64, 4


class CopiedBytes(TorchDispatchMode):
    """Bytes that the operations MOVES read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name in MOVES:
            inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
            written = 0 if name != "aten.add_.Tensor" else args[0].numel() * args[0].element_size()
            outputs = [x for x in tree_iter(result) if isinstance(x, Tensor) and all(x is not y for y in inputs)]
            self.bytes[name] += written + sum(x.numel() * x.element_size() for x in [*inputs, *outputs])
        return result


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def copied_in_a_step(deferred: bool, has: Implementation) -> float:
    """Bytes per parameter that FSDP2 copies in a step of three microbatches, on one rank in bf16."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    groups = [module for module in model.modules() if hasattr(module, "set_reshard_after_backward")]
    for group in groups:
        group.set_force_sum_reduction_for_comms(True)
        if has.divides_gradients:
            group.set_gradient_divide_factor(1.0)
    with CopiedBytes() as copied:
        for microbatch in range(LOAD.microbatches):
            last = microbatch == LOAD.microbatches - 1
            model.set_requires_gradient_sync(last or not deferred)
            for group in groups:
                group.set_reshard_after_backward(last or not (deferred and has.keeps_weights))
            model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()
    return sum(copied.bytes.values()) / (LAYERS * WIDTH**2)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_copies_of_one_rank(one_rank: None, deferred: bool, divides: bool, keeps: bool) -> None:
    """The formula's bytes equal those of the operations. Other copies, of a row or a scalar, are below a hundredth."""
    has = PRESENT._replace(divides_gradients=divides, keeps_weights=keeps)
    counted = copied_in_a_step(deferred, has)
    group = FsdpGroup("blocks.0", "dense", 1, gathered=2 * 1000, reduced=4 * 1000, gathers=1)
    terms = copy_terms(RunConfig(), LOAD, [group], deferred, CARD, has)
    assert LOAD.microbatches * sum(term.seconds for term in terms) * RATE / 1000 == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "compute", "gathered", "bytes_a_step"),
    [("dense", "bfloat16", 2, 10 + 6 + 2 * 10), ("experts", "bfloat16", 2, 10), ("precise", "bfloat16", 0, 2 * 12),
     ("dense", "float32", 0, 2 * 12)],
)  # fmt: skip
def test_a_group_on_one_rank_hands_its_gradients_over(
    kind: str, compute: str, gathered: int, bytes_a_step: float
) -> None:
    """The table of parallel/README.md: a cast of the weights, a cast of the first gradient, two additions."""
    group = FsdpGroup("blocks.0", kind, 1, gathered=gathered * 1000, reduced=4 * 1000, gathers=1, local=True)
    config = RunConfig()
    config.precision.compute = compute
    terms = copy_terms(config, LOAD, [group], True, CARD)
    assert LOAD.microbatches * sum(term.seconds for term in terms) * RATE / 1000 == pytest.approx(bytes_a_step)


def test_copies_of_a_single_microbatch() -> None:
    """As read in FSDP2's source: 10 bytes of weights, and 22 of gradients (34 with the division and the addition)."""
    group = FsdpGroup("blocks.0", "dense", 1, gathered=2 * 1000, reduced=4 * 1000, gathers=1)
    one = RankLoad(rows=2, microbatch=2, microbatches=1, tokens=20)
    weights, gradients = copy_terms(RunConfig(), one, [group], False, CARD)
    assert (weights.forward, gradients.backward) == pytest.approx((10_000 / RATE, 14_000 / RATE), rel=1e-12)
    many = one._replace(microbatches=10**9)
    _, gradients = copy_terms(RunConfig(), many, [group], False, CARD, PRESENT._replace(divides_gradients=True))
    assert gradients.backward == pytest.approx(34_000 / RATE, rel=1e-6)


def test_copies_of_many_shards() -> None:
    """Four shards, weights gathered twice: (10/4 + 4) bytes each time, and 6 + 8/4 + 12/4·2/3 of gradients."""
    group = FsdpGroup("blocks.0", "dense", 4, gathered=2 * 1000, reduced=4 * 1000, gathers=2)
    weights, gradients = copy_terms(RunConfig(), LOAD, [group], False, CARD)
    assert weights.forward == pytest.approx(2 * 6_500 / RATE, rel=1e-12)
    assert gradients.backward == pytest.approx(10_000 / RATE, rel=1e-12)


def test_experts_that_add_in_place_copy_once_a_step() -> None:
    """Collected and copied in fp32, 16 bytes, shared by three microbatches."""
    group = FsdpGroup("blocks.1", "experts", 1, gathered=2 * 1000, reduced=4 * 1000, gathers=1)
    gradients = copy_terms(RunConfig(), LOAD, [group], True, CARD)[1]
    assert gradients.backward == pytest.approx(16_000 / 3 / RATE, rel=1e-12)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_host(tiny: ModelConfig, recompute: str) -> None:
    """One dense block, three MoE blocks and two FSDP groups, by hand in microseconds."""
    group = FsdpGroup("blocks.0", "dense", 1, gathered=2, reduced=4, gathers=1)
    has = PRESENT._replace(separate_statistics=True, op_us=100.0)
    config = RunConfig(model=tiny, recompute=recompute)
    forward, backward = host_seconds(config, LOAD, [group, group], False, GPUS["h200"], has)
    dense = 50 * 8 + 20 * 7 + 7 * 4
    sparse = 50 * 11 + 20 * 18 + 7 * 5 + 7 * STATISTICS
    back = 50 * 8 + 20 * 12 + 15 * 4 + 3 * (50 * 11 + 20 * 21 + 15 * 5)
    again = dense + 3 * sparse + 4 * HOST["checkpoint"] if recompute == "block" else 0
    assert (DENSE.ops, SPARSE.ops) == (8, 11)
    assert forward == pytest.approx(1e-6 * (dense + 3 * sparse + 2 * HOST_PASSES["group"][0]), rel=1e-12)
    assert backward == pytest.approx(1e-6 * (back + again + 2 * HOST_PASSES["group"][1]), rel=1e-12)


def test_host_of_a_plan_on_a_cpu(tiny: ModelConfig) -> None:
    """A CPU computes itself: there is nothing to launch ahead."""
    assert host_seconds(RunConfig(model=tiny), LOAD, [], True, CARD._replace(name="cpu")) == (0, 0)


def test_waits(tiny: ModelConfig) -> None:
    """One wait for each of three MoE layers, if experts are on several ranks and sizes are on the host."""
    config = RunConfig(model=tiny)
    assert wait_seconds(config, 2) == pytest.approx(3e-6 * HOST["wait"])
    assert wait_seconds(config, 1) == wait_seconds(config, 2, PRESENT._replace(waits_for_sizes=False)) == 0
