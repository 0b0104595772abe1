"""Context parallelism: the ranks of a group divide the tokens of the same rows among themselves.

Rank r of the N ranks has columns [r·C, (r+1)·C) of every row, C = S/N. Only two parts of the model need the others:

    local attention     halo: the last w − 1 keys and values before the chunk are sent from the ranks before, which are
                        several where the window is longer than a chunk. Bytes do not depend on S
    global attention    heads (Ulysses, arXiv 2309.14509): an all-to-all turns the chunk of all heads into whole rows of
                        H/N heads, and back. Each rank's engine sees the problem of one process, with fewer heads, so
                        ranks have equal work under any document mask. Key/value heads are replicated where N exceeds
                        them
                        gather, where N does not fit the heads (`heads_fit`): a halo of all keys before the chunk. The
                        last rank then has the most work
    sequence-wise loss  counts of chosen experts are summed over the group; see trinity_kernels.routing

Backward is the adjoint: the same exchange with the two ends exchanged, and gradients of replicated keys are added.

Shapes: B rows, S tokens of a row, C tokens of a chunk, N ranks, R index of this rank, U keys, h halo, H query heads,
G key/value heads, D head width, E experts.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.models.attention_backends import AttentionMask, Keys
from trinity_kernels.replay import kept

all_to_all = torch.ops._c10d_functional.all_to_all_single
all_reduce = torch.ops._c10d_functional.all_reduce
wait = torch.ops._c10d_functional.wait_tensor


class ContextParallel:
    """The ranks that divide the same rows among themselves.

    Args:
        group: of N ranks, in the order of their chunks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.index = group.group_name, group.size(), group.rank()

    def columns(self, length: int) -> slice:
        """This rank's columns of rows of `length` tokens, which N must divide."""
        chunk = length // self.size
        return slice(self.index * chunk, (self.index + 1) * chunk)


def row_parts(
    context: ContextParallel | None, tokens_BC: Tensor, row_ids_BS: Tensor | None, documents: int | None, engine: str
) -> "ContextParts | None":
    """The argument `parts` of a model's forward pass; None where each rank has whole rows.

    Args:
        context: of this rank; see Ranks.context.
        tokens_BC: this rank's chunk of its rows, on the device.
        row_ids_BS, documents: the document mask of whole rows, as AttentionMask takes it.
        engine: the model's attention engine.
    """
    return None if context is None else ContextParts(context, tokens_BC, row_ids_BS, documents, engine)


class Halo(NamedTuple):
    """Tokens that the ranks of a group send each other, so that each has the keys before its chunk that it attends to.

    sent, received: [N] numbers of tokens to and from each rank.
    """

    sent: list[int]
    received: list[int]

    @property
    def keys(self) -> int:
        """h: keys that this rank gets, the last ones before its chunk."""
        return sum(self.received)


def halo(reach: int, chunk: int, size: int, index: int) -> Halo:
    """Which tokens of its chunk a rank sends: to the rank d places on, those among the last `reach` before its chunk.

    Args:
        reach: how many keys before its own a query attends to: w − 1, or all tokens before it.
        chunk: C. size: N. index: R.
    """

    def tokens(distance: int) -> int:
        return min(max(reach - (distance - 1) * chunk, 0), chunk) if distance > 0 else 0

    return Halo([tokens(to - index) for to in range(size)], [tokens(index - source) for source in range(size)])


