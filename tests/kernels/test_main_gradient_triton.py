"""Expert gradients that stay on a rank over microbatches: in fp32, and the op adds to them, through FSDP2.

bf16 compute on a mesh of one, in the same process, with Triton's interpreter; reduced after every microbatch or after
the last one.

Shapes: B batch, S sequence.
"""

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig, ParallelConfig, PrecisionConfig, TrainConfig
from trinity.models import Trinity
from trinity.models.freeze import freeze
from trinity.parallel import mesh
from trinity.parallel.fsdp import shard_model
from trinity.parallel.grad_accumulation import end_accumulation, set_reduction
from trinity.parallel.mesh import Ranks

CONFIG = ModelConfig(
    vocab_size=128, width=32, layers=2, dense_layers=1, dense_width=48, heads=4, kv_heads=2, head_dim=8, window=5,
    experts=4, active_experts=2, expert_width=16,
)  # fmt: skip
MICROBATCHES = 3


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    """A process group of one process, destroyed afterwards."""
    yield mesh.start(ParallelConfig(), CONFIG, 1, False)
    mesh.stop()


def gradients(ranks: Ranks, compute: str, defer: bool, which: str, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Gradients of three microbatches' summed losses, by parameter; `only`: train.only."""
    model = Trinity(CONFIG, KernelsConfig(experts=which))
    model.init_weights(0)
    freeze(model, TrainConfig(list(only)))
    shard_model(model, ranks, PrecisionConfig(compute=compute))
    model.to(ranks.device)
    random = torch.Generator().manual_seed(0)
    for index in range(MICROBATCHES):
        set_reduction(model, last=index + 1 == MICROBATCHES, defer=defer)
        tokens = torch.randint(CONFIG.vocab_size, (2, 9), generator=random).to(ranks.device)
        (model(tokens, targets_BS=tokens.roll(1)).token_loss / 50).backward()
    end_accumulation(model)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient.full_tensor() for name, gradient in found.items()}


@pytest.mark.parametrize("which", ["triton", "reference"])
def test_fp32_is_the_same_sum_either_way(ranks: Ranks, which: str) -> None:
    """The order of summation is the same, except within the op: 1e-6 is a few roundings of fp32."""
    deferred, reduced = (gradients(ranks, "float32", defer, which) for defer in (True, False))
    for name, gradient in reduced.items():
        assert (deferred[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_bf16_gradients_of_experts_are_added_up_without_rounding(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deferred, each microbatch but the first adds to the fp32 gradient; other parameters' gradients keep their bits.

    Reduced each time, three gradients are rounded to bf16, 2⁻⁹ an element, then summed: 2⁻⁸ bounds the difference.
    """
    from trinity_kernels import experts_triton

    adds_to_gradient, backward = [], experts_triton.backward

    def spy(*args: object, into: tuple[Tensor, Tensor] | None = None, **kwargs: object) -> tuple[Tensor, ...]:
        adds_to_gradient.append(into is not None)
        return backward(*args, into=into, **kwargs)

    monkeypatch.setattr(experts_triton, "backward", spy)
    reduced = gradients(ranks, "bfloat16", False, "triton")
    assert adds_to_gradient == [False] * MICROBATCHES
    adds_to_gradient.clear()
    deferred = gradients(ranks, "bfloat16", True, "triton")
    assert adds_to_gradient == [False, True, True]
    for name, gradient in reduced.items():
        if "experts" not in name:
            assert torch.equal(deferred[name], gradient), name
            continue
        assert deferred[name].dtype == torch.float32
        assert 0 < (deferred[name] - gradient).norm() <= 2**-8 * gradient.norm(), name
        assert not torch.equal(deferred[name], deferred[name].bfloat16().float())


@pytest.mark.parametrize("stack", ["gate_up", "down"])
def test_one_frozen_stack_rounds_nothing_of_the_other(ranks: Ranks, stack: str) -> None:
    """In bf16, deferred: the trained stack keeps its fp32 sum, and the frozen one gets none.

    Alone it is summed outside of the op, in the same order: a few roundings of fp32.
    """
    name = f"blocks.1.ffn.experts.{stack}"
    both = gradients(ranks, "bfloat16", True, "triton")[name]
    alone = gradients(ranks, "bfloat16", True, "triton", (name,))
    assert alone.keys() == {name}
    assert (alone[name] - both).norm() <= 1e-6 * both.norm()
