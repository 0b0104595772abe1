"""The router's scores s = σ(x·Wᵀ) with an fp32 weight, for x in bf16 at the accuracy of fp32.

In fp32 and float64 this is torch's product. For x in bf16 the reference casts x to fp32 for the product, and saves x
itself for backward, half the bytes of the copy.

Triton (router_scores_triton.py) computes the same on tensor cores. A bf16 number holds 8 bits of an fp32 number's 24,
so three hold it exactly: w = hi + mid + lo, where hi = bf16(w), mid = bf16(w − hi) and lo = w − hi − mid; mid is at
most 2⁻⁸·|w| and lo 2⁻¹⁶·|w|. Products of two bf16 numbers are exact in fp32. So three bf16 products, summed in fp32,
are an fp32 product, and their error is that of the additions alone:

    |error of a logit| ≤ (D + 3)·u·(1 + 2⁻⁶)·Σ_d |x_d·w_d| + 2⁻¹³⁴·Σ_d |x_d|

with u = 2⁻²⁴ for additions rounded to nearest and 2⁻²³ for truncated ones, which a tensor core's are taken to be. The
fp32 product has the bound D·u·Σ|x·w|. The last term is for parts below bf16's smallest number, 2⁻¹³³; a w of at least
2⁻¹¹⁰ has none. An infinite or NaN w is its own hi, and mid = lo = 0, so that it has the effect that it has in fp32; a
finite w above bf16's largest number, 3.39e38, counts as infinite.

Backward, with g = ds·s·(1 − s) in fp32, split likewise:
dW = gᵀ·x      three products with the parts of g; the same bound over T tokens
dx = g·W       hi·hi + hi·mid + mid·hi, rounded to bf16 (2⁻⁸). What is left out is at most 2⁻¹⁴·Σ_e |g_e·w_e|: less than
               the rounding unless the sum over experts is 64 times smaller than the sum of magnitudes

Saved for backward: x, W (the parts of W in Triton), s.

Shapes: T tokens, D width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.norm import wide
from trinity_kernels.op import Op


class _WideProduct(torch.autograd.Function):
    """x·Wᵀ in fp32 for x in 16 bits, which is what is saved."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), wide(weight_ED))

    @staticmethod
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = (grad_TE @ wide(weight_ED)).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _router_scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Scores of all experts for each token, σ(x·Wᵀ).

    Args:
        x_TD: [T, D], floating point.
        weight_ED: [E, D], fp32, or float64 with x in float64; 16 bits are widened.
    Returns:
        [T, E], fp32, or float64 with x in float64; differentiable. The gradient of x has x's dtype, that of the weight
        the weight's.
    """
    sixteen_bits = x_TD.dtype in (torch.bfloat16, torch.float16)
    logits = _WideProduct.apply(x_TD, weight_ED) if sixteen_bits else F.linear(wide(x_TD), wide(weight_ED))
    return torch.sigmoid(logits)


def _refuses(x_TD: Tensor, weight_ED: Tensor) -> str | None:
    if x_TD.dtype != torch.bfloat16:
        return f"it takes x in bf16, not {x_TD.dtype}"
    if weight_ED.dtype == torch.float64:
        return "it takes no weight in float64"
    return None


router_scores = Op(_router_scores, "trinity_kernels.router_scores_triton:router_scores", _refuses)
