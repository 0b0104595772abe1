"""Key-value cache: a new token attends to the kept keys and values of earlier tokens, which are not computed again.

- Global layers keep every token. Local layers keep the last `window` tokens in a ring: column c is in slot c mod w.
  Keys are kept after QK-norm and RoPE, so that one new token attends to the slots in any order.
- Several new tokens at once (a chunk of a prompt) attend to the cached ones and to each other by exactly the rule of
  one pass over the whole text; a chunk on a local layer reads the last w − 1 keys before it.
- Rows of different length end in the same column: shorter ones are padded on the left. Padding is a document of its
  own, to which no token attends, and a row's positions count from its first token.

A row takes 2·G·C numbers per layer and token, on local layers for at most `window` tokens. Tensors are allocated by the
first forward pass, in the dtype of its keys.

Shapes: B rows, S new tokens of each row, U keys in the order of columns, L slots, H query heads, G key/value heads, C
head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.models.attention_backends import AttentionMask, Keys, attend


class Step:
    """The columns that one forward pass adds; shared by all layers.

    Args:
        start: columns before them.
        count: S.
        padding_B: [B] int64, how many columns on the left of each row are padding; None: none in any row.
        device: of the model.
        engine: of attention, for several new columns.
    """

    def __init__(self, start: int, count: int, padding_B: Tensor | None, device: torch.device, engine: str) -> None:
        self.start, self.count, self._padding_B, self._device, self._engine = start, count, padding_B, device, engine
        self.positions_BS = self._positions(start)
        self._masks: dict[int, AttentionMask] = {}
        self._slot_masks: dict[int, Tensor] = {}

    @property
    def mask(self) -> AttentionMask:
        """The mask among the new columns alone."""
        return self.mask_from(self.start)

    def mask_from(self, first: int) -> AttentionMask:
        """The mask of the new columns over those from `first` on."""
        if first not in self._masks:
            positions_BU = self._positions(first)
            keys = None if first == self.start else Keys(positions_BU, self._documents(positions_BU))
            plain = first == self.start == 0 and self._padding_B is None
            self._masks[first] = AttentionMask(
                self.positions_BS, self._documents(self.positions_BS), plain, self._engine, keys=keys
            )
        return self._masks[first]

    def slot_mask(self, slots: int) -> Tensor | None:
        """[B, 1, 1, slots] bool: which slots of a layer hold no padding; None if none of them does. For S = 1."""
        if self._padding_B is None:
            return None
        if slots not in self._slot_masks:
            slot_L = torch.arange(slots, device=self._device)
            column_L = self.start - (self.start - slot_L) % slots  # the last column of each slot
            self._slot_masks[slots] = (column_L >= self._padding_B.unsqueeze(1)).view(-1, 1, 1, slots)
        return self._slot_masks[slots]

    def _positions(self, first: int) -> Tensor:
        columns_1U = torch.arange(first, self.start + self.count, device=self._device).unsqueeze(0)
        return columns_1U if self._padding_B is None else columns_1U - self._padding_B.unsqueeze(1)

    def _documents(self, positions_BU: Tensor) -> Tensor | None:
        """Padding is a document, to which a row's own tokens do not belong."""
        return None if self._padding_B is None else (positions_BU >= 0).int()


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
    def attend(self, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
        """Add the new keys and values; softmax attention of the new queries to all keys in their reach.

        Args:
            q_BSHC, k_BSGC, v_BSGC: the new tokens', one dtype; H is a multiple of G.
        Returns:
            [B, S, H, C], same dtype.
        """
        step, window = self.step, self.window
        assert step is not None
        if step.count == 1 and step.start > 0:
            return self.attend_once(q_BSHC[:, 0], k_BSGC[:, 0], v_BSGC[:, 0]).unsqueeze(1)
        new = torch.stack((k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)))
        if step.start == 0:
            self._append(new, step)
            return attend(q_BSHC, k_BSGC, v_BSGC, window, step.mask)
        if window is None:
            before, keys_values = step.start, self._append(new, step)
        else:
            before = min(window - 1, step.start)
            keys_values = torch.cat((self._last(before, step.start), new), dim=3)
            self._append(new, step)
        k_BUGC, v_BUGC = keys_values.transpose(2, 3)
        return attend(q_BSHC, k_BUGC, v_BUGC, window, step.mask_from(step.start - before))

    def attend_once(self, q_BHC: Tensor, k_BGC: Tensor, v_BGC: Tensor) -> Tensor:
        """`attend` for one new token of each row after others, [B, H, C]; H/G heads are queries of one key head."""
        step = self.step
        assert step is not None
        assert self._kv is not None
        end = step.start + 1
        kv = self._reserve(end, self._kv)
        B, G, slots, C = kv.shape[1:]
        k_BGLC, v_BGLC = kv.unbind()
        k_BGLC.select(2, step.start % slots).copy_(k_BGC)
        v_BGLC.select(2, step.start % slots).copy_(v_BGC)
        if end < slots:
            k_BGLC, v_BGLC = k_BGLC.narrow(2, 0, end), v_BGLC.narrow(2, 0, end)
        mask = step.slot_mask(min(end, slots))
        mixed = F.scaled_dot_product_attention(q_BHC.reshape(B, G, -1, C), k_BGLC, v_BGLC, attn_mask=mask)
        return mixed.reshape(q_BHC.shape)

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
        first, new = (end - written) % slots, new.narrow(3, step.count - written, written)
        before_wrap = min(written, slots - first)
        kv.narrow(3, first, before_wrap).copy_(new.narrow(3, 0, before_wrap))
        if before_wrap < written:
            kv.narrow(3, 0, written - before_wrap).copy_(new.narrow(3, before_wrap, written - before_wrap))
        return kv.narrow(3, 0, min(end, slots))

    def _reserve(self, columns: int, new: Tensor) -> Tensor:
        """Memory for this number of columns. Until a ring is full, column c is in slot c, so that it can grow."""
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


class KVCache:
    """Keys and values of the tokens of a batch so far; pass it to each forward pass of the model.

    Args:
        config: the model's sizes.
        padding: for each row, how many tokens on its left are padding.
        capacity: expected number of tokens of a row, padding included; more are possible.
    """

    def __init__(self, config: ModelConfig, padding: Sequence[int] = (0,), capacity: int = 0) -> None:
        self.padding, self.length = list(padding), 0
        self._padding_B: Tensor | None = None
        self.layers = [
            LayerCache(None if config.is_global(layer) else config.window, capacity) for layer in range(config.layers)
        ]

    @property
    def bytes(self) -> int:
        """Allocated memory."""
        return sum(layer.bytes for layer in self.layers)

    def begin(self, count: int, device: torch.device, engine: str = "auto") -> Step:
        """Begin a forward pass that adds `count` columns; engine: of attention, as in AttentionMask."""
        if self._padding_B is None and any(self.padding):
            self._padding_B = torch.tensor(self.padding, device=device)
        step = Step(self.length, count, self._padding_B, device, engine)
        for layer in self.layers:
            layer.step = step
        self.length += count
        return step

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep these rows alone, in this order."""
        rows_R = torch.tensor(rows, device=device)
        for layer in self.layers:
            layer.keep(rows_R)
        self.padding, self._padding_B = [self.padding[row] for row in rows], None
