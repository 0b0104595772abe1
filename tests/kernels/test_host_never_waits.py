"""Without a document mask, no operation of a forward and backward pass makes the host wait for the device.

That is what lets the host run ahead of a GPU, and what a CUDA graph of a block needs. The whole model runs on the meta
device in bf16, with every op in Triton: the launchers run, and each launch is replaced by a note of its name. A meta
tensor has no values, so item(), tolist(), nonzero(), a mask as an index, or a copy to the host raise. `no_waits` also
refuses copies between devices, constants from lists, and tensors on the CPU of more than one number.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.kernels.test_model_triton import CONFIG, kernels
from trinity.models import Trinity, attention_backends
from trinity.models.attention_backends import AttentionMask
from trinity.models.layers import Norm
from trinity.models.moe import Router
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity_kernels import custom_op, norm_triton, op

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Refuses operations that would move data between a GPU and the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        for x in (*inputs, *outputs):
            # a single number on the CPU is passed to the kernel as an argument
            assert x.device == META or x.dim() == 0, f"{func.name()} has a tensor {list(x.shape)} on the {x.device}"
        if func.name().startswith(("aten::_to_copy", "aten::copy_")):
            devices = {x.device.type for x in (*inputs, *outputs)}
            assert devices == {"meta"}, f"{func.name()} copies between devices"
        return result


@contextmanager
def no_waits() -> Iterator[None]:
    """NoCopies, and no torch.tensor on the device, which is a copy from the host that no dispatch mode sees."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.tensor copies from the host")

    with NoCopies(), patch.object(torch, "tensor", refuse):
        yield


def rows_as_sequences(mask: AttentionMask, batch: int) -> tuple[Tensor, int]:
    """cu_seqlens without documents."""
    length = mask.sequence_length
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=META), length


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of launches of each kernel; nothing is computed, and ops call their launchers on meta tensors."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(
        type(norm_triton.norm_kernel), "run", lambda kernel, *_, **__: counts.update([kernel.fn.__name__])
    )
    monkeypatch.setattr(custom_op, "is_observed", lambda _args: False)
    monkeypatch.setattr(op, "interpreted", lambda: True)
    # without documents the boundaries are known; they are made once per forward pass, outside the blocks
    monkeypatch.setattr(AttentionMask, "_cu_seqlens", rows_as_sequences)
    monkeypatch.setattr(attention_backends, "pick_engine", lambda *_: "varlen")
    return counts


def model_on_meta(recompute: Literal["none", "block"]) -> Trinity:
    """In bf16, but for norms and routers."""
    with META:
        model = Trinity(replace(CONFIG, window=5), kernels("triton")).to(torch.bfloat16)
    for part in model.modules():
        if isinstance(part, Norm | Router):
            part.to(torch.float32)
    if recompute != "none":
        recompute_blocks(model, recompute)
    return model


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_no_wait_in_forward_and_backward(launches: Counter[str], recompute: Literal["none", "block"]) -> None:
    """A whole step but the optimizer; the launches show that the launchers ran."""
    model = model_on_meta(recompute)
    tokens_BS = torch.zeros(2, 16, dtype=torch.int64, device=META)
    with no_waits():
        losses = model(tokens_BS, targets_BS=tokens_BS, z=1e-3)
        (losses.token_loss + losses.sequence_loss_B.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    sparse = CONFIG.layers - CONFIG.dense_layers
    again = 1 if recompute == "none" else 2
    assert launches["route_kernel"] == sparse
    assert launches["add_norm_kernel"] == again * CONFIG.layers
    assert launches["dpre_kernel"] == sparse


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask as index": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(2).to(x.device),
    "constant": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "index on the host": lambda x: x[torch.arange(2)],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noticed(name: str) -> None:
    with no_waits(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        WAITS[name](torch.empty(2, device=META))
