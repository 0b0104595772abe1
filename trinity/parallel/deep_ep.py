"""Expert parallelism by DeepEP's dispatch and combine kernels (github.com/deepseek-ai/DeepEP).

Written from DeepEP's documentation of `Buffer` (1.x; 2.x keeps it as its legacy interface) and NOT RUN on a GPU by this
project: the tests replace its kernels. Measure it, and compare its gradients with those of all_to_all, before relying
on it. It takes bf16 tokens, over NVLink and RDMA; sends a token once to a rank; waits on the host for the counts inside
`dispatch`; overlaps the shared expert in forward, nothing in backward; and adds the shared expert's output inside
`combine` (its `bias`, which the first versions lack). Recompute cannot see DeepEP's calls: both kinds exchange again,
along the same routes, and rely on rows arriving in the same order.

Its `num_worst_tokens` removes the wait, but not the need for the number of choices, by which the experts' rows are
allocated; see trinity/parallel/README.md.

Combine is the adjoint of dispatch: gradients of tokens are combined, and gradients of sums are dispatched with the
handle of the forward pass.

Shapes: T tokens of this rank, U tokens received, D width, K active experts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.errors import UserError
from trinity.models.moe import Padding, RunExperts


def check_deep_ep(dtype: torch.dtype, device: str) -> None:
    """Refuse DeepEP where it cannot run, before a model is built.

    Args:
        dtype: of the dispatched tokens.
        device: type of the device.
    Raises:
        UserError: the package is not installed, or the tokens are not bf16 on a GPU.
    """
    _check_installed()
    _check_tokens(dtype, device)


class DeepEP:
    """The Dispatcher for experts split over a process group, by DeepEP's kernels.

    Args:
        group: the ranks that hold the experts, each an equal share, in order.
        experts: number of experts of a layer, over all ranks.
    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        _check_installed()
        self.group, self.experts = group, experts
        self._buffer: Any = None

    @torch.compiler.disable
    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, shared: Callable[[], Tensor],
        padding: Padding | None = None,
    ) -> Tensor:  # fmt: skip
        """See trinity.models.moe.Dispatcher; every rank of the group calls it."""
        exchange = SimpleNamespace(buffer=self._buffer_for(x_TD), experts=self.experts)
        x_UD, gates_UK = _Dispatch.apply(x_TD, gates_TK, indices_TK, exchange)
        shared_TD = shared()
        exchange.event.current_stream_wait()
        y_UD = experts(x_UD, exchange.indices_UK, gates_UK, exchange.choices_received)
        return _Combine.apply(y_UD, shared_TD, exchange)

    def _buffer_for(self, x_TD: Tensor) -> Any:
        """The buffer of all layers, of the size that DeepEP recommends for these rows."""
        _check_tokens(x_TD.dtype, x_TD.device.type)
        if self._buffer is None:
            from deep_ep import Buffer

            ranks, row = self.group.size(), x_TD.shape[1] * x_TD.element_size()
            configs = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
            nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
            self._buffer = Buffer(self.group, nvlink, rdma)
        return self._buffer


def _check_installed() -> None:
    if find_spec("deep_ep") is None:
        raise UserError(
            "parallel.exchange=deep_ep needs the package deep_ep, built from github.com/deepseek-ai/DeepEP; "
            "install it or use parallel.exchange=all_to_all"
        )


def _check_tokens(dtype: torch.dtype, device: str) -> None:
    if device != "cuda" or dtype != torch.bfloat16:
        raise UserError(
            f"parallel.exchange=deep_ep takes bfloat16 on a GPU, not {dtype} on {device}; "
            "use precision.compute=bfloat16 or parallel.exchange=all_to_all"
        )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, exchange: SimpleNamespace
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        per_rank, per_node, per_expert, is_sent, _ = exchange.buffer.get_dispatch_layout(indices_TK, exchange.experts)
        # received indices count this rank's experts from 0; −1 marks experts of other ranks
        x_UD, exchange.indices_UK, gates_UK, received, exchange.handle, exchange.event = exchange.buffer.dispatch(
            x_TD, topk_idx=indices_TK, topk_weights=gates_TK, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_sent, num_tokens_per_expert=per_expert,
            async_finish=True,
        )  # fmt: skip
        exchange.choices_received = sum(received)
        return x_UD, gates_UK

    @staticmethod
    def backward(ctx, grad_UD: Tensor, grad_UK: Tensor) -> tuple[Tensor, Tensor, None, None]:
        exchange = ctx.exchange
        grad_x, grad_gates, _ = exchange.buffer.combine(
            grad_UD.contiguous(), exchange.handle, topk_weights=grad_UK.contiguous()
        )
        return grad_x, grad_gates, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_UD: Tensor, shared_TD: Tensor, exchange: SimpleNamespace) -> Tensor:
        ctx.exchange = exchange
        return exchange.buffer.combine(y_UD, exchange.handle, bias=shared_TD)[0]

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.exchange.buffer.dispatch(grad_TD.contiguous(), handle=ctx.exchange.handle)[0], grad_TD, None