def heads_fit(heads: int, kv_heads: int, size: int) -> bool:
    """Whether N ranks can split the heads: equal shares that are whole groups of query heads, or parts of one group."""
    group = heads // kv_heads
    return heads % size == 0 and ((heads // size) % group == 0 or group % (heads // size) == 0)


class ContextParts:
    """This rank's part of the rows of one forward pass: the RowParts of the model. See row_parts."""

    def __init__(
        self,
        context: ContextParallel,
        tokens_BC: Tensor,
        row_ids_BS: Tensor | None,
        documents: int | None,
        engine: str,
    ) -> None:
        self._context, self._length = context, tokens_BC.shape[1] * context.size
        self._ids_BS, self._documents, self._engine = row_ids_BS, documents, engine
        self._positions_1S = torch.arange(self._length, device=tokens_BC.device).unsqueeze(0)
        self._columns = context.columns(self._length)
        self.positions_BS = self._positions_1S[:, self._columns]
        self._masks: dict[int, AttentionMask] = {}  # by keys before the chunk; of whole rows: by S

    @torch.compiler.disable
    def before_attention(
        self, q_BCHD: Tensor, k_BCGD: Tensor, v_BCGD: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
        """See trinity.models.row_parts.RowParts."""
        if window is None and heads_fit(q_BCHD.shape[2], k_BCGD.shape[2], self._context.size):
            return *self._to_heads(q_BCHD, k_BCGD, v_BCGD), self._mask_of_rows()
        reach = self._length if window is None else window - 1
        shape = halo(reach, q_BCHD.shape[1], self._context.size, self._context.index)
        if reach:  # else no rank needs keys of another
            k_BCGD, v_BCGD = self._with_halo(k_BCGD, v_BCGD, shape)
        return q_BCHD, k_BCGD, v_BCGD, self._mask_of_chunk(shape.keys)

    @torch.compiler.disable
    def after_attention(self, mixed: Tensor, window: int | None) -> Tensor:
        """See trinity.models.row_parts.RowParts."""
        return self._from_heads(mixed) if mixed.shape[1] == self._length else mixed

    @torch.compiler.disable
    def row_counts(self, counts_BE: Tensor) -> Tensor:
        """See trinity.models.row_parts.RowParts."""
        total_BE: Tensor = kept(sum_over_group, counts_BE, self._context.group)
        return total_BE

    def _to_heads(self, q_BCHD: Tensor, k_BCGD: Tensor, v_BCGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks of all heads to whole rows of this rank's heads: q [B, S, H/N, D], k and v [B, S, max(1, G/N), D]."""
        N = self._context.size
        copies = max(1, N // k_BCGD.shape[2])
        parts = [q_BCHD, *(x.repeat_interleave(copies, dim=2) if copies > 1 else x for x in (k_BCGD, v_BCGD))]
        by_rank = [x.unflatten(2, (N, -1)).movedim(2, 0) for x in parts]
        received = self._exchange(torch.cat(by_rank, dim=3))
        q, k, v = received.movedim(0, 1).flatten(1, 2).split([x.shape[3] for x in by_rank], dim=2)
        return q, k, v

    def _from_heads(self, mixed: Tensor) -> Tensor:
        """Whole rows of this rank's heads [B, S, H/N, D] to its chunk of all heads [B, C, H, D]."""
        sent = mixed.unflatten(1, (self._context.size, -1)).movedim(1, 0)
        return self._exchange(sent).movedim(0, 2).flatten(2, 3)

    def _with_halo(self, k_BCGD: Tensor, v_BCGD: Tensor, shape: Halo) -> tuple[Tensor, Tensor]:
        """Keys and values of the halo and of the chunk, [B, h + C, G, D] each."""
        C = k_BCGD.shape[1]
        # no slice is left out where it is empty: every rank takes part in backward as well
        tails = [torch.stack((k_BCGD[:, C - n :], v_BCGD[:, C - n :])).movedim(2, 0) for n in shape.sent]
        got = _AllToAll.apply(torch.cat(tails), shape.received, shape.sent, self._context.group)
        k_BhGD, v_BhGD = got.movedim(0, 2).unbind(0)
        return torch.cat((k_BhGD, k_BCGD), dim=1), torch.cat((v_BhGD, v_BCGD), dim=1)

    def _exchange(self, x: Tensor) -> Tensor:
        """x[p] to rank p, for each of the N ranks; the result's [p] is from rank p."""
        result: Tensor = _AllToAll.apply(x, [1] * len(x), [1] * len(x), self._context.group)
        return result

    def _mask_of_rows(self) -> AttentionMask:
        """The mask of whole rows."""
        if self._length not in self._masks:
            ids_BS, engine, documents = self._ids_BS, self._engine, self._documents
            self._masks[self._length] = AttentionMask(self._positions_1S, ids_BS, True, engine, documents)
        return self._masks[self._length]

    def _mask_of_chunk(self, keys_before: int) -> AttentionMask:
        """The mask of the chunk's queries, where `keys_before` keys precede the chunk; one for all layers of a kind."""
        if keys_before not in self._masks:
            ids_BS, own = self._ids_BS, self._columns
            around = slice(own.start - keys_before, own.stop)
            keys = Keys(self._positions_1S[:, around], None if ids_BS is None else ids_BS[:, around])
            self._masks[keys_before] = AttentionMask(
                self.positions_BS,
                None if ids_BS is None else ids_BS[:, own],
                True,
                self._engine,
                self._documents,
                keys if keys_before else None,
            )
        return self._masks[keys_before]


def sum_over_group(counts_BE: Tensor, group: str) -> Tensor:
    """The sum of counts over the ranks of a group; every rank calls it."""
    total_BE: Tensor = wait(all_reduce(counts_BE.contiguous(), "sum", group))
    return total_BE


class _AllToAll(torch.autograd.Function):
    """All-to-all of the first dimension; in backward, the gradients go back.

    received, sent: how much of the first dimension comes from and goes to each rank.
    """

    @staticmethod
    def forward(ctx, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return wait(all_to_all(x.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return wait(all_to_all(grad.contiguous(), ctx.sent, ctx.received, ctx.group)), None, None, None
