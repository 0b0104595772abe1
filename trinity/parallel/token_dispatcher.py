"""The token dispatcher of expert parallelism: send tokens to the ranks of their experts, and combine the results.

Rank p of the P ranks of an expert group holds experts [p·E/P, (p+1)·E/P). One layer's forward pass:

    counts      exchange the numbers of rows and choices between ranks      ─► sizes of the all-to-alls
    dispatch    send x, and gates with choices: a token once to each rank that holds any of its experts ─►
    overlap     compute the shared expert while the rows are in flight
    experts     each received row's choices on this rank, weighted and summed (a choice on another rank is −1)
    combine     send one row back for each row received                     ─► sum per token in fp32, in rank order

Combine is the adjoint of dispatch, so backward runs the same exchange from the other end: it dispatches the gradients
of the sums and combines the gradients of the rows. Starting and finishing a dispatch are two nodes of the autograd
graph with the shared expert's nodes between them, so gradients too are in flight while the shared expert computes.

The host waits for the device once per layer and forward pass, for the counts, and never in backward. Before that, it
has queued the copy into a send buffer of the largest possible size, which keeps the device busy meanwhile. Recompute
keeps the counts (trinity.parallel.activation_checkpoint) and does not wait either.

Shapes: T tokens of this rank, S rows sent (one for each token and rank), U rows received, D width, K active experts,
P ranks, E experts, C = 2K, N = T·min(K, P), the largest possible S.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.models.moe import RunExperts
from trinity_kernels.experts import sum_of_rows
from trinity_kernels.replay import kept

all_to_all = torch.ops._c10d_functional.all_to_all_single
wait = torch.ops._c10d_functional.wait_tensor


class AllToAll:
    """The Dispatcher for experts split over a process group, by all-to-all, on gloo and NCCL alike.

    Args:
        group: the ranks that hold the experts, each an equal share, in order.
        experts: E.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self.group, self.ranks = group.group_name, group.size()
        self.share = experts // self.ranks
        self.first = self.share * group.rank()

    @torch.compiler.disable
    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, overlap: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See trinity.models.moe.Dispatcher; every rank of the group calls it."""
        exchange = TokenExchange(indices_TK // self.share, self.ranks, self.group)
        # choices are sent with their gates, which saves a collective; an expert's number is exact in fp32
        choices_TC = torch.cat((gates_TK, indices_TK.to(gates_TK.dtype)), dim=1)
        tickets = _StartDispatch.apply(exchange, x_TD, choices_TC)
        done = overlap()
        x_UD, choices_UC = _FinishDispatch.apply(exchange, *tickets)
        gates_UK, indices_UK = choices_UC.chunk(2, dim=1)
        y_UD = experts(x_UD, self._local_indices(indices_UK.long()), gates_UK, exchange.choices_received)
        return _Combine.apply(exchange, y_UD), done

    def _local_indices(self, indices_UK: Tensor) -> Tensor:
        """Indices among this rank's experts, −1 for experts of other ranks."""
        local_UK = indices_UK - self.first
        return local_UK.where((local_UK >= 0) & (local_UK < self.share), -1)


