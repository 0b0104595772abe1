"""Expert parallelism: tokens travel to the processes that hold their experts, and weighted sums travel back.

Rank p of the P ranks of an expert group holds experts [p·E/P, (p+1)·E/P). One layer's forward pass:

    counts    rows and choices for each rank                             ─► how much each will receive
    send      x, and gates with choices: a token once to each rank that holds any of its experts ─►
    meanwhile the shared expert, while they travel
    experts   each row's choices here, weighted and summed (a choice elsewhere is −1)
    give back one row for each row that came                             ─► added up per token in fp32, in rank order

To collect is the adjoint of to send, so backward is the same exchange from its other end: it sends the gradients of the
sums, gives back those of the rows, and collects. Sending and waiting are two nodes of the graph, with the shared
expert's between them, so gradients too travel while the shared expert computes.

The host waits for the device once a layer and forward pass, for the counts, and never in backward. Before that it has
queued the copy into a send buffer, with room for the most rows that may go, which keeps the device busy meanwhile.
Recompute keeps the counts (trinity.parallel.recompute) and does not wait either.

Shapes: T tokens here, S rows sent (one for each token and rank), U rows received, D width, K active experts, P ranks,
E experts, N = T·min(K, P), the most that S can be.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trinity.models.moe import MoE
from trinity.models.token_dispatcher import Dispatcher, RunExperts
from trinity_kernels.experts import sum_of_rows

all_to_all = torch.ops._c10d_functional.all_to_all_single
wait = torch.ops._c10d_functional.wait_tensor


def split_experts(model: nn.Module, mesh: DeviceMesh, exchange: str = "auto") -> None:
    """Leave each process the experts of its place in mesh["expert"], and let tokens travel; apply before FSDP.

    Args:
        model: its MoE layers change in place; experts' parameters become DTensors of the same values.
        mesh: the mesh of experts of trinity.parallel.mesh; nothing changes where its "expert" has one rank.
        exchange: "all_to_all", "deep_ep" (trinity.parallel.deep_ep), or "auto", which is all_to_all.
    Raises:
        UserError: deep_ep is asked for and not installed.
    """
    across = mesh["expert"]
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if across.size() == 1 or not layers:
        return
    dispatcher = _dispatcher(exchange, across.get_group(), len(layers[0].expert_bias))
    for layer in layers:
        layer.dispatcher = dispatcher
        layer.experts.here = DTensor.to_local
        for name, parameter in list(layer.experts.named_parameters()):
            # a clone: a view would keep the others' experts in memory
            part = parameter.detach().chunk(across.size())[across.get_local_rank()].clone()
            split = DTensor.from_local(part, across, [Shard(0)], run_check=False)
            setattr(layer.experts, name, nn.Parameter(split))


def _dispatcher(exchange: str, group: dist.ProcessGroup, experts: int) -> Dispatcher:
    if exchange == "deep_ep":
        from trinity.parallel.deep_ep import DeepEP

        return DeepEP(group, experts)
    return AllToAll(group, experts)


class AllToAll:
    """The Dispatcher for experts split over a process group, by all-to-all: gloo and NCCL alike.

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
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See trinity.models.dispatch.Dispatcher; every rank of the group calls it."""
        trip = Trip(indices_TK // self.share, self.ranks, self.group)
        # choices travel with their gates, one collective less; an expert's number is exact in fp32
        choices_TC = torch.cat((gates_TK, indices_TK.to(gates_TK.dtype)), dim=1)
        tickets = _Depart.apply(trip, x_TD, choices_TC)
        done = meanwhile()
        x_UD, choices_UC = _Arrive.apply(trip, *tickets)
        gates_UK, indices_UK = choices_UC.chunk(2, dim=1)
        y_UD = experts(x_UD, self._here(indices_UK.long()), gates_UK, trip.choices_received)
        return _Return.apply(trip, y_UD), done

    def _here(self, indices_UK: Tensor) -> Tensor:
        """Among this rank's experts, −1 for those of others."""
        local_UK = indices_UK - self.first
        return local_UK.where((local_UK >= 0) & (local_UK < self.share), -1)


