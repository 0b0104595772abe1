"""Split experts' gradients that stay on a rank over microbatches: the op adds to them in place, through FSDP2.

Two processes with half of the experts each, and four in pairs; Triton's interpreter, three microbatches, reduced after
the last one.
"""

from collections.abc import Callable
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tests.parallel.process_pool import ProcessPool
from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig, PrecisionConfig
from trinity.models import Trinity
from trinity.models.moe import Experts
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.expert_parallel import local_part
from trinity.parallel.fsdp import shard_model
from trinity.parallel.grad_accumulation import end_accumulation, set_reduction
from trinity.parallel.mesh import Sizes, join_meshes

CONFIG = ModelConfig(
    vocab_size=64, width=16, layers=2, dense_layers=1, dense_width=32, heads=2, kv_heads=1, head_dim=8, window=5,
    experts=4, active_experts=2, expert_width=8,
)  # fmt: skip
MICROBATCHES = 3
SIZES = {2: Sizes(1, 2, 2, 1, "experts"), 4: Sizes(1, 4, 2, 2, "experts")}
Pools = Callable[[int], ProcessPool]


def gradients(compute: str, kernel: str, recompute: str, in_place: bool = True) -> tuple[dict[str, Tensor], list[bool]]:
    """This rank's gradients of three microbatches, and whether each backward pass of the op added in place."""
    from trinity_kernels import experts_triton

    ranks = join_meshes(SIZES[torch.distributed.get_world_size()], torch.device("cpu"))
    model = Trinity(CONFIG, KernelsConfig(experts=kernel))
    model.init_weights(0)
    if recompute != "none":
        recompute_blocks(model, recompute)
    shard_model(model, ranks, PrecisionConfig(compute=compute))
    random, added, backward = torch.Generator().manual_seed(ranks.rank), [], experts_triton.backward

    def spy(*args: object, into: tuple[Tensor, Tensor] | None = None, **kwargs: object) -> tuple[Tensor, ...]:
        added.append(into is not None)
        return backward(*args, into=into, **kwargs)

    with mock.patch.object(experts_triton, "backward", spy):
        for index in range(MICROBATCHES):
            set_reduction(model, last=index + 1 == MICROBATCHES, defer=True)
            for module in model.modules():
                if isinstance(module, Experts) and not in_place:
                    module.wide_gradient = False
            tokens = torch.randint(CONFIG.vocab_size, (1, 9 + ranks.rank), generator=random)
            (model(tokens, targets_BS=tokens.roll(1)).token_loss / 50).backward()
    end_accumulation(model)
    return {name: parameter.grad.to_local() for name, parameter in model.named_parameters()}, added


@pytest.fixture(scope="module")
def without(processes: Pools) -> Callable[..., list]:
    """without(world, compute, kernel): the gradients of every rank if nothing is added in place, once for all tests."""
    return cache(lambda world, *words: processes(world).run(gradients, *words, "none", False))


@pytest.mark.parametrize(
    ("world", "kernel", "recompute"),
    [(2, "triton", "none"), (2, "triton", "block"), pytest.param(2, "triton", "selective", marks=pytest.mark.slow),
     (4, "triton", "none"), (2, "reference", "none")],
)  # fmt: skip
def test_fp32_has_the_same_bits_as_without(
    processes: Pools, without: Callable, world: int, kernel: str, recompute: str
) -> None:
    """Every gradient; each microbatch but the first adds to the first's, where the kernel can."""
    results = processes(world).run(gradients, "float32", kernel, recompute)
    expected = without(world, "float32", kernel)
    for (actual, added), (plain, never) in zip(results, expected):
        assert added == ([False, True, True] if kernel == "triton" else [])
        assert not any(never)
        for name, gradient in plain.items():
            assert gradient.count_nonzero(), name
            assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_bf16_gradients_are_added_up_without_rounding(processes: Pools, without: Callable, recompute: str) -> None:
    """Experts' gradients in fp32; other gradients keep their bits.

    Without it each of three gradients is rounded to bf16, 2⁻⁹ an element: 2⁻⁸ bounds the difference.
    """
    results = processes(2).run(gradients, "bfloat16", "triton", recompute)
    for (actual, added), (plain, never) in zip(results, without(2, "bfloat16", "triton")):
        assert added == [False, True, True]
        assert not any(never)
        for name, gradient in plain.items():
            if "experts" not in name:
                assert torch.equal(actual[name], gradient), name
                continue
            assert actual[name].dtype == torch.float32
            assert 0 < (actual[name] - gradient).norm() <= 2**-8 * gradient.norm(), name
            assert not torch.equal(actual[name], actual[name].bfloat16().float())


def parts_before_gradients() -> tuple[Tensor, Tensor, bool]:
    """The gradient of two passes whose parts were taken before either had a gradient, then of a third; twice."""
    mesh = join_meshes(SIZES[2], torch.device("cpu")).experts["expert"]
    weight = nn.Parameter(DTensor.from_local(torch.ones(2, 3, dtype=torch.bfloat16), mesh, [Shard(0)], run_check=False))
    one, two = local_part(weight, True), local_part(weight, True)
    shares = one.data_ptr() == two.data_ptr() == weight.to_local().data_ptr()
    (one.sum() + 4 * two.sum()).backward()
    (2**-9 * local_part(weight, True).sum()).backward()
    inplace = weight.grad.to_local()
    with torch.no_grad():
        assert not local_part(weight, True).requires_grad
    weight.grad = None
    (local_part(weight, False).sum()).backward()
    return inplace, weight.grad.to_local(), shares


def test_a_part_shares_memory_and_gradient_with_its_weight(processes: Pools) -> None:
    """1 + 4 + 2⁻⁹ is no bf16 number, and exact in fp32."""
    for inplace, after, shares in processes(2).run(parts_before_gradients):
        assert shares
        assert inplace.dtype == torch.float32
        assert torch.equal(inplace, torch.full((2, 3), 5 + 2**-9))
        assert torch.equal(after, torch.ones(2, 3))
