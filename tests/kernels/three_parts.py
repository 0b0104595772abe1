"""The arithmetic of router_scores_triton.py in torch, and its bound; and inputs that try it.

Shapes: T tokens, D width, E experts.
"""

import torch
from torch import Tensor

SMALLEST = 2.0**-134
"""Half of bf16's smallest number: what a part that is rounded to a multiple of it may lack."""
NEAREST, TRUNCATED = 2.0**-24, 2.0**-23
"""Relative error of one fp32 addition: rounded to nearest, and by a tensor core, which truncates."""


def parts_of(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hi, mid and lo in bf16 of fp32 numbers."""
    high = values.bfloat16()
    rest = torch.where(high.isfinite(), values - high.float(), 0.0)
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def logit_bound(x_TD: Tensor, weight_ED: Tensor, addition: float) -> Tensor:
    """The bound of router_scores.py on the error of each logit, in float64; products may underflow as in fp32."""
    D = x_TD.shape[1]
    x, weight = x_TD.double().abs(), weight_ED.double().abs()
    return (D + 3) * addition * (1 + 2**-6) * (x @ weight.t()) + SMALLEST * x.sum(dim=1, keepdim=True) + D * 2.0**-149


def tensor_core_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x·Wᵀ as the kernel adds it on a tensor core: 16 exact products and the sum so far, cut off to 24 bits."""
    x = x_TD.double()
    high, middle, low = (part.double() for part in parts_of(weight_ED))
    large, small = (torch.zeros(len(x_TD), len(weight_ED), dtype=torch.float64) for _ in range(2))
    for first in range(0, x_TD.shape[1], 16):
        columns = slice(first, first + 16)
        small = _truncated(small + x[:, columns] @ low[:, columns].t())
        small = _truncated(small + x[:, columns] @ middle[:, columns].t())
        large = _truncated(large + x[:, columns] @ high[:, columns].t())
    return large.float() + small.float()


def _truncated(x: Tensor) -> Tensor:
    """The next number of 24 bits towards zero."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2**24), exponent - 24)


def inputs(kind: str, T: int = 256, D: int = 512, E: int = 64) -> tuple[Tensor, Tensor]:
    """x in bf16 and an fp32 weight: random; as a model's; of wide range; that cancel; with parts that underflow."""
    random = torch.Generator().manual_seed(0)
    x_TD, weight_ED = torch.randn(T, D, generator=random), torch.randn(E, D, generator=random)
    if kind == "realistic":  # an RMSNorm's output with some large features; the weight of the initialisation, trained
        x_TD = x_TD / x_TD.square().mean(dim=1, keepdim=True).sqrt() * (1 + 20 * (torch.arange(D) % 97 == 0))
        weight_ED = 0.5 / D**0.5 * weight_ED.clamp(-3, 3) * (1 + torch.rand(E, 1, generator=random))
    elif kind == "wide":
        x_TD = x_TD * 2.0 ** torch.randint(-12, 13, (T, D), generator=random)
        weight_ED = weight_ED * 2.0 ** torch.randint(-60, 20, (E, D), generator=random)
    elif kind == "cancelling":  # each feature comes twice with opposite weights, which differ by a few units
        x_TD[:, D // 2 :] = x_TD[:, : D // 2]
        weight_ED[:, D // 2 :] = -weight_ED[:, : D // 2] * (1 + 2.0**-21)
    elif kind == "underflowing":
        weight_ED = weight_ED * 2.0 ** torch.randint(-140, -100, (E, D), generator=random)
    return x_TD.bfloat16(), weight_ED


KINDS = ("random", "realistic", "wide", "cancelling", "underflowing")
