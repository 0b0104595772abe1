"""Softmax attention on a CPU in blocks of queries, each of which reads only the keys in its reach.

torch's flash attention for CPUs computes every score of a row and masks those out of reach. Here it is called for BLOCK
queries at a time and the keys from the first query's window up to the last query itself, so that the work grows with
S·window, and with S²/2 without a window. Keys of earlier tokens may come before those of the queries' own. 16-bit
inputs are differentiated in fp32, because torch's backward is slow in 16 bits and would round the keys' gradients once
per block.

Saved for backward: q, k, v, the mask, and of each block the output and the log-sum-exp of its scores.

Shapes: B batch, S queries and U keys of a row, H query heads, G key/value heads, C head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trinity_kernels.probe import probed

BLOCK = 64
"""Queries of a block: forward and backward are within a tenth of the fastest of 32, 64 and 128 at 256 and 1024 tokens
and a window of 128."""


def block_attention(q_BHSC: Tensor, k_BGUC: Tensor, v_BGUC: Tensor, bias: Tensor, window: int | None) -> Tensor:
    """softmax(q·kᵀ/√C + bias)·v.

    Args:
        q_BHSC, k_BGUC, v_BGUC: fp32 or 16 bits, one dtype, on a CPU, any strides; H is a multiple of G. The last S keys
            are those of the queries' own tokens; U ≥ S.
        bias: [B or 1, 1, S, U] in q's dtype: 0 where query i (second to last) attends to key j, else −inf; a query
            attends to itself, to no later key, and to none `window` or more positions before it.
        window: see bias; None: keys of any distance.
    Returns:
        [B, H, S, C], same dtype.
    """
    if q_BHSC.shape[1] != k_BGUC.shape[1] and not _flash_groups_queries():
        k_BGUC, v_BGUC = (x.repeat_interleave(q_BHSC.shape[1] // x.shape[1], dim=1) for x in (k_BGUC, v_BGUC))
    return _BlockAttention.apply(q_BHSC, k_BGUC, v_BGUC, bias, window)


@torch.compiler.assume_constant_result
@probed
def can_run() -> bool:
    """Whether this torch has its flash attention for CPUs, a private op."""
    try:
        x = torch.zeros(1, 1, 1, 8)
        return bool(torch.isfinite(_flash(x, x, x, torch.zeros(1, 1, 1, 1))[0]).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


@torch.compiler.assume_constant_result
@probed
def _flash_groups_queries() -> bool:
    """Whether the op takes fewer key/value heads than query heads."""
    q, k = torch.arange(32.0).view(1, 2, 2, 8), torch.arange(16.0).view(1, 1, 2, 8)
    bias, both = torch.zeros(1, 1, 2, 2), k.expand(1, 2, 2, 8)
    try:
        return torch.allclose(_flash(q, k, k, bias)[0], _flash(q, both, both, bias)[0])
    except RuntimeError:
        return False


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHSC: Tensor, k_BGUC: Tensor, v_BGUC: Tensor, bias: Tensor, window: int | None) -> Tensor:
        blocks = list(_blocks(q_BHSC.shape[2], k_BGUC.shape[2], window))
        parts = [
            _flash(q_BHSC[:, :, queries], k_BGUC[:, :, keys], v_BGUC[:, :, keys], bias[..., queries, keys])
            for queries, keys in blocks
        ]
        outputs, log_sums = zip(*parts)
        ctx.save_for_backward(q_BHSC, k_BGUC, v_BGUC, bias, *outputs, *log_sums)
        ctx.blocks = blocks
        return torch.cat(outputs, dim=2)

    @staticmethod
    def backward(ctx, grad_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSC, k_BGUC, v_BGUC, bias, *saved = ctx.saved_tensors
        dtype, outputs, log_sums = q_BHSC.dtype, saved[: len(ctx.blocks)], saved[len(ctx.blocks) :]
        # the flash kernel reads rows of one head: contiguous here once, not in each block
        q, k, v, grad, bias = (x.float().contiguous() for x in (q_BHSC, k_BGUC, v_BGUC, grad_BHSC, bias))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), output, log_sum in zip(ctx.blocks, outputs, log_sums):
            grad_q[:, :, queries], grad_k_part, grad_v_part = _flash_backward(
                grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], output.float(), log_sum,
                bias[..., queries, keys],
            )  # fmt: skip
            grad_k[:, :, keys] += grad_k_part
            grad_v[:, :, keys] += grad_v_part
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys in their reach) of each block; query i has key `earlier` + i."""
    earlier = keys - queries
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        first = 0 if window is None else max(0, earlier + start - window + 1)
        yield slice(start, end), slice(first, earlier + end)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, log_sum, 0.0, False, attn_mask=bias
    )
