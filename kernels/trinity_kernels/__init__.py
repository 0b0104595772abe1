"""Compute-heavy operations, each with a torch reference and most with Triton kernels; imports nothing of `trinity`.

`op(…)` picks an implementation, `op.reference(…)` is the torch one, `op.triton(…)` the Triton one.
"""

from trinity_kernels.combine import combine
from trinity_kernels.cross_entropy import linear_cross_entropy
from trinity_kernels.experts import expert_mlp
from trinity_kernels.gate import sigmoid_gate
from trinity_kernels.grouped_gemm import grouped_linear, grouped_matmul, grouped_outer
from trinity_kernels.grouping import group_rows, tile_table
from trinity_kernels.linear import linear
from trinity_kernels.norm import add_norm, norm_add, rms_norm
from trinity_kernels.qk_norm import qk_norm
from trinity_kernels.router_scores import router_scores
from trinity_kernels.routing import route, weigh
from trinity_kernels.split import split_projection
from trinity_kernels.swiglu import swiglu

__all__ = [
    "add_norm",
    "combine",
    "expert_mlp",
    "group_rows",
    "grouped_linear",
    "grouped_matmul",
    "grouped_outer",
    "linear",
    "linear_cross_entropy",
    "norm_add",
    "qk_norm",
    "rms_norm",
    "route",
    "router_scores",
    "sigmoid_gate",
    "split_projection",
    "swiglu",
    "tile_table",
    "weigh",
]
