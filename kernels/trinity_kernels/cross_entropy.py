"""The LM head and its loss in chunks of tokens, so that all logits are never held at once.

Per valid token: CE + z·lse², CE = lse − logit[target], lse = log Σ exp(logits). The gradient of the sum with respect to
the logits is p·(1 + 2·z·lse) − onehot; dX and dW are formed from it chunk by chunk in the forward pass (as Liger does),
and the backward pass only scales them by the incoming scalar. The matrix products come out in x's dtype; everything
after them, and the sum of dW over chunks, is in fp32.

Shapes: T tokens, D width, V vocabulary, C tokens of one chunk.
"""

import torch
from torch import Tensor

from trinity_kernels.linear import widened
from trinity_kernels.norm import wide
from trinity_kernels.op import Op

IGNORE = -100
"""A target that counts nowhere."""

CHUNK_BYTES = 256 * 2**20
"""The most that one chunk's fp32 logits take: the weight is read once per chunk, so larger is faster, not better."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float) -> tuple[Tensor, ...]:
        with_gradient = x_TD.requires_grad or weight_VD.requires_grad
        loss_T = wide(x_TD).new_zeros(x_TD.shape[0])
        lse_T, top_T = torch.zeros_like(loss_T), torch.full_like(loss_T, -torch.inf)
        grad_x = torch.empty_like(x_TD) if with_gradient else None
        grad_weight = torch.zeros_like(weight_VD, dtype=loss_T.dtype) if with_gradient else None
        weight = widened(weight_VD)
        chunk = max(1, CHUNK_BYTES // (loss_T.element_size() * weight_VD.shape[0]))
        for start in range(0, x_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_CD = widened(x_TD[rows])
            logits_CV = wide(x_CD @ weight.t())
            loss_T[rows], lse_T[rows], top_T[rows], sum_C = _token_losses(logits_CV, targets_T[rows])
            if with_gradient:
                grad_CV = _logits_gradient(logits_CV, sum_C, lse_T[rows], targets_T[rows], z).to(x_CD.dtype)
                grad_x[rows] = grad_CV @ weight
                grad_weight += grad_CV.t() @ x_CD
        if with_gradient:
            ctx.save_for_backward(grad_x, grad_weight.to(weight_VD.dtype))
        total = (loss_T + z * lse_T.square()).sum()
        ctx.mark_non_differentiable(loss_T, lse_T, top_T)
        return total, loss_T, lse_T, top_T

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad.to(grad_weight.dtype), None, None


def _token_losses(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves exp(logit − top) where the logits were: the one exponential that loss and gradient share.

    Returns:
        CE and lse per token, both 0 where the target is ignored; the largest logit; the sum of what was left.
    """
    valid = targets_C != IGNORE
    top_C = logits_CV.amax(dim=1)
    picked_C = logits_CV.gather(1, targets_C.clamp_min(0).unsqueeze(1)).squeeze(1)
    sum_C = logits_CV.sub_(top_C.unsqueeze(1)).exp_().sum(dim=1)
    lse_C = top_C + sum_C.log()
    zero = lse_C.new_zeros(())
    # where, not a product: an ignored token with an infinite logit must not give NaN
    return torch.where(valid, lse_C - picked_C, zero), torch.where(valid, lse_C, zero), top_C, sum_C


def _logits_gradient(exp_CV: Tensor, sum_C: Tensor, lse_C: Tensor, targets_C: Tensor, z: float) -> Tensor:
    """p·(1 + 2·z·lse) − onehot in the memory of what _token_losses left; rows of ignored targets are 0."""
    exp_CV.mul_(((1 + 2 * z * lse_C) / sum_C).unsqueeze(1))
    exp_CV.scatter_add_(1, targets_C.clamp_min(0).unsqueeze(1), exp_CV.new_full((len(exp_CV), 1), -1.0))
    # by index: a mask would pass over all logits where mostly no target is ignored
    return exp_CV.index_fill_(0, (targets_C == IGNORE).nonzero().squeeze(1), 0.0)


def _linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head and loss: Σ over valid tokens of CE + z·lse², with what metrics need per token.

    Args:
        x_TD: [T, D] floating point.
        weight_VD: [V, D], same dtype.
        targets_T: [T] int64, in [0, V) or IGNORE.
        z: coefficient of lse².
    Returns:
        total: scalar, differentiable; and without gradient, fp32 (float64 stays): ce_T [T] and lse_T [T], both 0 where
        ignored, and the largest logit per token [T].
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, z)


linear_cross_entropy = Op(_linear_cross_entropy)
