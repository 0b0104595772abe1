"""The mesh of a config, and the error messages for configs that fit none."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from trinity.config.model import ZOO, ModelConfig
from trinity.config.run import ParallelConfig
from trinity.errors import UserError
from trinity.parallel import mesh
from trinity.parallel.mesh import Sizes, check_parallel


def sizes(world: int, model: ModelConfig = ZOO["smoke"], **words: int) -> Sizes:
    """check_parallel of parallel settings."""
    return check_parallel(ParallelConfig(**words), model, world)


def test_large_as_in_the_report() -> None:
    """FSDP groups of 128, experts split among the 8 GPUs of a node, 16 replicas on 2048; 16 ranks shard each share."""
    large = sizes(2048, ZOO["large"], replicate=-1, shard=128, expert=8)
    assert large == Sizes(replicate=16, shard=128, expert=8, expert_shard=16, experts_by="experts")


@pytest.mark.parametrize(
    ("world", "words", "expected"),
    [
        (1, {}, (1, 1, 1, 1, "experts")),
        (4, {}, (1, 4, 1, 4, "experts")),
        (4, {"replicate": 2}, (2, 2, 1, 2, "experts")),
        (4, {"replicate": -1, "shard": 2, "expert": 2}, (2, 2, 2, 1, "experts")),
        (4, {"shard": 4, "expert": 4}, (1, 4, 4, 1, "experts")),
        (4, {"context": 2, "expert": 2}, (1, 4, 2, 2, "experts", 2)),  # FSDP shards over shard · context
        (4, {"context": 2, "shard": 1, "replicate": -1}, (2, 2, 1, 2, "experts", 2)),
        (8, {"context": 2, "expert": 8}, (1, 8, 8, 1, "experts", 2)),  # a group of experts spans several of context
        (32, {"expert": 2}, (1, 32, 2, 16, "width")),  # 8 experts a share, 16 ranks: 128 / 16 of each expert's width
    ],
)
def test_sizes(world: int, words: dict[str, int], expected: tuple) -> None:
    """−1 is the remaining factor; experts are sharded by width only where ranks outnumber them."""
    assert ZOO["smoke"].experts == 16
    assert ZOO["smoke"].expert_width % 16 == 0
    assert sizes(world, **words) == Sizes(*expected)


@pytest.mark.parametrize(
    ("world", "words", "sentence"),
    [
        (
            4,
            {"context": 3},
            "parallel.replicate=1 × shard=-1 × context=3 does not make 4 processes; use parallel.context=1",
        ),
        (
            4,
            {"shard": 4, "context": 2},
            "parallel.replicate=1 × shard=4 × context=2 does not make 4 processes; use parallel.shard=2",
        ),
        (
            4,
            {"context": -1},
            "parallel.context=-1 must be at least 1 (or -1, for replicate or shard alone); use parallel.context=1",
        ),
        (
            4,
            {"context": 0},
            "parallel.context=0 must be at least 1 (or -1, for replicate or shard alone); use parallel.context=1",
        ),
        (
            4,
            {"replicate": -1, "shard": -1},
            "parallel.replicate and parallel.shard are both -1 and only one can be what is left; use parallel.shard=4",
        ),
        (
            4,
            {"shard": 0},
            "parallel.shard=0 must be at least 1 (or -1, for replicate or shard alone); use parallel.shard=4",
        ),
        (
            4,
            {"expert": -1},
            "parallel.expert=-1 must be at least 1 (or -1, for replicate or shard alone); use parallel.expert=1",
        ),
        (
            4,
            {"replicate": 3},
            "parallel.replicate=3 × shard=-1 × context=1 does not make 4 processes; use parallel.replicate=1",
        ),
        (
            2,
            {"replicate": 2, "shard": 2},
            "parallel.replicate=2 × shard=2 × context=1 does not make 2 processes; use parallel.replicate=1",
        ),
        (4, {"expert": 3}, "parallel.expert=3 does not divide shard × context = 4; use parallel.expert=2"),
        (
            32,
            {"expert": 32},
            "parallel.expert=32 does not divide model.experts=16; use parallel.expert=16",
        ),
    ],
)
def test_refusals(world: int, words: dict[str, int], sentence: str) -> None:
    """Each message names the wrong value and a valid one."""
    with pytest.raises(UserError) as refused:
        sizes(world, **words)
    assert str(refused.value) == sentence


def test_neither_experts_nor_width_divide() -> None:
    """3 experts of width 20 over 8 ranks."""
    model = ModelConfig(experts=3, active_experts=2, expert_width=20)
    with pytest.raises(UserError) as refused:
        sizes(8, model)
    assert str(refused.value) == (
        "8 ranks (parallel.shard × context / expert) can divide neither the 3 experts of a share nor "
        "model.expert_width=20; use parallel.replicate=2"
    )


@pytest.mark.parametrize(
    "model", [ZOO["smoke"], ZOO["large"], ModelConfig(experts=3, active_experts=2, expert_width=20)]
)
def test_advice_is_accepted(model: ModelConfig) -> None:
    """Over a grid of configs and numbers of processes: the settings that an error message names are valid."""
    refused = 0
    for world, replicate, shard, expert, context in product(
        (1, 2, 6, 8, 24, 64, 96), (-1, 0, 1, 3), (-1, 1, 4, 128), (-1, 1, 3, 8), (1, 2, 3)
    ):
        parallel = ParallelConfig(replicate=replicate, shard=shard, expert=expert, context=context)
        try:
            check_parallel(parallel, model, world)
        except UserError as error:
            words = str(error).rpartition("; use ")[2].split()
            values = dict(word.removeprefix("parallel.").split("=") for word in words)
            changed = replace(parallel, **{name: int(value) for name, value in values.items()})
            result = check_parallel(changed, model, world)
            assert result.replicate * result.shard == world
            refused += 1
    assert refused > 500


def test_experts_do_not_matter_without_sparse_layers() -> None:
    """A dense model has no experts to shard."""
    model = ModelConfig(layers=2, dense_layers=2, experts=3, active_experts=2, expert_width=20)
    assert sizes(8, model).shard == 8


def data_and_chunk(words: dict[str, int]) -> tuple:
    """This rank's number among the data ranks, their number, and its columns of a row of 24 tokens."""
    ranks = mesh.join_meshes(sizes(dist.get_world_size(), **words), torch.device("cpu"))
    columns = ranks.columns(24)
    return ranks.data_rank, ranks.data_ranks, (columns.start, columns.stop)


