"""The attention mask, and the engines that compute softmax attention under it.

A token attends to itself and to earlier tokens of its row; on a local layer only to those fewer than `window` positions
back; with document ids only to those of its own document. "Earlier" refers to the positions, so positions must increase
along a row. They do not restart at a document: RoPE is relative, so that would change nothing inside a document, and
without a document mask (Nano, Mini) attention crosses documents and needs one running position.

The keys may be more than the queries: those of earlier tokens, which another process computed (context parallelism) or
an earlier forward pass did (a key-value cache). The mask then has a key side (`Keys`).

Engines:
    sdpa             torch, with a dense mask; runs everywhere, float64 included: the reference
    blocks           the same in blocks of queries that read only the keys in reach; CPU, in fp32 and 16 bits
    varlen           torch's own FlashAttention 2; CUDA
    flex             torch, compiled; CUDA, and a CPU without gradients
    flash4, flash2   the packages flash-attn-4 and flash-attn; CUDA
    auto             in 16 bits on CUDA the first available one of flash4, flash2, varlen; on a CPU blocks; else sdpa

Shapes: B batch, S sequence: the queries of a row, U its keys (S, unless the mask has a key side), H query heads,
G key/value heads, C head width, N documents.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.errors import UserError
from trinity.models import attention_blocks
from trinity_kernels.linear import matmul_operand

Result = TypeVar("Result")

ENGINE_NAMES = ("auto", "sdpa", "blocks", "varlen", "flex", "flash4", "flash2")

DOCUMENTS_STEP = 32
"""A known number of documents is rounded up to a multiple of it."""

ANY_ORDER = frozenset({"sdpa", "flex"})
"""Engines that need no order between queries and keys: they take any mask."""


class Keys(NamedTuple):
    """The key side of a mask, where the keys are not those of the queries' tokens alone.

    positions_BU: [B or 1, U] int64, increasing along each row unless `queries_last` is False.
    document_ids_BU: [B, U] integer, equal within a document, contiguous; None exactly if the queries have none.
    queries_last: the queries are the last S of the U keys in every row. Otherwise queries and keys are in any order,
        e.g. the slots of a cache, of which some are empty: give those a position after every query. Only the engines of
        ANY_ORDER take such a mask, and sdpa replaces any other one.
    """

    positions_BU: Tensor
    document_ids_BU: Tensor | None = None
    queries_last: bool = True


class Segments(NamedTuple):
    """Documents as sequences of uneven length in the flattened batch, for engines that take them.

    queries, keys: [N + 1] int32, the start of each document among B·S queries and B·U keys, and the end. The last
        queries of a document are aligned with its last keys. A document may have keys and no queries.
    most_queries, most_keys: of one document: S and U.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


