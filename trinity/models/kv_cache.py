"""Key-value cache: a new token attends to the kept keys and values of earlier tokens, which are not computed again.

- Global layers keep every token. Local layers keep the last `window` tokens in a ring: column c is in slot c mod w.
  Keys are kept after QK-norm and RoPE, so that one new token attends to the slots in any order.
- Several new tokens at once (a chunk of a prompt) attend to the cached ones and to each other by exactly the rule of
  one pass over the whole text; a chunk on a local layer reads the last w − 1 keys before it.
- Rows of different length end in the same column: shorter ones are padded on the left. Padding is a document of its
  own, to which no token attends, and a row's positions count from its first token.

A row takes 2·G·C numbers per layer and token, on local layers for at most `window` tokens. Tensors are allocated by the
first forward pass, in the dtype of its keys.

Shapes: B rows, S new tokens of each row, Q queries of a block, L keys, H query heads, G key/value heads, C head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.models.attention_backends import AttentionMask, attend

QUERY_BLOCK = 512
"""Queries of a later chunk that attend together, which bounds the size of their mask."""


class Step:
    """The columns that one forward pass adds; shared by all layers.

    Args:
        start: columns before them.
        count: S.
        padding_B: [B] int64, how many columns on the left of each row are padding; None: none in any row.
        device: of the model.
    """

    def __init__(self, start: int, count: int, padding_B: Tensor | None, device: torch.device) -> None:
        self.start, self.count, self._padding_B, self._device = start, count, padding_B, device
        columns_1S = torch.arange(start, start + count, device=device).unsqueeze(0)
        self.positions_BS = columns_1S if padding_B is None else columns_1S - padding_B.unsqueeze(1)
        self._slots: dict[int, Tensor | None] = {}

    def mask_of_new(self, engine: str) -> AttentionMask:
        """The mask among the new columns alone."""
        document_ids_BS = None if self._padding_B is None else (self.positions_BS >= 0).int()
        plain = self.start == 0 and self._padding_B is None
        return AttentionMask(self.positions_BS, document_ids_BS, plain, engine)

    def chunk_mask(self, first_query: int, queries: int, first_key: int, keys: int, window: int | None) -> Tensor:
        """[B or 1, 1, Q, L] bool: whether the query in one column attends to the key in another."""
        query_Q1 = torch.arange(first_query, first_query + queries, device=self._device).unsqueeze(1)
        key_L = torch.arange(first_key, first_key + keys, device=self._device)
        distance_QL = query_Q1 - key_L
        allowed_BQL = (distance_QL >= 0).unsqueeze(0)
        if window is not None:
            allowed_BQL = allowed_BQL & (distance_QL < window)
        if self._padding_B is not None:
            padding_B11 = self._padding_B.view(-1, 1, 1)
            allowed_BQL = allowed_BQL & ((query_Q1 < padding_B11) == (key_L < padding_B11))
        return allowed_BQL.unsqueeze(1)

    def slot_mask(self, slots: int) -> Tensor | None:
        """[B, 1, 1, L] bool: which of the first L slots of a layer hold no padding; None if none does. For S = 1."""
        if self._padding_B is None:
            return None
        if slots not in self._slots:
            slot_L, last = torch.arange(slots, device=self._device), self.start
            column_L = last - (last - slot_L) % slots  # the last column of each slot
            self._slots[slots] = (column_L >= self._padding_B.unsqueeze(1)).view(-1, 1, 1, slots)
        return self._slots[slots]


class LayerCache:
    """Keys and values of one layer.

    Args:
        window: tokens that a query attends to, itself included; None on a global layer.
        capacity: expected number of columns; beyond it the memory doubles.
    """

    def __init__(self, window: int | None, capacity: int) -> None:
        self.window, self._capacity = window, capacity
        self._kv: Tensor | None = None  # [2, B, G, slots, C]
        self.step: Step | None = None

    @torch.compiler.disable
    def attend(self, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask: AttentionMask) -> Tensor:
        """Add the new keys and values; softmax attention of the new queries to all keys in their reach.

        Args:
            q_BSHC, k_BSGC, v_BSGC: the new tokens', one dtype; H is a multiple of G.
            mask: among the new tokens.
        Returns:
            [B, S, H, C], same dtype.
        """
        step = self.step
        assert step is not None
        new = torch.stack((k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)))
        if step.start == 0:
            self._append(new, step)
            return attend(q_BSHC, k_BSGC, v_BSGC, self.window, mask)
        if step.count == 1:
            k_BGLC, v_BGLC = self._append(new, step)
            return _grouped_attention(q_BSHC, k_BGLC, v_BGLC, step.slot_mask(k_BGLC.shape[2]))
        if self.window is None:
            keys_values = self._append(new, step)
        else:
            keys_values = torch.cat((self._last(min(self.window - 1, step.start), step.start), new), dim=3)
            self._append(new, step)
        return self._attend_in_blocks(q_BSHC, keys_values, step)

    def keep(self, rows_R: Tensor) -> None:
        """Keep these rows alone."""
        if self._kv is not None:
            self._kv = self._kv.index_select(1, rows_R)

    @property
    def bytes(self) -> int:
        """Allocated memory."""
        return 0 if self._kv is None else self._kv.nbytes

    def _append(self, new: Tensor, step: Step) -> Tensor:
        """Write the new columns; returns the slots that hold any, [2, B, G, L, C]."""
        end = step.start + step.count
        kv = self._reserve(end, new)
        slots = kv.shape[3]
        written = min(step.count, slots)
        first, new = (end - written) % slots, new[..., step.count - written :, :]
        before_wrap = min(written, slots - first)
        kv[..., first : first + before_wrap, :] = new[..., :before_wrap, :]
        if before_wrap < written:
            kv[..., : written - before_wrap, :] = new[..., before_wrap:, :]
        return kv[..., : min(end, slots), :]

    def _reserve(self, columns: int, new: Tensor) -> Tensor:
        """Memory for so many columns: until a ring is full, column c is in slot c, so that it can grow."""
        held = 0 if self._kv is None else self._kv.shape[3]
        limit = columns if self.window is None else min(columns, self.window)
        if self._kv is None or held < limit:
            slots = max(limit, 2 * held, self._capacity)
            slots = slots if self.window is None else min(slots, self.window)
            grown = new.new_empty((*new.shape[:3], slots, new.shape[4]))
            if self._kv is not None:
                grown[..., :held, :] = self._kv
            self._kv = grown
        return self._kv

    def _last(self, columns: int, end: int) -> Tensor:
        """The last columns before column `end`, in order, [2, B, G, columns, C]."""
        assert self._kv is not None
        slots = self._kv.shape[3]
        first = (end - columns) % slots
        before_wrap = min(columns, slots - first)
        parts = (self._kv[..., first : first + before_wrap, :], self._kv[..., : columns - before_wrap, :])
        return torch.cat(parts, dim=3) if before_wrap < columns else parts[0]

    def _attend_in_blocks(self, q_BSHC: Tensor, keys_values: Tensor, step: Step) -> Tensor:
        """Attention of a chunk's queries; keys_values [2, B, G, L, C] end with the chunk's last column."""
        before = keys_values.shape[3] - step.count  # keys that precede the chunk
        mixed = []
        for first in range(0, step.count, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, step.count)
            low = 0 if self.window is None else max(0, before + first - self.window + 1)
            k_BGLC, v_BGLC = keys_values[..., low : before + end, :]
            allowed = step.chunk_mask(
                step.start + first, end - first, step.start - before + low, k_BGLC.shape[2], self.window
            )
            mixed.append(_grouped_attention(q_BSHC[:, first:end], k_BGLC, v_BGLC, allowed))
        return torch.cat(mixed, dim=1)


def _grouped_attention(q_BQHC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√C)·v. The H/G heads that share a key head are computed as one head of H/G·Q queries.

    Args:
        allowed: [B or 1, 1, Q, L] bool; None: each query attends to each key.
    Returns:
        [B, Q, H, C].
    """
    B, Q, H, C = q_BQHC.shape
    G = k_BGLC.shape[1]
    q = q_BQHC.transpose(1, 2).reshape(B, G, H // G * Q, C)
    if allowed is not None and Q > 1:
        allowed = allowed.repeat(1, 1, H // G, 1)
    mixed = F.scaled_dot_product_attention(q, k_BGLC, v_BGLC, attn_mask=allowed)
    return mixed.reshape(B, H, Q, C).transpose(1, 2)


class KVCache:
    """Keys and values of the tokens of a batch so far; pass it to each forward pass of the model.

    Args:
        config: the model's sizes.
        padding: for each row, how many tokens on its left are padding.
        capacity: expected number of tokens of a row, padding included; more are possible.
    """

    def __init__(self, config: ModelConfig, padding: Sequence[int] = (0,), capacity: int = 0) -> None:
        self.padding, self.length = list(padding), 0
        self.layers = [
            LayerCache(None if config.is_global(layer) else config.window, capacity) for layer in range(config.layers)
        ]

    @property
    def bytes(self) -> int:
        """Allocated memory."""
        return sum(layer.bytes for layer in self.layers)

    def begin(self, count: int, device: torch.device) -> Step:
        """Begin a forward pass that adds `count` columns."""
        padding_B = torch.tensor(self.padding, device=device) if any(self.padding) else None
        step = Step(self.length, count, padding_B, device)
        for layer in self.layers:
            layer.step = step
        self.length += count
        return step

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep these rows alone, in this order."""
        rows_R = torch.tensor(rows, device=device)
        for layer in self.layers:
            layer.keep(rows_R)
        self.padding = [self.padding[row] for row in rows]
