"""Peak memory of a step, with sizes that make each moment in turn the peak."""

from itertools import product

import pytest

from trinity.config.model import ModelConfig
from trinity.config.run import ParallelConfig, RunConfig
from trinity.models.param_roles import parameter_roles
from trinity.parallel.mesh import check_parallel
from trinity.planning.activations import Activations
from trinity.planning.fake_rank import FakeRank, FsdpGroup, fake_rank, state_bytes
from trinity.planning.memory import peak_moment, unreduced_gradients

NAMES = ["the embedding", "block 0", "block 1", "block 2", "block 3", "the head"]
PARTS = [["embed"], ["blocks.0"], ["blocks.1"], ["blocks.2"], ["blocks.3"], ["norm", "head"]]
MUCH = 10**9
KEPT = [100, 200, 300, 400, 500, 600]


def size_of(groups: list[FsdpGroup], field: str, part: int) -> float:
    """Sum over the groups of one part; 0 beyond the first and last part."""
    names = PARTS[part] if 0 <= part < len(PARTS) else []
    return sum(getattr(group, field) for group in groups if group.part in names)


def test_each_moment(tiny: ModelConfig) -> None:
    """Forward and backward of every part, with one and with three microbatches."""
    config = RunConfig(model=tiny, parallel=ParallelConfig(shard=2))
    with fake_rank(config, check_parallel(config.parallel, tiny, 2)) as rank:
        for part, backward, microbatches in product(range(6), (False, True), (1, 3)):
            check_moment(rank, part, backward, microbatches)


def check_moment(rank: FakeRank, part: int, backward: bool, microbatches: int) -> None:
    """By hand: saved activations, weights of this part and a neighbour, gradients in flight and done."""
    work = [Activations(kept, kept, 0) for kept in KEPT]
    work[part] = work[part]._replace(**{"backward": MUCH} if backward else {"forward": MUCH + KEPT[part]})
    peak = peak_moment(rank, work, microbatches, unreduced=0.0)
    assert peak.moment == f"{'backward' if backward else 'forward'} of {NAMES[part]}"
    gathered, reduced = ([size_of(rank.groups, field, i) for i in range(-1, 7)] for field in ("gathered", "reduced"))
    state = state_bytes(rank.model, rank.optimizers)
    gradients = state.pop("gradients")
    reduced_share = sum(reduced[part + 1 :]) / sum(reduced)  # all parts are cut in two
    expected = state | {
        "gradients": gradients if microbatches > 1 else gradients * reduced_share if backward else 0,
        "gathered weights": gathered[part + 1] + gathered[part if backward else part + 2],
        "activations": sum(KEPT[: part + 1]),
        f"work of {NAMES[part]}": MUCH,
    }
    if backward:
        expected["whole gradients being reduced"] = reduced[part + 1] + reduced[part + 2]
    assert peak.parts == pytest.approx(expected, rel=1e-12)
    assert peak.total == pytest.approx(sum(expected.values()), rel=1e-12)


def test_one_rank_holds_a_cast_of_its_matrices(tiny: ModelConfig) -> None:
    """Without sharding, the bf16 weights stay; norms and routers have none, being fp32; no gradient is held twice."""
    with fake_rank(RunConfig(model=tiny), check_parallel(ParallelConfig(), tiny, 1)) as rank:
        peak = peak_moment(rank, [Activations(0, 0, MUCH)] * 6, 1, 0.0)
        cast = [role.parameter.numel() for role in parameter_roles(rank.model) if role.kind not in ("gain", "router")]
    assert peak.parts["gathered weights"] == 2 * sum(cast)
    assert peak.parts["whole gradients being reduced"] == 0


def test_update(tiny: ModelConfig) -> None:
    """Without activations, the optimizers' step is the peak: six times its largest matrix batch, in fp32.

    The batch has the gate and up matrices of the experts, 3·2·6, and of the shared experts, 3·2, each [10, 24].
    """
    with fake_rank(RunConfig(model=tiny), check_parallel(ParallelConfig(), tiny, 1)) as rank:
        small = rank._replace(groups=[group._replace(gathered=0, reduced=1) for group in rank.groups])
        peak = peak_moment(small, [Activations(0, 0, 0)] * 6, 1, 0.0)
    assert peak.moment == "update"
    assert peak.parts["update of the largest matrices"] == 6 * 4 * 42 * 240


def test_unreduced(tiny: ModelConfig) -> None:
    """Two ranks that split the experts keep all dense gradients and half of the experts', in fp32.

    Reduced, half of the dense gradients would be left, and the same of the experts: each rank has its own.
    """
    config = RunConfig(model=tiny, parallel=ParallelConfig(shard=2, expert=2))
    experts = 3 * 6 * 3 * 10 * 24
    with fake_rank(config, check_parallel(config.parallel, tiny, 2)) as rank:
        parameters = sum(p.numel() for p in rank.model.parameters())
        whole, more = 4 * (parameters - experts / 2), 4 * (parameters - experts) / 2
        kept = {
            (setting, microbatches, room): unreduced_gradients(rank, setting, microbatches, room * more)
            for setting, microbatches, room in CASES
        }
        peak = peak_moment(rank, [Activations(0, MUCH, 0)] * 6, 3, whole)
    assert kept == {case: whole * deferred for case, deferred in CASES.items()}
    assert peak.parts["gradients"] == whole
    with fake_rank(RunConfig(model=tiny), check_parallel(ParallelConfig(), tiny, 1)) as rank:
        assert unreduced_gradients(rank, "auto", 2, 1.0) == 4 * parameters  # no more than reduced ones on one rank


# defer_reduce, microbatches, device memory in multiples of what deferring adds → deferred; the limit is a quarter
CASES = {
    ("auto", 2, 4.0): True,
    ("auto", 2, 3.9): False,
    ("auto", 1, 4.0): False,
    ("on", 2, 1.0): True,
    ("on", 1, 1.0): False,
    ("off", 2, 100.0): False,
}
