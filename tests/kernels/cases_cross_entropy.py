"""The loss kernel as Trinity calls it, a chunk of its vocabulary, and with every other tile of the table.

Shapes: C tokens of one chunk.
"""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels.cross_entropy_triton import logits_to_gradient

VOCABULARIES = {"smoke": 8192, "tiny": 512, "trinity": 200_192, "no multiple of 16": 200_019}


def loss(vocabulary: int, dtype: torch.dtype, with_gradient: bool, tokens: int = 8192) -> None:
    """Launch the loss of one chunk, without and with weights."""
    targets_C = torch.empty(tokens, dtype=torch.int64)
    per_token = [torch.empty(tokens) for _ in range(3)]
    for weights_C in (None, torch.empty(tokens)):
        logits_CV = torch.empty(tokens, vocabulary, dtype=dtype)
        logits_to_gradient(logits_CV, targets_C, 1e-6, *per_token, with_gradient, weights_C)


CASES: dict[str, Callable[[], None]] = {
    f"{name}, {dtype}, {'gradient' if with_gradient else 'loss only'}": partial(loss, vocabulary, dtype, with_gradient)
    for name, vocabulary in VOCABULARIES.items()
    for dtype in (torch.bfloat16, torch.float32)
    for with_gradient in (True, False)
    if dtype == torch.bfloat16 or vocabulary > 200_000
}
