"""Which tokens see which, and the engines that compute softmax attention under that rule.

A token sees itself and earlier tokens of its row; only those fewer than `window` places back on a local layer; only
those of its own document when document ids are given. "Earlier" is by position, so positions must increase along a row;
they do not restart at a document: RoPE is relative, so inside a document nothing would change, and without a document
mask (Nano, Mini) attention crosses documents and needs one running count.

Engines: `sdpa` (torch, a mask; runs everywhere, float64 too: the reference), `varlen` (torch's own FA2, CUDA), `flex`
(torch, compiled, CUDA; on a CPU without gradients), `flash4` and `flash2` (the flash-attn-4 and flash-attn packages,
CUDA). `auto` takes the first of flash4, flash2, varlen that is there on CUDA in 16 bits, else sdpa.

Shapes: B batch, S sequence, H query heads, G key/value heads, C head width, T = B·S.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.errors import UserError
from trinity_kernels.linear import widened

ENGINE_NAMES = ("auto", "sdpa", "varlen", "flex", "flash4", "flash2")


class Visibility:
    """The visibility rule of one forward pass; masks are made once a kind of layer and shared by all its layers.

    Args:
        positions_BS: [B or 1, S] int64, increasing along each row.
        document_ids_BS: [B, S] integer, equal within a document, contiguous; None: a row is one document.
        plain: positions are 0…S−1 in every row, so that engines may use their own causal rule.
        engine: one of ENGINE_NAMES.
    """

    def __init__(
        self, positions_BS: Tensor, document_ids_BS: Tensor | None, plain: bool = False, engine: str = "auto"
    ) -> None:
        self.positions_BS, self.document_ids_BS, self.plain, self.engine = positions_BS, document_ids_BS, plain, engine
        self._made: dict[object, object] = {}

    @property
    def sequence(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def once(self, key: object, make: Callable[[], object]) -> object:
        """make()'s result, kept under key for the rest of this forward pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def is_plainly_causal(self, window: int | None) -> bool:
        """Whether the rule is nothing but "earlier tokens of the row"."""
        return self.plain and self.document_ids_BS is None and (window is None or window >= self.sequence)

    def mask(self, window: int | None) -> Tensor:
        """[B or 1, 1, S, S] bool: query i (second to last) sees key j (last)."""
        return self.once(("mask", window), partial(self._mask, window))

    def _mask(self, window: int | None) -> Tensor:
        back = self.positions_BS.unsqueeze(-1) - self.positions_BS.unsqueeze(-2)
        seen = back >= 0
        if window is not None:
            seen &= back < window
        if self.document_ids_BS is not None:
            seen = seen & (self.document_ids_BS.unsqueeze(-1) == self.document_ids_BS.unsqueeze(-2))
        return seen.unsqueeze(1)

    def document_ends(self, batch: int) -> tuple[Tensor, int]:
        """Boundaries of documents in the flattened batch, for engines that take sequences of uneven length.

        Returns:
            starts_and_end [N + 1] int32 and the longest possible document, S. Counting the documents is the one place
            where the forward pass waits for the device.
        """
        return self.once("ends", partial(self._document_ends, batch))

    def _document_ends(self, batch: int) -> tuple[Tensor, int]:
        starts_BS = torch.zeros(batch, self.sequence, dtype=torch.bool, device=self.positions_BS.device)
        starts_BS[:, 0] = True
        if self.document_ids_BS is not None:
            starts_BS[:, 1:] |= self.document_ids_BS[:, 1:] != self.document_ids_BS[:, :-1]
        starts = starts_BS.flatten().nonzero().squeeze(1).to(torch.int32)
        return F.pad(starts, (0, 1), value=batch * self.sequence), self.sequence


def attend(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    """softmax(q·kᵀ/√C)·v under the visibility rule.

    Args:
        q_BSHC, k_BSGC, v_BSGC: one dtype; H is a multiple of G.
        window: tokens a token sees, itself included; None for all before it.
    Returns:
        [B, S, H, C], same dtype.
    """
    engine = pick_engine(visible.engine, q_BSHC.device.type, q_BSHC.dtype)
    return _ENGINES[engine](q_BSHC, k_BSGC, v_BSGC, window, visible)


@cache
def pick_engine(asked: str, device: str, dtype: torch.dtype) -> str:
    """The engine that `asked` means here.

    Raises:
        UserError: the engine asked for cannot run here.
    """
    flash_runs = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    there = {
        "sdpa": True,
        "varlen": flash_runs,
        "flex": True,
        "flash4": flash_runs and _installed("flash_attn.cute"),
        "flash2": flash_runs and _installed("flash_attn.flash_attn_interface"),
    }
    if asked == "auto":
        return next((name for name in ("flash4", "flash2", "varlen") if there[name]), "sdpa")
    if asked not in there:
        raise UserError(f"kernels.attention={asked} is not known; use one of {', '.join(ENGINE_NAMES)}")
    if not there[asked]:
        wants = {"flash4": "the package flash-attn-4 and ", "flash2": "the package flash-attn and "}.get(asked, "")
        raise UserError(
            f"kernels.attention={asked} needs {wants}a CUDA device in 16 bits, not {device} in {dtype}; use auto"
        )
    return asked


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _sdpa(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    q, k, v = (widened(x.transpose(1, 2)) for x in (q_BSHC, k_BSGC, v_BSGC))
    if visible.is_plainly_causal(window):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask(window), enable_gqa=True)
    return mixed.transpose(1, 2).to(q_BSHC.dtype)


def _flex(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    batch, sequence = q_BSHC.shape[:2]
    positions = visible.positions_BS.expand(batch, -1)
    documents = visible.document_ids_BS

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = positions[b, i] - positions[b, j]
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        return seen if documents is None else seen & (documents[b, i] == documents[b, j])

    def make() -> BlockMask:
        return create_block_mask(sees, batch, None, sequence, sequence, device=q_BSHC.device)

    block_mask = visible.once(("blocks", window), make)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSGC, v_BSGC))
    return _flex_function()(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


@cache
def _flex_function() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled, flex holds all scores at once
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


def _varlen(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = visible.document_ends(q_BSHC.shape[0])
    left = -1 if window is None else window - 1
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BSGC, v_BSGC))
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    if not grouped:  # torch 2.11: as many key and value heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(left, 0), **grouped)
    return mixed.unflatten(0, q_BSHC.shape[:2])


def _flash4(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    ends, longest = visible.document_ends(q_BSHC.shape[0])
    limits = (None, None) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BSGC, v_BSGC))
    mixed = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, window_size=limits,
    )  # fmt: skip
    return (mixed[0] if isinstance(mixed, tuple) else mixed).unflatten(0, q_BSHC.shape[:2])


def _flash2(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None, visible: Visibility) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    ends, longest = visible.document_ends(q_BSHC.shape[0])
    limits = (-1, -1) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BSGC, v_BSGC))
    mixed = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True, window_size=limits)
    return mixed.unflatten(0, q_BSHC.shape[:2])


_ENGINES = {"sdpa": _sdpa, "varlen": _varlen, "flex": _flex, "flash4": _flash4, "flash2": _flash2}
