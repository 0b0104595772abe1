"""The protocol of bench.py tune, with a fake op; and the experts' kernels through it, under the interpreter."""

import ast
import sys
from types import ModuleType

import pytest
import torch
from benchmarks import expert_tiles, timing, tune
from benchmarks.expert_tiles import CASES, TUNABLE, Kernel
from benchmarks.experts import Case

from trinity.errors import UserError
from trinity_kernels import experts_triton, grouped_gemm_triton
from trinity_kernels.grouped_gemm_triton import Tile


class FakeKernel:
    """A kernel whose time is the number of its tile; 0 does not fit the device."""

    chosen = (64, 4)

    def __init__(self, *candidates: tuple[int, int]) -> None:
        self.candidates = list(candidates)
        self.calls: list[tuple[int, int]] = []

    def run(self, candidate: tuple[int, int]) -> None:
        self.calls.append(candidate)
        if candidate[0] == 0:
            raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's seconds are its tile's first number."""

    def parts_of(call) -> list[float]:
        call(None)
        return [float(call.__closure__[0].cell_contents[0])]

    monkeypatch.setattr(timing, "parts_of", parts_of)


def test_the_fastest_is_written(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trinity_kernels.fake_triton")
    module.TUNABLE = {"one": FakeKernel((64, 4), (32, 8), (0, 1)), "two": FakeKernel((0, 1))}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    results = tune.run(quick=True, op="fake")
    one, two = results["kernels"].values()
    assert one["best"] == "(32, 8)"
    assert one["chosen"] == "(64, 4)"
    assert one["tiles"]["(0, 1)"] == {"failed": "RuntimeError: out of resource: shared memory"}
    assert two["best"] is None
    assert module.TUNABLE["one"].calls.count((32, 8)) == 3  # one warms up
    lines = tune.table(results).splitlines()
    assert "| one | (64, 4) (now) | 64000.000 | 2.00 |" in lines
    assert ast.literal_eval(tune.literal(results).removeprefix("BEST = ")) == {"one": (32, 8)}


def test_no_candidate_runs(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a GPU: a sentence with the reason, and no table to paste."""
    module = ModuleType("trinity_kernels.fake_triton")
    module.TUNABLE = {"one": FakeKernel((0, 1), (0, 2))}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(UserError, match=r"no candidate of fake runs here \(RuntimeError: out of resource.*NVIDIA GPU"):
        tune.run(quick=True, op="fake")


def test_ops_without_tiles() -> None:
    with pytest.raises(UserError, match=r"needs the module trinity_kernels\.nothing_triton.*ops to tune: experts"):
        tune.tunables("nothing")
    with pytest.raises(UserError, match=r"trinity_kernels\.grouping_triton has no TUNABLE"):
        tune.tunables("grouping")


def test_the_experts_kernels_take_the_candidate() -> None:
    """Each of the six runs with the tile it is given, and the table is restored afterwards."""
    case, tile = Case(16, 8, 4, 2, 16, 1), Tile(16, 32, 16, 4, 2)
    tables = [
        (experts_triton, "up_tile"), (experts_triton, "dpre_tile"),
        (grouped_gemm_triton, "matmul_tile"), (grouped_gemm_triton, "outer_tile"),
    ]  # fmt: skip
    before = [getattr(owner, name) for owner, name in tables]
    for name in ("up", "down", "dpre", "dX", "dW1", "dW2"):
        kernel = Kernel(name, case)
        kernel.run(tile)
        assert isinstance(kernel.chosen, Tile)
        function = expert_tiles._calls(case)[name][2]
        assert function in {"up": "up_tile", "dpre": "dpre_tile"}.get(name, "matmul_tile outer_tile")
        with pytest.raises(AttributeError):
            kernel.run(None)  # without a tile nothing runs: the candidate is what is used
    assert before == [getattr(owner, name) for owner, name in tables]


def test_every_model_has_its_six() -> None:
    assert len(TUNABLE) == 6 * len(CASES)
    for kernel in TUNABLE.values():
        assert len({repr(candidate) for candidate in kernel.candidates}) == len(kernel.candidates) > 10
    if torch.cuda.is_available():
        assert all(kernel.chosen in kernel.candidates for kernel in TUNABLE.values())
