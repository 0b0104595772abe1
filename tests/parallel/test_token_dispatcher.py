"""Experts split over 2 and 4 processes against all experts on every rank.

In float64 both sides round at 1e-16 and sums have some hundred terms: 1e-12.

Shapes: T tokens of one rank, D width, E experts, K active experts, P ranks.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.process_pool import ProcessPool
from trinity.config.model import ModelConfig
from trinity.errors import UserError
from trinity.models.moe import Experts, MoE, Padding, local_dispatch
from trinity.parallel import deep_ep, token_dispatcher
from trinity.parallel.expert_parallel import split_experts
from trinity.parallel.mesh import Ranks, Sizes, join_meshes
from trinity.parallel.token_dispatcher import AllToAll

BOUND = 1e-12
D, E = 6, 8
Pools = Callable[[int], ProcessPool]


def config_of(active: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=10, width=D, layers=2, dense_layers=1, dense_width=8, heads=1, kv_heads=1, head_dim=4, window=4,
        experts=E, active_experts=active, shared_experts=1, expert_width=5, route_scale=2.0, rope_theta=100.0,
        max_positions=16,
    )  # fmt: skip


def ranks_of(shape: str = "split") -> Ranks:
    """The meshes over all processes of the pool: experts split over all of them, or over pairs."""
    world = dist.get_world_size()
    expert = world if shape == "split" else 2
    return join_meshes(Sizes(1, world, expert, world // expert, "experts"), torch.device("cpu"))


def distinct_choices(tokens: int, active: int, among: range, random: torch.Generator) -> Tensor:
    """[T, K] experts, distinct for each token."""
    return torch.rand(tokens, len(among), generator=random).argsort(dim=1)[:, :active] + among.start


def without(indices_TK: Tensor, padding: slice) -> Tensor:
    """The choices, −1 for padding."""
    indices_TK[padding] = -1
    return indices_TK


ROUTES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "uneven": lambda rank, _, random: distinct_choices(5 + 3 * rank, 2, range(E), random),
    "one choice": lambda rank, _, random: distinct_choices(9 - rank, 1, range(E), random),
    "a rank without tokens": lambda rank, _, random: distinct_choices(0 if rank == 1 else 7, 2, range(E), random),
    "no tokens at all": lambda *_: torch.empty(0, 2, dtype=torch.int64),
    "one hot expert": lambda rank, *_: torch.full((4 + rank, 1), 2),
    "all choices on the last rank": lambda rank, ranks, random: distinct_choices(
        6, 2, range(E - E // ranks, E), random
    ),
    "more choices than a rank has experts": lambda rank, _, random: distinct_choices(4 + rank, 6, range(E), random),
    "padding": lambda rank, _, random: without(distinct_choices(6 + rank, 2, range(E), random), slice(3 + rank, None)),
    "a rank of padding": lambda rank, _, random: without(
        distinct_choices(5, 2, range(E), random), slice(0 if rank == 1 else 5, None)
    ),
    "every expert": lambda rank, _, random: distinct_choices(3 + rank, E, range(E), random),
}
"""Experts chosen on a rank: (rank, ranks, random) → [T, K]."""


def make(case: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, indices and gates of this rank, and the output's gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    random = torch.Generator().manual_seed(100 + rank)
    indices_TK = ROUTES[case](rank, ranks, random)
    T, K = indices_TK.shape
    x_TD, dy_TD = (torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    gates = torch.rand(T, K, generator=random, dtype=torch.float64)
    if dtype != torch.float64:
        gates = gates.float()
    return [x_TD, indices_TK, gates], dy_TD


def whole_experts(active: int, dtype: torch.dtype) -> Experts:
    experts = Experts(config_of(active)).to(dtype)
    random = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return experts


def split(experts: Experts, ranks: Ranks) -> tuple[Experts, AllToAll]:
    """The experts of this rank, and their dispatcher."""
    moe = MoE(config_of(1)).to(experts.down.dtype)
    moe.experts = experts
    split_experts(moe, ranks.experts)
    return moe.experts, moe.dispatcher


def run(dispatcher: Any, experts: Experts, inputs: list[Tensor], dy_TD: Tensor) -> dict[str, Tensor]:
    """The output and every gradient; of sharded weights, this rank's part."""
    x_TD, indices_TK, gates_TK = inputs
    x_TD, gates_TK = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
    mask_T = indices_TK.lt(0).any(dim=1)
    padding = Padding(mask_T, int(mask_T.sum())) if mask_T.any() else None
    y_TD = dispatcher(x_TD, indices_TK, gates_TK, experts, shared=lambda: 3 * x_TD, padding=padding)
    assert torch.equal(y_TD[mask_T], 3 * x_TD[mask_T])
    variables = [x_TD, gates_TK, *experts.parameters()]
    grads = torch.autograd.grad(y_TD, variables, dy_TD)
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return dict(zip(("y", "x", "gates", "gate_up", "down"), (y_TD.detach(), *grads)))


