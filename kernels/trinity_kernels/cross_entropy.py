"""The LM head and its loss in one op, computed in chunks of tokens, so that all logits are never held at once.

Per valid token: CE + z·lse², with CE = lse − logit[target] and lse = log Σ exp(logits). The gradient of the sum with
respect to the logits is p·(1 + 2·z·lse) − onehot; the forward pass computes it chunk by chunk and forms dX and dW from
it (as Liger does). A token may have a weight, by which its term and its gradient are multiplied.

Saved for backward: dX, and dW in fp32; backward scales them by the incoming scalar in fp32 and rounds dW once.
Precision: logits, their gradient and dX are in x's dtype; the rest, and the sum of dW over chunks, is in fp32.
Triton (cross_entropy_triton.py): one kernel per chunk turns logits into their gradient in place, between products of
cuBLAS.

Shapes: T tokens, D width, V vocabulary, C tokens of one chunk, N tokens of one block of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trinity_kernels.linear import linear_forward, linear_grad_input, linear_grad_weight, matmul_operand, takes_onednn
from trinity_kernels.norm import wide
from trinity_kernels.op import Op

IGNORE = -100
"""Target of a token that is ignored."""

CHUNK_BYTES = 256 * 2**20
"""Most bytes of one chunk's logits on a CPU, counting their widest copy (fp32 or float64)."""

CHUNK_TOKENS = 512
"""Most tokens of a chunk on a CPU, except in float64. Each chunk reads the weight once, and reads and writes its
gradient once; but logits that do not fit the cache are read from memory by each of four steps."""

BLOCK_BYTES = 2**21
"""Most bytes for each thread of the rows of a chunk that the reference turns into their gradient at a time: the steps
of one block find it in the cache of a CPU core. One row may be larger."""

CUDA_CHUNK_BYTES = 3200 * 2**20
"""The same on a GPU: 8192 tokens of Trinity's vocabulary in bf16 take 3128 MiB; adding to dW then costs about 3 %."""

ChunkLoss = Callable[[Tensor, Tensor, float, Tensor, Tensor, Tensor, bool, Tensor | None], Tensor]
"""(logits_CV, targets_C, z, ce_C, lse_C, top_C, with_gradient, weights_C) → dlogits_CV: writes ce, lse and top; may
overwrite the logits. Without with_gradient the result has no meaning."""