def test_neighbours_have_chunks_of_the_same_rows(processes) -> None:
    """The context group is innermost in the order of ranks."""
    assert processes(4).run(data_and_chunk, {"context": 2}) == [
        (0, 2, (0, 12)), (0, 2, (12, 24)), (1, 2, (0, 12)), (1, 2, (12, 24)),
    ]  # fmt: skip
    assert processes(4).run(data_and_chunk, {"context": 4}) == [
        (0, 1, (0, 6)), (0, 1, (6, 12)), (0, 1, (12, 18)), (0, 1, (18, 24)),
    ]  # fmt: skip
    assert processes(2).run(data_and_chunk, {}) == [(0, 2, (0, 24)), (1, 2, (0, 24))]


def coordinates(words: dict[str, int]) -> tuple:
    """This rank's coordinates in both meshes."""
    ranks = mesh.join_meshes(sizes(dist.get_world_size(), **words), torch.device("cpu"))
    return ranks.rank, tuple(ranks.dense.get_coordinate()), tuple(ranks.experts.get_coordinate())


def test_coordinates_of_both_meshes(processes) -> None:
    """rank = replica · 2 + coordinate in shard; neighbours split the experts."""
    assert processes(4).run(coordinates, {"replicate": 2, "shard": 2, "expert": 2}) == [
        (0, (0, 0), (0, 0, 0)),
        (1, (0, 1), (0, 0, 1)),
        (2, (1, 0), (1, 0, 0)),
        (3, (1, 1), (1, 0, 1)),
    ]
    assert processes(4).run(coordinates, {"shard": 4, "expert": 2}) == [
        (0, (0, 0), (0, 0, 0)),
        (1, (0, 1), (0, 0, 1)),
        (2, (0, 2), (0, 1, 0)),
        (3, (0, 3), (0, 1, 1)),
    ]
