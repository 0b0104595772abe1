"""Expert parallelism through DeepEP (github.com/deepseek-ai/DeepEP): the same exchange by kernels of its own.

Written after DeepEP's documentation of `Buffer` (1.x; 2.x keeps it as its legacy interface) and NOT RUN on a GPU by
this project: only our side of it is tested. Measure it, and compare its gradients with all_to_all's, before relying on
it. It takes bf16 tokens, over NVLink and RDMA; sends a token once to a rank; waits on the host for the counts inside
`dispatch`; and overlaps the shared expert in forward, nothing in backward. Recompute cannot see DeepEP's calls: both
kinds exchange again, along the same routes, and rely on rows coming in the same order.

Dispatching is the adjoint of combining: gradients of tokens are combined, gradients of sums dispatched along the handle
that the forward made.

Shapes: T tokens here, U tokens received, D width, K active experts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.errors import UserError
from trinity.models.token_dispatcher import RunExperts


def check_deep_ep(dtype: torch.dtype, device: str) -> None:
    """Refuse DeepEP where it cannot run, before anything is built.

    Args:
        dtype: of the tokens that travel.
        device: its type.
    Raises:
        UserError: the package is not installed, or the tokens are not bf16 on a GPU.
    """
    _check_installed()
    _check_tokens(dtype, device)


class DeepEP:
    """The Dispatcher for experts split over a process group, by DeepEP's kernels.

    Args:
        group: the ranks that hold the experts, each an equal share, in order.
        experts: of a layer, in all.
    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        _check_installed()
        self.group, self.experts = group, experts
        self._buffer: Any = None

    @torch.compiler.disable
    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See trinity.models.dispatch.Dispatcher; every rank of the group calls it."""
        trip = SimpleNamespace(buffer=self._buffer_for(x_TD), experts=self.experts)
        x_UD, gates_UK = _Dispatch.apply(x_TD, gates_TK, indices_TK, trip)
        done = meanwhile()
        trip.event.current_stream_wait()
        y_UD = experts(x_UD, trip.indices_UK, gates_UK, trip.choices_received)
        return _Combine.apply(y_UD, trip), done

    def _buffer_for(self, x_TD: Tensor) -> Any:
        """One buffer for all layers, as large as DeepEP advises for rows of this many bytes."""
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
        ctx, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, trip: SimpleNamespace
    ) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        per_rank, per_node, per_expert, goes, _ = trip.buffer.get_dispatch_layout(indices_TK, trip.experts)
        # indices received are among this rank's experts, −1 for those of others
        x_UD, trip.indices_UK, gates_UK, received, trip.handle, trip.event = trip.buffer.dispatch(
            x_TD, topk_idx=indices_TK, topk_weights=gates_TK, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=goes, num_tokens_per_expert=per_expert,
            async_finish=True,
        )  # fmt: skip
        trip.choices_received = sum(received)
        return x_UD, gates_UK

    @staticmethod
    def backward(ctx, grad_UD: Tensor, grad_UK: Tensor) -> tuple[Tensor, Tensor, None, None]:
        trip = ctx.trip
        grad_x, grad_gates, _ = trip.buffer.combine(
            grad_UD.contiguous(), trip.handle, topk_weights=grad_UK.contiguous()
        )
        return grad_x, grad_gates, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_UD: Tensor, trip: SimpleNamespace) -> Tensor:
        ctx.trip = trip
        return trip.buffer.combine(y_UD, trip.handle)[0]

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.buffer.dispatch(grad_TD.contiguous(), handle=ctx.trip.handle)[0], None
