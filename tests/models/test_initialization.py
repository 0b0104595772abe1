"""Initial values: their distribution, and that they depend on seed, name and index alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from trinity.config.model import ModelConfig
from trinity.models import Trinity, initialization, parameter_roles
from trinity.models import trinity as trinity_module
from trinity.models.initialization import _fill, _signed, _splitmix64, truncated_normal

TAIL = 0.5 * math.erfc(3 / math.sqrt(2))  # of a normal distribution, beyond 3 on one side
DENSITY_AT_3 = math.exp(-4.5) / math.sqrt(2 * math.pi)
STD_AFTER_CUT = math.sqrt(1 - 2 * 3 * DENSITY_AT_3 / (1 - 2 * TAIL))


def weights(model: Trinity) -> dict[str, Tensor]:
    """The parameters with random initial values."""
    return {role.name: role.parameter.detach() for role in parameter_roles(model) if role.kind != "gain"}


def test_the_standard_deviation_after_truncation_is_the_reports() -> None:
    assert round(STD_AFTER_CUT, 4) == 0.9866


def test_weights_are_truncated_normal_numbers(tiny: ModelConfig) -> None:
    """Deviation and mean of each tensor within five standard errors of n draws, which are σ/√(2n) and σ/√n.

    (A truncated distribution has lighter tails, so its errors are smaller.) Chance misses this once in a million; the
    seed is fixed, so it does not. The largest is at most 3σ, rounded to fp32.
    """
    config = replace(tiny, width=64)
    model = Trinity(config)
    model.init_weights(seed=0)
    sigma = 0.5 / math.sqrt(64)
    for name, weight in weights(model).items():
        n, values = weight.numel(), weight.double()
        assert abs(values.std().item() / sigma - STD_AFTER_CUT) <= 5 / math.sqrt(2 * n), name
        assert abs(values.mean().item() / sigma) <= 5 / math.sqrt(n), name
        assert values.abs().max().item() <= torch.tensor(3 * sigma).item(), name


def test_gains_and_buffers(tiny: ModelConfig) -> None:
    """Norms before a sublayer, inside attention and at the end begin at 1, those after a sublayer at 1/√L."""
    model = Trinity(tiny)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7.0)  # as to_empty may leave it
    model.init_weights(seed=0)
    gains = {role.name: role.parameter for role in parameter_roles(model) if role.kind == "gain"}
    assert len(gains) == 5 * 6 + 1
    for name, gain in gains.items():
        expected = torch.full_like(gain, 5**-0.5 if "_post_norm" in name else 1.0)
        assert torch.equal(gain, expected), name
    buffers = dict(model.named_buffers())
    assert sorted(buffers) == [
        f"blocks.{layer}.ffn.expert_{what}" for layer in (1, 2, 3, 4) for what in ("bias", "momentum")
    ]
    for buffer in buffers.values():
        assert torch.equal(buffer, torch.zeros(6, dtype=torch.float32))


def test_a_new_model_is_initialised_with_seed_0(tiny: ModelConfig) -> None:
    """In fresh memory full of NaN: the bits of init_weights(0)."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        new, again = Trinity(tiny), Trinity(tiny)
    finally:
        torch.use_deterministic_algorithms(False)
    again.init_weights(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values()))
    assert new(torch.arange(12).view(1, 12)).isfinite().all()


