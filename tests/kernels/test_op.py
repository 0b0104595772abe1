"""Op: the rule that picks an implementation."""

import pytest
import torch

from trinity_kernels.op import Op


def refuses(x: torch.Tensor) -> str | None:
    return "of float64" if x.dtype == torch.float64 else None


double = Op(lambda x: x + x, "math:hypot", refuses)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU auto picks Triton")
def test_auto_is_the_reference_on_a_cpu_even_under_the_interpreter() -> None:
    assert double(torch.ones(())) == 2


def test_reference_is_never_refused() -> None:
    assert double(torch.ones((), dtype=torch.float64), kernel="reference") == 2


def test_triton_explains_a_refusal() -> None:
    with pytest.raises(ValueError, match="kernel=triton cannot be used: of float64; use auto or reference"):
        double(torch.ones((), dtype=torch.float64), kernel="triton")


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU and the tensors are on the cpu"):
        double(torch.ones(()), kernel="triton")


def test_triton_is_imported_at_the_first_call() -> None:
    import math

    assert double.triton is math.hypot