def split_and_local(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On one rank: by all_to_all, and with all experts on this rank in float64."""
    inputs, dy_TD = make(case, dtype)
    experts = whole_experts(inputs[1].shape[1], dtype)
    expected = run(
        local_dispatch, experts.double(), [x.double() if x.is_floating_point() else x for x in inputs], dy_TD.double()
    )
    local_experts, dispatcher = split(experts.to(dtype), ranks_of())
    actual = run(dispatcher, local_experts, inputs, dy_TD)
    return actual, expected


def errors(per_rank: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, float]:
    """The largest relative L2 error of each tensor; experts' gradients against their sum over all ranks' tokens."""
    distances: dict[str, float] = {}
    totals = {name: sum(expected[name] for _, expected in per_rank) for name in ("gate_up", "down")}
    for rank, (actual, expected) in enumerate(per_rank):
        parts = {name: total.chunk(len(per_rank))[rank] for name, total in totals.items()}
        for name, reference in (expected | parts).items():
            assert actual[name].shape == reference.shape, name
            assert actual[name].isfinite().all(), name
            distance = ((actual[name].double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()
            distances[name] = max(distances.get(name, 0.0), distance)
    return distances


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", list(ROUTES))
def test_equals_all_experts_on_one_rank(processes: Pools, world: int, case: str) -> None:
    """Outputs and gradients of x and gates on each rank; of each expert, the sum over all ranks' tokens."""
    distances = errors(processes(world).run(split_and_local, case, torch.float64))
    assert max(distances.values()) <= BOUND, distances


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(processes: Pools, dtype: torch.dtype, bound: float) -> None:
    """The bounds of the experts' tests: bf16 rounds by 2⁻⁹, here once more where a partial sum is sent."""
    distances = errors(processes(4).run(split_and_local, "uneven", dtype))
    assert max(distances.values()) <= bound, distances


def same_bits_twice(case: str) -> bool:
    inputs, dy_TD = make(case, torch.bfloat16)
    experts, dispatcher = split(whole_experts(inputs[1].shape[1], torch.bfloat16), ranks_of())
    first, second = (run(dispatcher, experts, inputs, dy_TD) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_repetition_gives_the_same_bits(processes: Pools) -> None:
    assert all(processes(4).run(same_bits_twice, "more choices than a rank has experts"))


class Record(TorchDispatchMode):
    """Records the all-to-alls, as (width, rows for each rank), and the names of other operations of interest."""

    RECORDED = {
        "_c10d_functional::wait_tensor": "wait", "trinity::exchanged_counts": "host waits",
        "trinity::expert_mlp": "experts",
        "trinity::expert_mlp_backward": "experts backward",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.sent: list[tuple[int, list[int]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.name() == "_c10d_functional::all_to_all_single":
            rows, _, splits, _ = args
            assert len(rows) == sum(splits)
            self.events.append(f"start {rows.shape[1]}")
            self.sent.append((rows.shape[1], list(splits)))
        elif op.name() == "aten::index_select":
            self.events.append(f"gather {len(args[2])}")
        elif op.name() in self.RECORDED:
            self.events.append(self.RECORDED[op.name()])
        return op(*args, **(kwargs or {}))


class RecordedIdentity(torch.autograd.Function):
    """Identity that records when it runs, in place of the shared expert."""

    @staticmethod
    def forward(ctx, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return x * 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared backward")
        return grad, None


def events_of_a_pass(
    case: str, on_its_own: bool = False
) -> tuple[list[str], list[str], list[tuple[int, list[int]]], Tensor]:
    """Events of forward and of backward, the rows sent, and the experts chosen on this rank.

    on_its_own: in the order for a device on which the host queues work, a GPU.
    """
    (x_TD, indices_TK, gates_TK), _ = make(case, torch.float64)
    experts, dispatcher = split(whole_experts(indices_TK.shape[1], torch.float64), ranks_of())
    x_TD.requires_grad_()
    gates_TK.requires_grad_()
    queues = mock.patch.object(token_dispatcher, "works_on_its_own", return_value=on_its_own)
    with queues, Record() as record:
        shared = lambda: RecordedIdentity.apply(x_TD, record.events)  # noqa: E731
        y_TD = dispatcher(x_TD, indices_TK, gates_TK, experts, shared=shared)
        forward = len(record.events)
        y_TD.sum().backward()
    return record.events[:forward], record.events[forward:], record.sent, indices_TK


def test_the_shared_expert_overlaps_the_exchange(processes: Pools) -> None:
    """On a CPU, in forward and backward every transfer starts before it and is awaited after it. The host waits once.

    D = 6 wide: tokens and sums; 2K = 4: gates with choices; 2: counts.
    """
    for forward, backward, sent, _ in processes(4).run(events_of_a_pass, "uneven"):
        rows = sum(sent[1][1])
        assert forward == [
            "start 2", "host waits", f"gather {rows}", f"gather {rows}", "start 6", "start 4", "shared",
            "wait", "wait", "experts", "start 6", "wait",
        ]  # fmt: skip
        assert backward == backward_events(rows)


def test_the_wait_for_counts_is_hidden_behind_the_shared_expert(processes: Pools) -> None:
    """On a GPU the copies and the shared expert are queued before the host waits, once; backward does not change.

    A copy then takes as many rows as could be sent: the number of choices, of which no token has more than ranks.
    """
    for forward, backward, sent, indices_TK in processes(4).run(events_of_a_pass, "uneven", True):
        most = indices_TK.numel()
        assert forward == [
            "start 2", f"gather {most}", f"gather {most}", "shared", "host waits", "start 6", "start 4",
            "wait", "wait", "experts", "start 6", "wait",
        ]  # fmt: skip
        assert backward == backward_events(sum(sent[1][1]))


def backward_events(rows: int) -> list[str]:
    """Gradients are in flight during the shared expert's backward pass, and the host waits for no counts."""
    return [
        f"gather {rows}", "start 6", "wait", "experts backward", "start 6", "start 4", "shared backward",
        "wait", "wait",
    ]  # fmt: skip


def same_bits_in_both_orders(case: str) -> bool:
    inputs, dy_TD = make(case, torch.float32)
    experts, dispatcher = split(whole_experts(inputs[1].shape[1], torch.float32), ranks_of())
    results = []
    for on_its_own in (False, True):
        with mock.patch.object(token_dispatcher, "works_on_its_own", return_value=on_its_own):
            results.append(run(dispatcher, experts, inputs, dy_TD))
    return all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("case", list(ROUTES))
def test_both_orders_give_the_same_bits(processes: Pools, case: str) -> None:
    """Counts awaited before or after the shared expert: the same rows are sent."""
    assert all(processes(4).run(same_bits_in_both_orders, case))


@pytest.mark.parametrize("case", ["uneven", "every expert", "all choices on the last rank", "one hot expert"])
def test_a_token_is_sent_once_to_a_rank(processes: Pools, case: str) -> None:
    """Not once per expert: rows to each rank, in forward and backward, counted from the choices."""
    results = processes(4).run(events_of_a_pass, case)
    rows_to = [
        [sum(any(e // 2 == rank for e in chosen) for chosen in indices.tolist()) for rank in range(4)]
        for _, _, _, indices in results
    ]
    for rank, (_, _, sent, indices) in enumerate(results):
        outgoing, incoming, width = rows_to[rank], [row[rank] for row in rows_to], 2 * indices.shape[1]
        counts, *rows = sent
        assert counts == (2, [1, 1, 1, 1])
        assert rows == [
            (D, outgoing),
            (width, outgoing),
            (D, incoming),
            (D, outgoing),
            (D, incoming),
            (width, incoming),
        ]


def layer(active: int) -> MoE:
    """A float64 layer with the same values on every rank, and a nonzero expert bias."""
    moe = MoE(config_of(active)).double()
    random = torch.Generator().manual_seed(1)
    for tensor in (*moe.parameters(), moe.expert_bias, moe.expert_momentum):
        tensor.data.copy_(0.5 * torch.randn(tensor.shape, generator=random, dtype=torch.float64))
    return moe


def layer_split_and_local(shape: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a whole MoE layer on this rank, with split experts and with all of them."""
    rank, results = dist.get_rank(), []
    random = torch.Generator().manual_seed(50 + rank)
    x_BSD = torch.randn(2, 3 + rank, D, generator=random, dtype=torch.float64)
    for splits in (True, False):
        moe, x = layer(3), x_BSD.clone().requires_grad_()
        if splits:
            split_experts(moe, ranks_of(shape).experts)
        y, routing = moe(x)
        ((y * y.detach()).sum() + routing.sequence_loss_B.sum()).backward()
        grads = {
            name: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for name, p in moe.named_parameters()
        }
        results.append({"y": y.detach(), "counts": routing.counts_E, "x": x.grad} | grads)
    return results[0], results[1]


@pytest.mark.parametrize("shape", ["split", "pairs"])
def test_a_whole_layer(processes: Pools, shape: str) -> None:
    """Router and shared expert are unaffected; in pairs, ranks 0 and 1 split one set of experts, and so do 2 and 3."""
    results, size = processes(4).run(layer_split_and_local, shape), 4 if shape == "split" else 2
    for rank, (actual, expected) in enumerate(results):
        for name, reference in expected.items():
            if "experts" in name:
                group = range(rank - rank % size, rank - rank % size + size)
                reference = sum(results[other][1][name] for other in group).chunk(size)[rank % size]
            torch.testing.assert_close(actual[name], reference, rtol=BOUND, atol=BOUND, msg=name)


def split_parameters(device: str) -> list[tuple[Any, ...]]:
    """Name, placement, shapes, allocated elements and values of experts' parameters after splitting."""
    moe = layer(2) if device == "cpu" else MoE(config_of(2)).to(device)
    split_experts(moe, ranks_of().experts)
    parameters = []
    for name, p in moe.experts.named_parameters():
        part = p.to_local()
        values = part.detach() if device == "cpu" else None
        allocated = part.untyped_storage().nbytes() // part.element_size()
        parameters.append(
            (name, p.placements, p.shape, part.shape, allocated, values, p.requires_grad, part.device.type)
        )
    return parameters


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_split_parameters(processes: Pools, device: str) -> None:
    """Two of eight experts per rank, in order, no other in memory, on meta too; the parameters still require grad."""
    whole = dict(layer(2).experts.named_parameters())
    for rank, parameters in enumerate(processes(4).run(split_parameters, device)):
        assert [name for name, *_ in parameters] == ["gate_up", "down"]
        for name, placements, shape, part, allocated, values, requires_grad, device_type in parameters:
            assert (placements, shape, requires_grad, device_type) == ((Shard(0),), whole[name].shape, True, device)
            assert part == (2, *shape[1:])
            assert allocated == 2 * shape[1:].numel()
            if device == "cpu":
                assert torch.equal(values, whole[name][2 * rank : 2 * rank + 2])


def split_over_one_rank() -> tuple[bool, bool]:
    moe = layer(2)
    world = dist.get_world_size()
    split_experts(moe, join_meshes(Sizes(1, world, 1, world, "experts"), torch.device("cpu")).experts)
    return moe.dispatcher is local_dispatch, any(isinstance(p, DTensor) for p in moe.parameters())


def test_one_rank_with_all_experts_changes_nothing(processes: Pools) -> None:
    assert processes(2).run(split_over_one_rank) == [(True, False)] * 2


@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck_of_the_counts(tokens: int) -> None:
    """Schema, fake tensors and tracing, by torch's opcheck; nothing is in flight, so nothing is awaited."""
    counts = torch.full((4, 2), tokens)
    assert torch.equal(token_dispatcher.exchanged_counts(counts, counts + 1), torch.stack((counts, counts + 1)))
    torch.library.opcheck(torch.ops.trinity.exchanged_counts.default, (counts, counts + 1))


class FakeBuffer:
    """DeepEP's Buffer as documented, with TokenExchange in place of its kernels."""

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[None, ...]:
        self.share = num_experts // dist.get_world_size()
        return (None,) * 5

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            return token_dispatcher.wait(handle.start_dispatch(x)), None, None, None, None, None
        exchange = token_dispatcher.TokenExchange(
            topk_idx // self.share, dist.get_world_size(), dist.group.WORLD.group_name
        )
        x_UD, indices, gates = (
            token_dispatcher.wait(exchange.start_dispatch(rows)) for rows in (x, topk_idx, topk_weights)
        )
        indices -= self.share * dist.get_rank()
        indices = indices.where((indices >= 0) & (indices < self.share), -1)
        received = [(indices == expert).sum().item() for expert in range(self.share)]
        arrived = type("Event", (), {"current_stream_wait": lambda self: None})()
        return x_UD, indices, gates, received, exchange, arrived

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        weights = None if topk_weights is None else handle.finish_combine(handle.start_combine(topk_weights))
        return handle.finish_combine(handle.start_combine(x), bias), weights, None


def deep_ep_and_local(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As split_and_local, by the DeepEP class with a FakeBuffer."""
    inputs, dy_TD = make(case, torch.float64)
    experts = whole_experts(inputs[1].shape[1], torch.float64)
    expected = run(local_dispatch, experts, inputs, dy_TD)
    local_experts, _ = split(experts, ranks_of())
    with mock.patch.object(deep_ep, "find_spec", return_value=True):
        dispatcher = deep_ep.DeepEP(dist.group.WORLD, E)
    with mock.patch.object(dispatcher, "_buffer_for", return_value=FakeBuffer()):
        return run(dispatcher, local_experts, inputs, dy_TD), expected


@pytest.mark.parametrize("case", ["uneven", "a rank without tokens", "padding"])
def test_deep_ep_with_a_fake_buffer(processes: Pools, case: str) -> None:
    """Gradients of tokens and gates are combined, those of sums dispatched; DeepEP's kernels need GPUs."""
    distances = errors(processes(2).run(deep_ep_and_local, case))
    assert max(distances.values()) <= BOUND, distances


@pytest.mark.skipif(find_spec("deep_ep") is not None, reason="deep_ep is installed")
def test_deep_ep_not_installed_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"exchange=deep_ep needs the package deep_ep.* use parallel\.exchange=all_to_all"
    ):
        deep_ep.DeepEP(None, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deep_ep_on_a_cpu_is_refused(dtype: torch.dtype) -> None:
    with mock.patch.object(deep_ep, "find_spec", return_value=True):
        dispatcher = deep_ep.DeepEP(None, 8)
    x_TD = torch.ones(2, D, dtype=dtype)
    with pytest.raises(UserError, match=rf"takes bfloat16 on a GPU, not {dtype} on cpu; use precision"):
        dispatcher(x_TD, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), None, lambda: x_TD)
