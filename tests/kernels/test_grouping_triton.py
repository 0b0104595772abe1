"""Grouping of rows and tables of tiles: Triton with the reference, the reference with Python's stable sort.

Integers: equal, without tolerance.

Shapes: T tokens, E experts, K active experts, R rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.triton_case import DEVICE
from trinity_kernels import group_rows, tile_table
from trinity_kernels.grouping import table_length

CASES = [
    (1, 1, 7), (4, 4, 65), (4, 1, 0), (4, 2, 1), (7, 3, 129), (128, 8, 63), (128, 8, 129), (256, 4, 64), (256, 1, 1),
]  # fmt: skip


def choices(E: int, K: int, T: int, remote_share: float = 0.0) -> tuple[Tensor, int]:
    """[T, K] distinct choices, a share of them set to −1, and the number of the others."""
    random = torch.Generator().manual_seed(1000 * E + 100 * K + T)
    indices_TK = torch.rand(T, E, generator=random).argsort(dim=1)[:, :K]
    indices_TK = indices_TK.where(torch.rand(T, K, generator=random) >= remote_share, -1)
    return indices_TK.to(DEVICE), int((indices_TK >= 0).sum())


@pytest.mark.parametrize("remote_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("E", "K", "T"), CASES)
def test_rows_follow_a_stable_sort(E: int, K: int, T: int, remote_share: float) -> None:
    indices_TK, rows = choices(E, K, T, remote_share)
    flat = indices_TK.flatten().tolist()
    expected = sorted((c for c in range(T * K) if flat[c] >= 0), key=lambda c: flat[c])
    for implementation in (group_rows.reference, group_rows.triton):
        order_R, place_TK, ends_E = implementation(indices_TK, E, rows)
        assert order_R.dtype == place_TK.dtype == ends_E.dtype == torch.int32
        assert order_R.tolist() == expected
        assert place_TK.flatten().tolist() == [expected.index(c) if flat[c] >= 0 else -1 for c in range(T * K)]
        assert ends_E.tolist() == [sum(0 <= e <= expert for e in flat) for expert in range(E)]


@pytest.mark.parametrize("hot", [0, 2, 3])
def test_all_choices_on_one_expert(hot: int) -> None:
    indices_TK = torch.full((200, 1), hot, device=DEVICE)
    for implementation in (group_rows.reference, group_rows.triton):
        order_R, place_TK, ends_E = implementation(indices_TK, 4, 200)
        assert order_R.tolist() == place_TK.flatten().tolist() == list(range(200))
        assert ends_E.tolist() == [200 * (e >= hot) for e in range(4)]


def plain_table(ends: list[int], rows: int, block: int) -> list[list[int]]:
    """The table by its description."""
    starts = [0, *ends[:-1]]
    table = []
    for e in sorted(range(len(ends)), key=lambda e: starts[e] - ends[e]):  # Python's sort is stable
        table += [[e, first, ends[e]] for first in range(starts[e], ends[e], block)]
    return table + [[-1, -1, -1]] * (-(-rows // block) + len(ends) - len(table))


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(
    "sizes", [[5], [0, 0, 0], [3, 3, 3], [0, 300, 1, 16, 17, 0], [2500, 0, 7], list(range(40)), [1] * 256]
)
def test_tiles_cover_every_row_once_fullest_expert_first(sizes: list[int], block: int) -> None:
    """2500 rows in tiles of 16 are more than the 128 that one store writes."""
    ends_E = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    expected = plain_table(ends_E.tolist(), sum(sizes), block)
    for implementation in (tile_table.reference, tile_table.triton):
        table = implementation(ends_E, sum(sizes), block)
        assert table.dtype == torch.int32
        assert len(table) == table_length(sum(sizes), block, len(sizes))
        assert table.tolist() == expected


class NoHostSync(TorchDispatchMode):
    """Fails on operations that make the host wait for a GPU: reading values, counting a mask, tensors of numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "bincount"), name
        assert not masks, "indexed by a mask"
        return func(*args, **(kwargs or {}))


def test_the_references_do_not_wait_for_a_device() -> None:
    """The references also run on a GPU. Four operations that do wait show that the mode works."""
    indices_TK, rows = choices(7, 3, 20, 0.4)
    for waits in (lambda x: x[0, 0].item(), Tensor.nonzero, lambda x: x[x > 0], lambda x: x.new_tensor(1)):
        with pytest.raises(AssertionError), NoHostSync():
            waits(indices_TK)
    with NoHostSync():
        groups = group_rows.reference(indices_TK, 7, rows)
        tile_table.reference(groups.ends_E, rows, 16)


def test_repetition_gives_the_same_bits() -> None:
    """With more than one block of choices, so that an order among blocks would show."""
    indices_TK, rows = choices(16, 4, 129, 0.4)
    for implementation in (group_rows.reference, group_rows.triton):
        first, second = (implementation(indices_TK, 16, rows) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_choices_of_any_strides() -> None:
    """Every other column of a larger tensor, as a slice leaves it."""
    indices_TK, rows = choices(16, 4, 65)
    strided_TK = torch.stack((indices_TK, indices_TK.new_full(indices_TK.shape, 3)), dim=2).flatten(1)[:, ::2]
    assert not strided_TK.is_contiguous()
    for implementation in (group_rows.reference, group_rows.triton):
        assert all(map(torch.equal, implementation(strided_TK, 16, rows), implementation(indices_TK, 16, rows)))
