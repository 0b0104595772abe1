"""Newton-Schulz's kernels at the real models' sizes, for compiled.py: both forms of five steps, wide and tall."""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels.newton_schulz_triton import gram_form, plain_form

# matrices in a batch, rows, columns
SIZES = {
    "nano expert up": (256, 256, 1024), "nano expert down": (256, 1024, 256), "nano q": (56, 1024, 1024),
    "nano dense": (4, 3072, 1024), "mini expert": (32, 1024, 2048), "large expert": (7, 3072, 3072),
    "large dense gate": (1, 12288, 3072), "large q": (2, 6144, 3072),
}  # fmt: skip
TRIPLES = [(4.0848, -6.8946, 2.9270)] * 5


def steps(form: Callable, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    form(torch.empty(size, dtype=dtype), TRIPLES)


CASES: dict[str, Callable[[], None]] = {
    f"{name} {form.__name__} {str(dtype).removeprefix('torch.')}": partial(steps, form, size, dtype)
    for name, size in SIZES.items()
    for form in (plain_form, gram_form)
    for dtype in (torch.bfloat16, torch.float16)
} | {
    f"fp32 {m}x{n} {form.__name__}": partial(steps, form, (4, m, n), torch.float32)
    for m, n in ((40, 72), (72, 40))
    for form in (plain_form, gram_form)
}  # fmt: skip