class _StartDispatch(torch.autograd.Function):
    """Start a dispatch; in backward, finish a combine. Empty tensors ("tickets") represent the rows in flight."""

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.in_flight = [exchange.start_dispatch(rows_TD) for rows_TD in rows]
        return tuple(rows_TD.new_empty(0) for rows_TD in rows)

    @staticmethod
    def backward(ctx, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(ctx.exchange.finish_combine(rows_SD) for rows_SD in ctx.exchange.take_in_flight())


class _FinishDispatch(torch.autograd.Function):
    """Wait for the dispatched rows; in backward, start the combine of their gradients."""

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", *_: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(wait(rows_UD) for rows_UD in exchange.take_in_flight())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.in_flight = [ctx.exchange.start_combine(grad_UD) for grad_UD in grads]
        return None, *(grad_UD.new_empty(0) for grad_UD in grads)


class _Combine(torch.autograd.Function):
    """Combine; in backward, dispatch."""

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", y_UD: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish_combine(exchange.start_combine(y_UD))

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[None, Tensor]:
        return None, wait(ctx.exchange.start_dispatch(grad_TD))


class TokenExchange:
    """The exchange of one layer and forward pass: which rows go to which rank, and the rows in flight.

    Args:
        ranks_TK: [T, K] int64, the rank of each choice.
        ranks: P.
        group: name of the process group.
    """

    def __init__(self, ranks_TK: Tensor, ranks: int, group: str) -> None:
        tokens, active = ranks_TK.shape
        choices_TP = torch.zeros(tokens, ranks, dtype=torch.int64, device=ranks_TK.device)
        choices_TP.scatter_add_(1, ranks_TK, torch.ones_like(ranks_TK))
        sent_TP = choices_TP > 0
        own_P2 = torch.stack((sent_TP.sum(dim=0), choices_TP.sum(dim=0)), dim=1)
        self._counts = own_P2, kept(all_to_all, own_P2, [1] * ranks, [1] * ranks, group)
        self._group, self._copies_T = group, sent_TP.sum(dim=1)
        # Tokens in order of (rank, token): first the S that are sent, then some that are not; S is not known yet.
        order = sent_TP.t().flatten().logical_not().to(torch.uint8).argsort(stable=True)
        self._token_S = order[: tokens * min(active, ranks)] % max(tokens, 1)
        self._sizes: tuple[list[int], list[int]] | None = None
        self.in_flight: list[Tensor] = []

    def take_in_flight(self) -> list[Tensor]:
        """The rows in flight, removed from here, so that recompute can free them."""
        rows, self.in_flight = self.in_flight, []
        return rows

    def start_dispatch(self, x_TD: Tensor) -> Tensor:
        """Start sending each token's row to the ranks of its experts: [U, D], in flight."""
        rows_SD = x_TD.index_select(0, self._token_S)
        sent, received = self._sizes or self._wait_for_sizes()
        return all_to_all(rows_SD[: sum(sent)], received, sent, self._group)

    def start_combine(self, rows_UD: Tensor) -> Tensor:
        """Start sending a row back to the sender of each received row: [S, D], in flight."""
        assert self._sizes is not None, "combine follows a dispatch"
        sent, received = self._sizes
        return all_to_all(rows_UD.contiguous(), sent, received, self._group)

    def finish_combine(self, rows_SD: Tensor) -> Tensor:
        """Wait for the returned rows and sum them per token, in fp32 and in order of ranks: [T, D]."""
        return sum_of_rows(wait(rows_SD), self._by_token_S, self._copies_T).to(rows_SD.dtype)

    def _wait_for_sizes(self) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank."""
        own_P2, others_P2 = kept(exchanged_counts, *self._counts).tolist()
        self._sizes = [rows for rows, _ in own_P2], [rows for rows, _ in others_P2]
        self.choices_received = sum(choices for _, choices in others_P2)
        self._token_S = self._token_S[: sum(self._sizes[0])]
        self._by_token_S = self._token_S.argsort(stable=True)
        return self._sizes


@torch.library.custom_op("trinity::exchanged_counts", mutates_args=())
def exchanged_counts(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    """The counts that this rank sends and receives, on the host: the one place where the host waits for the device.

    On a GPU it waits on a separate stream: for the counts alone, not for work queued since.

    Args:
        own_P2: [P, 2] int64, rows and choices for each rank. others_P2: the same from each rank, in flight.
    Returns:
        [2, P, 2] int64 on the CPU.
    """
    with torch.cuda.stream(torch.cuda.Stream() if own_P2.is_cuda else None):
        others_P2 = wait(others_P2)
        return torch.stack((own_P2, others_P2)).cpu()


@exchanged_counts.register_fake
def _(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    return own_P2.new_empty((2, *own_P2.shape), device="cpu")