class _Depart(torch.autograd.Function):
    """Start sending; in backward, collect what was given back. An empty tensor stands for the rows under way."""

    @staticmethod
    def forward(ctx, trip: "Trip", *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        trip.under_way = [trip.send(rows_TD) for rows_TD in rows]
        return tuple(rows_TD.new_empty(0) for rows_TD in rows)

    @staticmethod
    def backward(ctx, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(ctx.trip.collect(rows_SD) for rows_SD in ctx.trip.take())


class _Arrive(torch.autograd.Function):
    """Wait for what was sent; in backward, start giving the gradients back."""

    @staticmethod
    def forward(ctx, trip: "Trip", *_: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return tuple(wait(rows_UD) for rows_UD in trip.take())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.under_way = [ctx.trip.give_back(grad_UD) for grad_UD in grads]
        return None, *(grad_UD.new_empty(0) for grad_UD in grads)


class _Return(torch.autograd.Function):
    """Give back and collect; in backward, send and wait."""

    @staticmethod
    def forward(ctx, trip: "Trip", y_UD: Tensor) -> Tensor:
        ctx.trip = trip
        return trip.collect(trip.give_back(y_UD))

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[None, Tensor]:
        return None, wait(ctx.trip.send(grad_TD))


class Trip:
    """One layer's exchange of one forward pass: which rows go where, and what is under way.

    Args:
        ranks_TK: [T, K] int64, the rank of each choice.
        ranks: P.
        group: name of the process group.
    """

    def __init__(self, ranks_TK: Tensor, ranks: int, group: str) -> None:
        tokens, active = ranks_TK.shape
        choices_TP = torch.zeros(tokens, ranks, dtype=torch.int64, device=ranks_TK.device)
        choices_TP.scatter_add_(1, ranks_TK, torch.ones_like(ranks_TK))
        goes_TP = choices_TP > 0
        own_P2 = torch.stack((goes_TP.sum(dim=0), choices_TP.sum(dim=0)), dim=1)
        self._counts = own_P2, all_to_all(own_P2, [1] * ranks, [1] * ranks, group)
        self._group, self._copies_T = group, goes_TP.sum(dim=1)
        # Tokens in order of (rank, token): first the S that go, then some that do not. How many is not known yet.
        order = goes_TP.t().flatten().logical_not().to(torch.uint8).argsort(stable=True)
        self._token_S = order[: tokens * min(active, ranks)] % max(tokens, 1)
        self._sizes: tuple[list[int], list[int]] | None = None
        self.under_way: list[Tensor] = []

    def take(self) -> list[Tensor]:
        """What is under way; it is kept no longer, so that recompute frees it."""
        rows, self.under_way = self.under_way, []
        return rows

    def send(self, x_TD: Tensor) -> Tensor:
        """Start sending each token's row to the ranks it goes to: [U, D], under way."""
        rows_SD = x_TD.index_select(0, self._token_S)
        if self._sizes is None:
            self._learn_sizes()
        sent, received = self._sizes
        return all_to_all(rows_SD[: sum(sent)], received, sent, self._group)

    def give_back(self, rows_UD: Tensor) -> Tensor:
        """Start sending a row to where each received one came from: [S, D], under way."""
        sent, received = self._sizes
        return all_to_all(rows_UD.contiguous(), sent, received, self._group)

    def collect(self, rows_SD: Tensor) -> Tensor:
        """Wait for what was given back and add up each token's rows, in fp32 and in order of ranks: [T, D]."""
        return sum_of_rows(wait(rows_SD), self._by_token_S, self._copies_T).to(rows_SD.dtype)

    def _learn_sizes(self) -> None:
        own_P2, others_P2 = exchanged_counts(*self._counts).tolist()
        self._sizes = [rows for rows, _ in own_P2], [rows for rows, _ in others_P2]
        self.choices_received = sum(choices for _, choices in others_P2)
        self._token_S = self._token_S[: sum(self._sizes[0])]
        self._by_token_S = self._token_S.argsort(stable=True)


@torch.library.custom_op("trinity::exchanged_counts", mutates_args=())
def exchanged_counts(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    """What this rank sends and what it receives, on the host: the one place where the host waits for the device.

    On a GPU it waits on a stream of its own, so for the counts alone and not for what has been queued since.

    Args:
        own_P2: [P, 2] int64, rows and choices for each rank. others_P2: the same from each rank, under way.
    Returns:
        [2, P, 2] int64 on the CPU.
    """
    with torch.cuda.stream(torch.cuda.Stream() if own_P2.is_cuda else None):
        others_P2 = wait(others_P2)
        return torch.stack((own_P2, others_P2)).cpu()


@exchanged_counts.register_fake
def _(own_P2: Tensor, others_P2: Tensor) -> Tensor:
    return own_P2.new_empty((2, *own_P2.shape), device="cpu")