def test_nothing_is_computed_on_the_meta_device(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of any size costs nothing there; its values are filled in later."""
    monkeypatch.setattr(trinity_module, "initialize", lambda *_: pytest.fail("initialised on the meta device"))
    with torch.device("meta"):
        model = Trinity(tiny)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_depends_on_the_seed_alone(tiny: ModelConfig) -> None:
    """The same bits over other garbage and after other draws; another seed changes nearly every value."""
    first, again, other = Trinity(tiny), Trinity(tiny), Trinity(tiny)
    first.init_weights(seed=3)
    torch.manual_seed(5)
    for parameter in again.parameters():
        parameter.data.fill_(torch.nan)
    again.init_weights(seed=3)
    other.init_weights(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    for name, weight in weights(first).items():
        assert (weight != weights(other)[name]).float().mean() > 0.99, name


def test_no_two_tensors_or_experts_share_values(tiny: ModelConfig) -> None:
    """Layers of one shape, and the experts of one tensor, are drawn from sequences of their own."""
    model = Trinity(tiny)
    model.init_weights(seed=0)
    heads = []
    for name, weight in weights(model).items():
        units = weight if ".experts." in name else [weight]
        heads.extend(tuple(unit.flatten()[:4].tolist()) for unit in units)
    assert len(set(heads)) == len(heads) == 2 + 5 * 2 + 2 + 4 * (3 + 2 * 6)


def test_a_wider_model_of_the_same_names_differs_only_in_scale(tiny: ModelConfig) -> None:
    """σ = 0.5/√d: the router's first row in a model four times as wide starts with half the values."""
    narrow, wide = Trinity(tiny), Trinity(replace(tiny, width=4 * tiny.width))
    narrow.init_weights(seed=0)
    wide.init_weights(seed=0)
    first, second = (model.blocks[1].ffn.router.weight[0, :24] for model in (narrow, wide))
    assert torch.equal(first, 2 * second)


@pytest.mark.parametrize("chunk", [1, 17, 10_000])
def test_chunk_size_has_no_effect(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A tensor of many chunks and a remainder has the bits of one chunk."""
    shapes = {1: (3, 7), 17: (50, 24), 10_000: (200, 120)}
    whole, pieces = torch.empty(shapes[chunk]), torch.empty(shapes[chunk])
    _fill(whole, "some.weight", 0, 0.1, by_expert=False)
    monkeypatch.setattr(initialization, "_CHUNK", chunk)
    _fill(pieces, "some.weight", 0, 0.1, by_expert=False)
    assert torch.equal(whole, pieces)


@pytest.fixture
def as_rank() -> Iterator[Callable[[int], None]]:
    """A function that makes this process rank r of 4, without the other three; nothing here communicates."""

    def become(rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


LAYOUTS = [
    ((10, 6), False, (4,), (Shard(0),)),
    ((10, 6), False, (4,), (Shard(1),)),
    ((10, 6), False, (2, 2), (Replicate(), Shard(0))),
    ((10, 6), False, (2, 2), (Shard(0), Shard(1))),
    ((8, 2, 5, 3), True, (4,), (Shard(0),)),
    ((8, 2, 5, 3), True, (2, 2), (Shard(0), Shard(0))),
    ((6, 2, 5, 3), True, (4,), (Shard(0),)),
    ((3, 5, 8), True, (4,), (Shard(2),)),
    ((3, 2, 8, 5), True, (4,), (Shard(2),)),
]


@pytest.mark.parametrize(("shape", "by_expert", "mesh_shape", "placements"), LAYOUTS)
def test_each_rank_computes_its_part_of_the_same_tensor(
    shape: tuple[int, ...],
    by_expert: bool,
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    as_rank: Callable[[int], None],
) -> None:
    """On any mesh: rows, columns, experts, parts of experts, uneven and empty parts; compared bit for bit."""
    whole = torch.empty(shape)
    _fill(whole, "some.weight", 0, 0.1, by_expert)
    for rank in range(4):
        as_rank(rank)
        mesh = init_device_mesh("cpu", mesh_shape)
        expected = whole
        for dimension, placement in enumerate(placements):
            if isinstance(placement, Shard):
                parts = torch.chunk(expected, mesh_shape[dimension], dim=placement.dim)
                place = mesh.get_coordinate()[dimension]
                expected = parts[place] if place < len(parts) else expected.narrow(placement.dim, 0, 0)
        local = torch.full(expected.shape, torch.nan)
        stride = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
        _fill(sharded, "some.weight", 0, 0.1, by_expert)
        assert torch.equal(local, expected), f"rank {rank}"


def test_distribution() -> None:
    """Kolmogorov-Smirnov: a million draws stay within 0.0027 of the CDF; chance exceeds it once in a million times."""
    n = 1_000_000
    draws = truncated_normal(-12345, torch.arange(n)).sort().values
    cdf = (0.5 * torch.erfc(-draws / math.sqrt(2)) - TAIL) / (1 - 2 * TAIL)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - cdf).abs().max(), (cdf - steps[:-1]).abs().max()).item()
    assert distance < math.sqrt(-math.log(1e-6 / 2) / (2 * n))
    assert draws.abs().max().item() <= 3.0
    assert draws.abs().max().item() > 2.999  # the tails are there: 1e6 draws come this close to the cut


@pytest.mark.parametrize(("key", "other"), [(0, 1), (7, -7), (2**62, -(2**62))])
def test_sequences_are_independent(key: int, other: int) -> None:
    """Two keys, and neighbours of one key: correlation of n pairs is within 5/√n of 0."""
    n = 1_000_000
    a, b = truncated_normal(key, torch.arange(n)), truncated_normal(other, torch.arange(n))
    for first, second in ((a, b), (a[1:], a[:-1]), (a[1:], b[:-1])):
        assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1].item()) < 5 / math.sqrt(n)


def test_splitmix64() -> None:
    """Published values for start 0; for other starts the definition with Python integers, wrap-around included."""

    def plain(state: int) -> int:
        mask = 2**64 - 1
        z = state & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    first = [_signed(value) for value in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)]
    assert _splitmix64(0, torch.arange(3)).tolist() == first
    key, index = -987654321, torch.tensor([0, 5, 2**31, 2**40, 2**62])
    expected = [_signed(plain((i + 1) * 0x9E3779B97F4A7C15 + key)) for i in index.tolist()]
    assert _splitmix64(key, index).tolist() == expected
