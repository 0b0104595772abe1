"""Tests that need a GPU: one CUDA graph replayed with other routing, and addresses beyond 2³¹.

Shapes: T tokens, K active experts.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, assert_close
from trinity_kernels import expert_mlp, experts_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def inputs(T: int, K: int, E: int, D: int, F: int) -> list[Tensor]:
    random = torch.Generator("cuda").manual_seed(0)
    shapes = [(T, D), (E, 2, F, D), (E, D, F)]
    tensors = [torch.randn(shape, generator=random, device="cuda").bfloat16() / 8 for shape in shapes]
    indices_TK = torch.rand(T, E, generator=random, device="cuda").argsort(dim=1)[:, :K].contiguous()
    return [*tensors, indices_TK, torch.rand(T, K, generator=random, device="cuda")]


def test_one_cuda_graph_for_any_routing() -> None:
    """Shapes do not depend on the routing and the host does not wait: captured once, replayed with other choices."""
    x, w1, w2, indices, s = inputs(512, 2, 8, 256, 128)
    expert_mlp.triton(x, w1, w2, indices, s)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = expert_mlp.triton(x, w1, w2, indices, s)
    for other in (indices.flip(0), torch.zeros_like(indices), (indices + 3) % 8):
        indices.copy_(other.clone())
        graph.replay()
        assert_close(y, expert_mlp.reference(x.double(), w1.double(), w2.double(), indices, s.double()), 1e-2)


def test_rows_beyond_two_to_the_31() -> None:
    """R·2F is 2³¹ and a few rows: the last rows' pre-activations and sums are right."""
    R, F = 2**31 // (2 * 2048) + 3, 2048
    x, w1, _, _, _ = inputs(64, 1, 2, 64, F)
    order = (torch.arange(R, device="cuda") % 64).to(torch.int32)
    ends = torch.tensor([R // 2, R], device="cuda", dtype=torch.int32)
    pre, _ = experts_triton.up(x, w1, order, ends, 1, keep_pre=True)
    last = x[order[-3:].long()].double() @ w1[1].flatten(0, 1).double().t()
    assert_close(pre[-3:], last, BOUNDS[torch.bfloat16])