class AttentionMask:
    """The mask of one forward pass in each form that an engine takes.

    Each form is computed once per kind of layer (local or global) and shared by all layers of that kind.

    Args:
        positions_BS: [B or 1, S] int64, increasing along each row.
        document_ids_BS: [B, S] integer, equal within a document, contiguous; None: a row is one document.
        default_positions: whether positions are 0…S−1 in every row, so that engines may use their own causal mask.
        engine: one of ENGINE_NAMES.
        documents: at least N, the number of documents in document_ids_BS, each row beginning a new one; None: not
            known. With it, cu_seqlens need not wait for the device. A number below N gives wrong results. With a key
            side, N is the number of documents among the keys.
        keys: the key side; None: the keys are those of the queries' tokens.
    """

    def __init__(
        self,
        positions_BS: Tensor,
        document_ids_BS: Tensor | None,
        default_positions: bool = False,
        engine: str = "auto",
        documents: int | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.positions_BS, self.document_ids_BS = positions_BS, document_ids_BS
        self.has_key_side, self.keys = keys is not None, keys or Keys(positions_BS, document_ids_BS)
        # rounded up, because torch.compile compiles for each number
        self.most_documents = None if documents is None else -(-documents // DOCUMENTS_STEP) * DOCUMENTS_STEP
        self.default_positions, self.engine = default_positions, engine
        self._cache: dict[object, Any] = {}

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def cached(self, key: object, make: Callable[[], Result]) -> Result:
        """The result of make(), cached under `key` for the rest of this forward pass."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def is_causal_only(self, window: int | None) -> bool:
        """Whether the causal mask over the whole row is the only restriction, with a key for each query."""
        if self.has_key_side:
            return False
        unlimited = window is None or window >= self.sequence_length
        return self.default_positions and self.document_ids_BS is None and unlimited

    def dense(self, window: int | None) -> Tensor:
        """[B or 1, 1, S, U] bool: whether query i (second to last) attends to key j (last)."""
        return self.cached(("dense", window), partial(self._dense, window))

    def _dense(self, window: int | None) -> Tensor:
        distance = self.positions_BS.unsqueeze(-1) - self.keys.positions_BU.unsqueeze(-2)
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        if self.document_ids_BS is not None:
            assert self.keys.document_ids_BU is not None
            allowed = allowed & (self.document_ids_BS.unsqueeze(-1) == self.keys.document_ids_BU.unsqueeze(-2))
        return allowed.unsqueeze(1)

    def segments(self, batch: int) -> Segments:
        """The documents as sequences of uneven length; queries_last must hold."""
        return self.cached("segments", partial(self._segments, batch))

    def _segments(self, batch: int) -> Segments:
        assert self.keys.queries_last
        S, U = self.sequence_length, self.keys.positions_BU.shape[1]
        keys, _ = self.cu_seqlens(batch)
        return Segments(keys if S == U else queries_before(keys, S, U), keys, S, U)

    def cu_seqlens(self, batch: int) -> tuple[Tensor, int]:
        """Boundaries of documents among the keys of the flattened batch.

        Returns:
            cu_seqlens [N + 1] int32: the start of each document and B·U; and the longest possible document, U. If a
            bound on N was given, it is longer: B·U is repeated, as documents without tokens. If none was given, the
            forward pass waits for the device here, to count the documents, and nowhere else.
        """
        return self.cached("cu_seqlens", partial(self._cu_seqlens, batch))

    def _cu_seqlens(self, batch: int) -> tuple[Tensor, int]:
        ids_BU = self.keys.document_ids_BU
        device, U = self.keys.positions_BU.device, self.keys.positions_BU.shape[1]
        if ids_BU is None:
            return torch.arange(0, batch * U + 1, U, dtype=torch.int32, device=device), U
        starts_BU = torch.ones_like(ids_BU, dtype=torch.bool)
        starts_BU[:, 1:] = ids_BU[:, 1:] != ids_BU[:, :-1]
        starts_T = starts_BU.flatten()
        if self.most_documents is None:
            starts = F.pad(starts_T.nonzero(), (0, 0, 0, 1), value=batch * U)
        else:
            starts = torch.nonzero_static(starts_T, size=self.most_documents + 1, fill_value=batch * U)
        return starts.squeeze(1).to(torch.int32), U


def queries_before(keys: Tensor, S: int, U: int) -> Tensor:
    """How many queries come before each of some boundaries among the keys, in a batch whose rows end with the queries.

    Key j of row b is at b·U + j. The first U − S keys of a row have no query, so b·S + max(0, j − (U − S)) queries come
    before it.

    Args:
        keys: boundaries from 0 to B·U, integer.
        S, U: queries and keys of a row.
    Returns:
        numbers from 0 to B·S, dtype and shape of `keys`.
    """
    return keys // U * S + (keys % U - (U - S)).clamp(min=0)


def attend(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    """softmax(q·kᵀ/√C)·v under the mask.

    Args:
        q_BSHC, k_BUGC, v_BUGC: one dtype; H is a multiple of G.
        window: how many tokens a token attends to, itself included; None: all earlier ones.
    Returns:
        [B, S, H, C], same dtype.
    """
    engine = pick_engine(mask.engine, q_BSHC.device.type, q_BSHC.dtype)
    if not mask.keys.queries_last and engine not in ANY_ORDER:
        engine = "sdpa"
    return _ENGINES[engine](q_BSHC, k_BUGC, v_BUGC, window, mask)


@cache
def pick_engine(name: str, device: str, dtype: torch.dtype) -> str:
    """Resolve an engine name for a device type and dtype: "auto" becomes the best available engine.

    Raises:
        UserError: unknown name, or an engine that cannot run there.
    """
    flash_runs = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    available = {
        "sdpa": True,
        "blocks": device == "cpu" and dtype != torch.float64 and attention_blocks.can_run(),
        "varlen": flash_runs,
        "flex": True,
        "flash4": flash_runs and _is_installed("flash_attn.cute"),
        "flash2": flash_runs and _is_installed("flash_attn.flash_attn_interface"),
    }
    if name == "auto":
        return next((engine for engine in ("flash4", "flash2", "varlen", "blocks") if available[engine]), "sdpa")
    if name not in available:
        raise UserError(f"kernels.attention={name} is not known; use one of {', '.join(ENGINE_NAMES)}")
    if not available[name]:
        if name == "blocks":
            raise UserError(
                f"kernels.attention=blocks needs a CPU and fp32 or 16 bits, not {device} and {dtype}; use auto"
            )
        package = {"flash4": "the package flash-attn-4 and ", "flash2": "the package flash-attn and "}.get(name, "")
        raise UserError(
            f"kernels.attention={name} needs {package}a CUDA device in 16 bits, not {device} in {dtype}; use auto"
        )
    return name


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _sdpa(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    q, k, v = (matmul_operand(x.transpose(1, 2)) for x in (q_BSHC, k_BUGC, v_BUGC))
    if mask.is_causal_only(window):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(window), enable_gqa=True)
    return mixed.transpose(1, 2).to(q_BSHC.dtype)


def _blocks(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    if mask.is_causal_only(window):
        return _sdpa(q_BSHC, k_BUGC, v_BUGC, window, mask)  # torch skips what is above the diagonal by itself
    q, k, v = (matmul_operand(x.transpose(1, 2)) for x in (q_BSHC, k_BUGC, v_BUGC))

    def make() -> Tensor:
        allowed = mask.dense(window)
        return torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)

    bias = mask.cached(("bias", window, q.dtype), make)
    return attention_blocks.block_attention(q, k, v, bias, window).transpose(1, 2).to(q_BSHC.dtype)


def _flex(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    batch, queries, keys = *q_BSHC.shape[:2], k_BUGC.shape[1]
    positions, key_positions = mask.positions_BS.expand(batch, -1), mask.keys.positions_BU.expand(batch, -1)
    documents, key_documents = mask.document_ids_BS, mask.keys.document_ids_BU

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = positions[b, i] - key_positions[b, j]
        allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if documents is None or key_documents is None:
            return allowed
        return allowed & (documents[b, i] == key_documents[b, j])

    def make() -> BlockMask:
        return create_block_mask(mask_mod, batch, None, queries, keys, device=q_BSHC.device)

    block_mask = mask.cached(("blocks", window), make)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BUGC, v_BUGC))
    return _flex_function()(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


@cache
def _flex_function() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # without compilation, flex holds all scores at once
    function: Any = torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention
    return function


def _varlen(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    segments = mask.segments(q_BSHC.shape[0])
    left = -1 if window is None else window - 1
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BUGC, v_BUGC))
    mixed = _varlen_function()(q, k, v, *segments, window_size=(left, 0))
    return mixed.unflatten(0, q_BSHC.shape[:2])


@cache
def _varlen_function() -> Callable[..., Tensor]:
    """torch's varlen_attn, which takes fewer key and value heads than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    function: Callable[..., Any] = varlen_attn
    if "enable_gqa" in signature(varlen_attn).parameters:
        return partial(function, enable_gqa=True)
    return FewerHeads(function)  # torch 2.11 does not check the heads, and its kernel takes fewer of them


class FewerHeads:
    """A varlen_attn without a parameter for grouped queries: called with G key and value heads, or else with H.

    If a call with G heads fails and the same call with each repeated H/G times does not, G heads are not tried again.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.repeats = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """varlen_attn; k and v are [T, G, C]."""
        if not self.repeats:
            try:
                mixed: Tensor = self._function(q, k, v, *arguments, **options)
                return mixed
            except (ValueError, RuntimeError):
                if q.shape[1] == k.shape[1]:
                    raise
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        mixed = self._function(q, k, v, *arguments, **options)
        self.repeats = True
        return mixed


def _flash4(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    segments = mask.segments(q_BSHC.shape[0])
    limits = (None, None) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BUGC, v_BUGC))
    mixed = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=segments.queries, cu_seqlens_k=segments.keys, max_seqlen_q=segments.most_queries,
        max_seqlen_k=segments.most_keys, causal=True, window_size=limits,
    )  # fmt: skip
    return (mixed[0] if isinstance(mixed, tuple) else mixed).unflatten(0, q_BSHC.shape[:2])


def _flash2(q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    segments = mask.segments(q_BSHC.shape[0])
    limits = (-1, -1) if window is None else (window - 1, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BUGC, v_BUGC))
    mixed = flash_attn_varlen_func(q, k, v, *segments, causal=True, window_size=limits)
    return mixed.unflatten(0, q_BSHC.shape[:2])


_ENGINES = {"sdpa": _sdpa, "blocks": _blocks, "varlen": _varlen, "flex": _flex, "flash4": _flash4, "flash2": _flash2}