def chunk_tokens(tokens: int, vocabulary: int, itemsize: int, device: str) -> int:
    """C: as many tokens as the limit in bytes allows, in chunks of about equal size; multiples of 128 above 128.

    Args:
        tokens: T.
        vocabulary: V.
        itemsize: bytes of one logit.
        device: the device type.
    """
    most = max(1, (CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES) // (itemsize * vocabulary))
    if device != "cuda" and itemsize < 8:
        most = min(most, CHUNK_TOKENS)
    if most > 128:
        most -= most % 128
    chunks = max(1, -(-tokens // most))
    even = -(-tokens // chunks)
    return max(1, min(most, -(-even // 128) * 128))


def forward_in_chunks(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float, for_x: bool, for_weight: bool,
    chunk_loss: ChunkLoss, itemsize: int, weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loop over the chunks: the total loss; CE, lse and the largest logit per token; dX and dW.

    Args:
        for_x, for_weight: whether to compute dX and dW; otherwise they have no elements.
        chunk_loss: turns the logits of one chunk into their gradient.
        itemsize: bytes of a logit in the widest copy that chunk_loss holds.
        weights_T: [T] weight of each token; None: 1.
    Returns:
        total, ce_T, lse_T, top_T, dX [T, D] in x's dtype, dW [V, D] in fp32 or float64.
    """
    T, V = x_TD.shape[0], weight_VD.shape[0]
    ce_T = torch.zeros(T, dtype=_high(x_TD.dtype), device=x_TD.device)
    lse_T, top_T = torch.zeros_like(ce_T), torch.full_like(ce_T, -torch.inf)
    grad_x = x_TD.new_empty(x_TD.shape if for_x else 0)
    grad_weight = torch.zeros(weight_VD.shape if for_weight else 0, dtype=ce_T.dtype, device=x_TD.device)
    weight, chunk = matmul_operand(weight_VD), chunk_tokens(T, V, itemsize, x_TD.device.type)
    weights_T = None if weights_T is None else weights_T.to(ce_T.dtype).contiguous()
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        x_CD = matmul_operand(x_TD[rows])
        # no variable holds the logits, so that those of two chunks are never in memory together
        grad_CV = chunk_loss(
            linear_forward(x_CD, weight), targets_T[rows], z, ce_T[rows], lse_T[rows], top_T[rows], for_x or for_weight,
            None if weights_T is None else weights_T[rows],
        )  # fmt: skip
        if for_x:
            grad_x[rows] = linear_grad_input(grad_CV, weight)
        if for_weight:
            add_product_(grad_weight, grad_CV, x_CD)
        del grad_CV
    loss_T = ce_T + z * lse_T.square()
    if weights_T is not None:
        loss_T *= weights_T
    return loss_T.sum(), ce_T, lse_T, top_T, grad_x, grad_weight


def add_product_(into_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    """into += leftᵀ·right, where into's dtype is the operands' or a wider one.

    On CUDA the matrix product itself accumulates 16-bit operands into fp32; on other devices the product is first
    rounded to the operands' dtype.
    """
    if left_NO.device.type == "cuda" and into_OI.dtype != left_NO.dtype:
        torch.addmm(into_OI, left_NO.t(), right_NI, out_dtype=into_OI.dtype, out=into_OI)
    elif into_OI.dtype == left_NO.dtype and not takes_onednn(left_NO):
        into_OI.addmm_(left_NO.t(), right_NI)
    else:
        into_OI += linear_grad_weight(left_NO, right_NI)


def scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient·by, computed in fp32 or float64, rounded once to dtype.

    Args:
        by: scalar on the same device, fp32 or float64. It is reshaped to one element, because torch ignores a scalar
            in the choice of the product's dtype and would round it to bf16 first, an error shared by all elements.
    """
    return torch.mul(gradient, by.reshape(1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def required_gradients(
    x_TD: Tensor, weight_VD: Tensor, grad_weight_dtype: torch.dtype | None
) -> tuple[bool, bool, torch.dtype]:
    """Whether this call must compute dX and dW (neither under no_grad), and the final dtype of dW."""
    if grad_weight_dtype is None:
        # torch.compile cannot read grad_dtype
        known = weight_VD.is_leaf and not torch.compiler.is_compiling()
        allowed = weight_VD.grad_dtype if known else weight_VD.dtype
        grad_weight_dtype = _high(weight_VD.dtype) if allowed is None else allowed
    graded = torch.is_grad_enabled()
    return graded and x_TD.requires_grad, graded and weight_VD.requires_grad, grad_weight_dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float,
        for_x: bool, for_weight: bool, grad_weight_dtype: torch.dtype, weights_T: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        total, ce_T, lse_T, top_T, grad_x, grad_weight = forward_in_chunks(
            x_TD, weight_VD, targets_T, z, for_x, for_weight, _chunk_loss, _high(x_TD.dtype).itemsize, weights_T
        )
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.grad_weight_dtype = grad_weight_dtype
        ctx.mark_non_differentiable(ce_T, lse_T, top_T)
        return total, ce_T, lse_T, top_T

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad), None, None, None, None, None, None


def scaled_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dX and dW: the saved results of forward_in_chunks times the incoming gradient; None where not needed."""
    grad_x, grad_weight = ctx.saved_tensors
    return (
        scaled(grad_x, grad, grad_x.dtype) if ctx.needs_input_grad[0] else None,
        scaled(grad_weight, grad, ctx.grad_weight_dtype) if ctx.needs_input_grad[1] else None,
    )


def _high(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_loss(
    logits: Tensor, targets_C: Tensor, z: float, ce_C: Tensor, lse_C: Tensor, top_C: Tensor, with_gradient: bool,
    weights_C: Tensor | None,
) -> Tensor:  # fmt: skip
    """One chunk in torch, a block of rows at a time; see ChunkLoss."""
    block = len(logits)
    if not logits.is_cuda:
        limit = BLOCK_BYTES * torch.get_num_threads()
        block = max(1, limit // (logits.shape[1] * _high(logits.dtype).itemsize))
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        logits_NV, targets_N = wide(logits[rows]), targets_C[rows]
        ce_C[rows], lse_C[rows], top_C[rows], sum_N = _token_losses(logits_NV, targets_N)
        if with_gradient:
            _logits_gradient(
                logits_NV, sum_N, lse_C[rows], targets_N, z, None if weights_C is None else weights_C[rows]
            )
            if logits_NV.dtype != logits.dtype:  # a copy: otherwise the logits themselves are overwritten
                logits[rows] = logits_NV
    return logits


def _token_losses(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses per token; overwrites the logits with exp(logit − top), the exponential that loss and gradient share.

    Returns:
        CE and lse per token, both 0 where the target is ignored; the largest logit; the row sums of the exponentials.
    """
    valid = targets_C != IGNORE
    top_C = logits_CV.amax(dim=1)
    picked_C = logits_CV.gather(1, targets_C.clamp_min(0).unsqueeze(1)).squeeze(1)
    sum_C = logits_CV.sub_(top_C.unsqueeze(1)).exp_().sum(dim=1)
    log_C = sum_C.log()
    zero = log_C.new_zeros(())
    # where, not a product: an ignored token with an infinite logit must not give NaN
    # top − picked first: added to a large top, the logarithm would lose its digits
    return torch.where(valid, top_C - picked_C + log_C, zero), torch.where(valid, top_C + log_C, zero), top_C, sum_C


def _logits_gradient(
    exp_CV: Tensor, sum_C: Tensor, lse_C: Tensor, targets_C: Tensor, z: float, weights_C: Tensor | None
) -> Tensor:
    """w·(p·(1 + 2·z·lse) − onehot), in place of the exponentials of _token_losses; rows of ignored targets are 0."""
    factor_C, onehot_C1 = (1 + 2 * z * lse_C) / sum_C, exp_CV.new_full((len(exp_CV), 1), -1.0)
    if weights_C is not None:
        factor_C, onehot_C1 = factor_C * weights_C, -weights_C.unsqueeze(1)
    exp_CV.mul_(factor_C.unsqueeze(1))
    exp_CV.scatter_add_(1, targets_C.clamp_min(0).unsqueeze(1), onehot_C1)
    ignored_C = targets_C == IGNORE
    if exp_CV.device.type == "cpu":
        # by index: a mask would read all logits, though mostly no target is ignored
        return exp_CV.index_fill_(0, ignored_C.nonzero().squeeze(1), 0.0)
    return exp_CV.masked_fill_(ignored_C.unsqueeze(1), 0.0)  # by mask: an index would make the host wait for a count


def _linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float = 0.0, grad_weight_dtype: torch.dtype | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Head and loss: Σ over valid tokens of w·(CE + z·lse²), and values per token for metrics.

    Args:
        x_TD: [T, D] floating point.
        weight_VD: [V, D], same dtype.
        targets_T: [T] int64, in [0, V) or IGNORE.
        z: coefficient of lse².
        grad_weight_dtype: dtype to which dW, summed in fp32, is rounded. By default the weight's grad_dtype, which is
            the weight's own dtype unless it was set; fp32 if it is None (any). Autograd casts a leaf's gradient to its
            grad_dtype in any case.
        weights_T: [T] floating point, w, the weight of each token in the total; it gets no gradient. None: 1.
    Returns:
        total: scalar, differentiable. Without gradient and without weights, in fp32 (float64 stays float64): ce_T [T]
        and lse_T [T], both 0 where ignored, and the largest logit per token [T].
    """
    gradients = required_gradients(x_TD, weight_VD, grad_weight_dtype)
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, z, *gradients, weights_T)


def _refuses(x_TD: Tensor, weight_VD: Tensor, *_: object, **__: object) -> str | None:
    if x_TD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its sums are in fp32 and x is {x_TD.dtype}"
    return None


linear_cross_entropy = Op(_linear_cross_entropy, "trinity_kernels.cross_entropy_triton:linear_cross_entropy", _refuses)
