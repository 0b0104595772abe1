"""The token dispatcher of expert parallelism: send tokens to the ranks of their experts, and combine the results.

Rank p of the P ranks of an expert group holds experts [p·E/P, (p+1)·E/P). One layer's forward pass:

    counts      exchange the numbers of rows and choices between ranks      ─► sizes of the all-to-alls
    dispatch    send x, and gates with choices: a token once to each rank that holds any of its experts ─►
    shared      compute the shared expert while the rows are in flight
    experts     each received row's choices on this rank, weighted and summed (a choice on another rank is −1)
    combine     send one row back for each row received      ─► shared + sum per token in fp32, in rank order

Padding, whose choices are all −1, is sent nowhere and gets the shared expert alone.

Combine is the adjoint of dispatch, so backward runs the same exchange from the other end: it dispatches the gradients
of the sums and combines the gradients of the rows. Starting and finishing a dispatch are two nodes of the autograd
graph with the shared expert's nodes between them, so gradients too are in flight while the shared expert computes.

The host waits for the counts once per layer and forward pass, and never in backward; recompute keeps the counts
(trinity.parallel.activation_checkpoint). Where the device works on its own, it has work meanwhile: the host has queued
the copy into send buffers of the largest possible size, and the shared expert. Then the host starts the all-to-alls on
a second stream, on which they follow the copy and not the shared expert. A CPU waits first, and so copies fewer rows.

    host     counts, copy, shared │ waits │ all-to-alls, experts …
    device   counts ─► copy ───────► shared ──────────────────┬─► experts
             counts ─► to the host    rows in flight ─────────┘

Shapes: T tokens of this rank, S rows sent (one for each token and rank), U rows received, D width, K active experts,
P ranks, E experts, C = 2K, N = T·min(K, P), the largest possible S.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.models.moe import Padding, RunExperts
from trinity_kernels import combine
from trinity_kernels.combine import Places
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
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, shared: Callable[[], Tensor],
        padding: Padding | None = None,
    ) -> Tensor:  # fmt: skip
        """See trinity.models.moe.Dispatcher; every rank of the group calls it."""
        exchange = TokenExchange(indices_TK // self.share, self.ranks, self.group)
        if not works_on_its_own(x_TD.device):
            exchange.wait_for_sizes()
        # choices are sent with their gates, which saves a collective; an expert's number is exact in fp32
        choices_TC = torch.cat((gates_TK, indices_TK.to(gates_TK.dtype)), dim=1)
        tickets = _StartDispatch.apply(exchange, x_TD, choices_TC)
        shared_TD = shared()
        exchange.send()
        x_UD, choices_UC = _FinishDispatch.apply(exchange, *tickets)
        gates_UK, indices_UK = choices_UC.chunk(2, dim=1)
        y_UD = experts(x_UD, self._local_indices(indices_UK.long()), gates_UK, exchange.choices_received)
        return _Combine.apply(exchange, y_UD, shared_TD)

    def _local_indices(self, indices_UK: Tensor) -> Tensor:
        """Indices among this rank's experts, −1 for experts of other ranks."""
        local_UK = indices_UK - self.first
        return local_UK.where((local_UK >= 0) & (local_UK < self.share), -1)


def works_on_its_own(device: torch.device) -> bool:
    """Whether the host can queue work on the device and go on; a plan on meta is a plan of a GPU."""
    return device.type != "cpu"


