"""Tunable kernels of the experts: six products at the sizes of Nano, Mini and Large, 32,768 tokens, in bf16.

The tensors of one kernel and model are created at its first call and freed when another one runs.

Shapes: T tokens, E experts, K active experts, R = T·K rows.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from benchmarks.experts import CUDA_CASES, Case, balanced_routing
from benchmarks.timing import device

CASES = {"Nano": CUDA_CASES["Nano"], "Mini": CUDA_CASES["Mini"], "Large": CUDA_CASES["Large, 512 tokens an expert"]}


def candidates(kernel: str) -> list[Any]:
    """Tiles that compile for sm_90, and neighbours of those; one that spills or does not fit is slow or fails."""
    from trinity_kernels.grouped_gemm_triton import Tile

    shapes = {
        "up": [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 128, 8)],
        "dpre": [(64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    }.get(kernel, [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 256, 4), (64, 128, 4)])
    parts = (1, 2, 4) if kernel == "dpre" else (1,)
    return [
        Tile(m, n, k, warps, stages, part)
        for m, n, warps in shapes for k in (32, 64) for stages in (3, 4) for part in parts
    ]  # fmt: skip


class Kernel:
    """One kernel of the experts at one model's sizes; see benchmarks.tune."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.candidates = candidates(name)

    def run(self, candidate: Any) -> None:
        """One call with this tile instead of the table's."""
        from trinity_kernels import experts_triton, grouped_gemm_triton

        call, module, function = _calls(self.case)[self.name]
        owner = {"experts": experts_triton, "grouped_gemm": grouped_gemm_triton}[module]
        table = getattr(owner, function)
        setattr(owner, function, lambda *_: candidate)
        try:
            call()
        finally:
            setattr(owner, function, table)

    @property
    def chosen(self) -> Any:
        """The tile that the table picks."""
        from trinity_kernels import experts_triton, grouped_gemm_triton

        D, F, dtype = self.case.D, self.case.F, _dtype()
        return {
            "up": lambda: experts_triton.up_tile(D, F, dtype),
            "dpre": lambda: experts_triton.dpre_tile(D, F, dtype),
            "down": lambda: grouped_gemm_triton.matmul_tile(D, F, dtype),
            "dX": lambda: grouped_gemm_triton.matmul_tile(D, 2 * F, dtype),
            "dW1": lambda: grouped_gemm_triton.outer_tile(2 * F, D, dtype),
            "dW2": lambda: grouped_gemm_triton.outer_tile(D, F, dtype),
        }[self.name]()


def _dtype() -> torch.dtype:
    """bf16; fp32 without a GPU, where tests interpret the kernels."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@lru_cache(maxsize=1)
def _calls(case: Case) -> dict[str, tuple[Callable[[], object], str, str]]:
    """Each kernel's call, and the module and function of the table that picks its tile."""
    from trinity_kernels.experts_triton import dpre, up
    from trinity_kernels.grouped_gemm_triton import matmul, outer
    from trinity_kernels.grouping import group_rows

    D, F, E, K, T, _ = case
    R = T * K

    where, dtype = device(), _dtype()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=where, dtype=dtype)

    groups = group_rows.triton(balanced_routing(T, E, K).to(where), E, R)
    order, place, ends = groups.order_R, groups.place_TK, groups.ends_E
    x, w1, w2, s = normal(T, D), normal(E, 2, F, D) / D**0.5, normal(E, D, F), torch.rand(T, K, device=where)
    pre, act = normal(R, 2 * F), normal(R, F)
    return {
        "up": (lambda: up(x, w1, order, ends, K, True), "experts", "up_tile"),
        "down": (lambda: matmul(act, w2, ends, transpose=True), "grouped_gemm", "matmul_tile"),
        "dpre": (lambda: dpre(x, w2, pre, s, order, place, ends), "experts", "dpre_tile"),
        "dX": (lambda: matmul(pre, w1.flatten(1, 2), ends, transpose=False), "grouped_gemm", "matmul_tile"),
        "dW1": (lambda: outer(pre, x, ends, order, K, "right"), "grouped_gemm", "outer_tile"),
        "dW2": (lambda: outer(x, act, ends, order, K, "left"), "grouped_gemm", "outer_tile"),
    }


TUNABLE = {
    f"{model}, {name}": Kernel(name, case)
    for model, case in CASES.items() for name in ("up", "down", "dpre", "dX", "dW1", "dW2")
}  # fmt: skip
