"""FP8 projections (torchao's, emulated on a CPU) against exact products; nothing but forward changes.

Without torchao all tests but the refusals are skipped.

Shapes: B batch, S sequence.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.config.run import PrecisionConfig
from trinity.errors import UserError
from trinity.models import Trinity
from trinity.models.fp8 import use_fp8
from trinity.models.layers import Linear
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.fsdp import shard_model
from trinity.parallel.mesh import Sizes, join_meshes

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=50, width=32, layers=5, dense_layers=1, dense_width=48, heads=4, kv_heads=2, head_dim=8, window=5,
    experts=6, active_experts=2, expert_width=16, rope_theta=100.0, max_positions=64,
)  # fmt: skip


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao.float8", reason="torchao is not installed", exc_type=ImportError)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_error_of_products(torchao: None) -> None:
    """e4m3 keeps 3 bits after the first: 0.026 an operand in the mean, 0.037 a product; twice 2⁻⁹ more from bf16.

    Below 0.02 nothing would have been rounded to 8 bits at all.
    """
    random = torch.Generator().manual_seed(0)
    linear = Linear(64, (48, 48))
    weight = torch.randn(96, 64, generator=random) / 8
    weight[48:] *= 1000  # stacked matrices do not share a scale
    linear.weight = nn.Parameter(weight.bfloat16())
    use_fp8(nn.Sequential(linear), "torchao", CPU)
    x = torch.randn(4, 32, 64, generator=random).bfloat16().requires_grad_()
    dy = torch.randn(4, 32, 96, generator=random).bfloat16()
    dy[..., 48:] /= 1000
    y = linear(x)
    assert y.dtype == torch.bfloat16
    grad_x, grad_w = torch.autograd.grad(y, (x, linear.weight), dy)
    x_wide, w_wide, dy_wide = x.double(), linear.weight.double(), dy.double()
    exact_w = torch.einsum("abo,abi->oi", dy_wide, x_wide)
    pairs = [(y[..., :48], (x_wide @ w_wide.t())[..., :48]), (y[..., 48:], (x_wide @ w_wide.t())[..., 48:])]
    pairs += [(grad_x, dy_wide @ w_wide), (grad_w[:48], exact_w[:48]), (grad_w[48:], exact_w[48:])]
    errors = [relative_error(got, exact.detach()) for got, exact in pairs]
    assert all(0.02 <= error <= 0.045 for error in errors), errors


def model(fp8: bool, recompute: str = "none") -> Trinity:
    trinity = Trinity(CONFIG)
    trinity.init_weights(0)
    if fp8:
        use_fp8(trinity, "torchao", CPU)
    if recompute != "none":
        recompute_blocks(trinity, recompute)
    return trinity


def gradients(trinity: Trinity) -> dict[str, Tensor]:
    """The loss and every gradient on sixteen tokens twice."""
    text = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(1))
    loss = trinity(text[:, :-1], targets_BS=text[:, 1:]).token_loss
    loss.backward()
    results = {name: x.grad for name, x in trinity.named_parameters()} | {"loss": loss.detach()}
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in results.items()}


def test_names_and_values_stay(torchao: None) -> None:
    plain, changed = model(False).state_dict(), model(True).state_dict()
    assert list(plain) == list(changed)
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


def test_the_models_loss(torchao: None) -> None:
    """In fp32 but for 8 bits in the projections: the loss of an untrained model moves by less than one per cent, and
    the gradient as a whole points the same way: eight products of 0.037 a layer, and a route may change."""
    plain, changed = gradients(model(False)), gradients(model(True))
    loss, exact = changed.pop("loss"), plain.pop("loss")
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    both = [torch.cat([x.flatten() for x in results.values()]) for results in (changed, plain)]
    assert torch.cosine_similarity(*both, dim=0) > 0.85


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recompute_gives_the_same_bits(torchao: None, recompute: str) -> None:
    kept, recomputed = gradients(model(True)), gradients(model(True, recompute))
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_sharded_with_masters_in_fp32(torchao: None) -> None:
    """Under FSDP2 on one process, computing in bf16: the gradients of the same model that holds bf16 weights itself.

    Both multiply the same 8-bit numbers; the sharded one keeps its gradients in fp32.
    """
    whole = model(True)
    whole.embed.bfloat16(), whole.head.bfloat16()
    for block in whole.blocks:
        for module in block.modules():
            if isinstance(module, Linear) or type(module).__name__ == "Experts":
                module.bfloat16()
    exact = gradients(whole)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        part = model(True)
        shard_model(part, join_meshes(Sizes(1, 1, 1, 1, "experts"), CPU), PrecisionConfig(compute="bfloat16"))
        got = gradients(part)
    finally:
        dist.destroy_process_group()
    assert all(x.dtype == torch.float32 for x in got.values())
    for name in got:
        assert torch.equal(got[name], exact[name].float()), name


def test_unsupported_widths(torchao: None) -> None:
    trinity = copy.deepcopy(nn.Sequential(Linear(24, (32,))))
    with pytest.raises(UserError, match=r"multiples of 16 and 0 is 32 × 24; use precision\.fp8=none"):
        use_fp8(trinity, "torchao", CPU)