class _StartDispatch(torch.autograd.Function):
    """Start a dispatch; in backward, finish a combine. Empty tensors ("tickets") represent the rows.

    The rows are sent as soon as the sizes are known: here if they are, otherwise by `send`.
    """

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.pack(rows)
        if exchange.sizes:
            exchange.send()
        return tuple(rows_TD.new_empty(0) for rows_TD in rows)

    @staticmethod
    def backward(ctx, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(ctx.exchange.finish_combine(rows_SD) for rows_SD in ctx.exchange.take_in_flight())


class _FinishDispatch(torch.autograd.Function):
    """Wait for the dispatched rows; in backward, start the combine of their gradients."""

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", *_: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(_used_here(wait(rows_UD)) for rows_UD in exchange.take_in_flight())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.in_flight = [ctx.exchange.start_combine(grad_UD) for grad_UD in grads]
        return None, *(grad_UD.new_empty(0) for grad_UD in grads)


class _Combine(torch.autograd.Function):
    """Combine and add the shared expert's output; in backward, dispatch."""

    @staticmethod
    def forward(ctx, exchange: "TokenExchange", y_UD: Tensor, plus_TD: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish_combine(exchange.start_combine(y_UD), plus_TD)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, wait(ctx.exchange.start_dispatch(grad_TD)), grad_TD


class TokenExchange:
    """The exchange of one layer and forward pass: which rows go to which rank, and the rows in flight.

    Args:
        ranks_TK: [T, K] int64, the rank of each choice, or −1.
        ranks: P.
        group: name of the process group.
    Attributes:
        sizes: rows sent to and received from each rank; None before wait_for_sizes.
        choices_received: number of this rank's choices among the rows received; known with the sizes.
        in_flight: rows in flight.
    """

    def __init__(self, ranks_TK: Tensor, ranks: int, group: str) -> None:
        tokens, active = ranks_TK.shape
        choices_TP = torch.zeros(tokens, ranks, dtype=torch.int64, device=ranks_TK.device)
        choices_TP.scatter_add_(1, ranks_TK.clamp_min(0), (ranks_TK >= 0).long())
        sent_TP = choices_TP > 0
        own_P2 = torch.stack((sent_TP.sum(dim=0), choices_TP.sum(dim=0)), dim=1)
        self._counts = own_P2, kept(all_to_all, own_P2, [1] * ranks, [1] * ranks, group)
        self._group = group
        # Rows are in order of (rank, token): the S that are sent, then token 0 up to N, because S is not known yet.
        sent = sent_TP.t().flatten()
        self._place_TP = sent.cumsum(0).mul_(sent).sub_(1).view(ranks, tokens).t().contiguous()  # −1: not sent
        most = tokens * min(active, ranks)
        self._token_S = torch.nonzero_static(sent, size=most, fill_value=0).squeeze(1) % max(tokens, 1)
        self.sizes: tuple[list[int], list[int]] | None = None
        self.in_flight: list[Tensor] = []
        self._packed: list[Tensor] = []
        self._packed_at: torch.cuda.Event | None = None

    def pack(self, rows: tuple[Tensor, ...]) -> None:
        """Copy each token's rows in the order in which they are sent; all N of them if the sizes are not known."""
        self._packed = [rows_TD.index_select(0, self._token_S) for rows_TD in rows]
        if self._token_S.is_cuda:
            self._packed_at = torch.cuda.current_stream().record_event()

    def send(self) -> None:
        """Start sending the packed rows, after waiting for the sizes; nothing if they were sent already."""
        sent, received = self.wait_for_sizes()
        packed, self._packed = self._packed, []
        if packed:
            with _after(self._packed_at):
                self.in_flight = [all_to_all(rows[: sum(sent)], received, sent, self._group) for rows in packed]

    def take_in_flight(self) -> list[Tensor]:
        """The rows in flight, removed from here, so that recompute can free them."""
        rows, self.in_flight = self.in_flight, []
        return rows

    def start_dispatch(self, x_TD: Tensor) -> Tensor:
        """Start sending each token's row to the ranks of its experts: [U, D], in flight."""
        sent, received = self.wait_for_sizes()
        return all_to_all(x_TD.index_select(0, self._token_S), received, sent, self._group)

    def start_combine(self, rows_UD: Tensor) -> Tensor:
        """Start sending a row back to the sender of each received row: [S, D], in flight."""
        sent, received = self.wait_for_sizes()
        return all_to_all(rows_UD.contiguous(), sent, received, self._group)

    def finish_combine(self, rows_SD: Tensor, plus_TD: Tensor | None = None) -> Tensor:
        """Wait for the returned rows and sum them per token, in fp32 and in order of ranks, then add plus: [T, D]."""
        return combine(wait(rows_SD), self._places, plus_TD)

    def wait_for_sizes(self) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank; the first call waits for them."""
        if self.sizes is None:
            own_P2, others_P2 = kept(exchanged_counts, *self._counts).tolist()
            self.sizes = [rows for rows, _ in own_P2], [rows for rows, _ in others_P2]
            self.choices_received = sum(choices for _, choices in others_P2)
            self._token_S = self._token_S[: sum(self.sizes[0])]
            self._places = Places(self._place_TP, len(self._token_S))
        return self.sizes


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for what the layer's queued work does not precede; every stream has its own free memory."""
    return torch.cuda.Stream(device)


def _after(event: torch.cuda.Event | None) -> AbstractContextManager:
    """Queue work behind the event on the second stream, not behind all that the current stream holds; CPU: nothing."""
    stream = None
    if event is not None:
        stream = _second_stream(torch.device("cuda", torch.cuda.current_device()))
        stream.wait_event(event)
    return torch.cuda.stream(stream)


def _used_here(rows: Tensor) -> Tensor:
    """Keep memory of the second stream until the current stream has used it; for a tensor freed at any time."""
    if rows.is_cuda:
        rows.record_stream(torch.cuda.current_stream())
    return rows


@torch.library.custom_op("trinity::exchanged_counts", mutates_args=())
def exchanged_counts(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    """The counts that this rank sends and receives, on the host: the one place where the host waits for the device.

    On a GPU it waits on a second stream: for the counts alone, not for work queued since.

    Args:
        own_P2: [P, 2] int64, rows and choices for each rank. others_P2: the same from each rank, in flight.
    Returns:
        [2, P, 2] int64 on the CPU.
    """
    with torch.cuda.stream(_second_stream(own_P2.device) if own_P2.is_cuda else None):
        others_P2 = wait(others_P2)
        return torch.stack((own_P2, others_P2)).cpu()


@exchanged_counts.register_fake
def _(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    return own_P2.new_empty((2, *own_P2.shape), device="cpu")
