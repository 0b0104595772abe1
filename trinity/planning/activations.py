"""Activation memory of one microbatch: bytes saved for backward and the peaks above them.

One block of each kind runs on the meta device with the config's recompute and exchange: nothing is computed, all sizes
are exact. Three things differ from a run:

    attention      torch's flash attention: it saves q, k, v, the output and one fp32 number per head and token, as all
                   engines but sdpa do (on a GPU in 16 bits, auto never takes sdpa)
    routing        even: a token's K experts are any K of all, and every rank gets equally many rows
    expert         its peak inside is a formula for the reference of trinity_kernels, because an opaque operation
    operation      allocates nothing on meta but its results

With context parallelism they are those of the first rank of a row, which has no halo before its chunk: w − 1 keys and
values of one layer at a time.

Shapes: B rows of a microbatch, S sequence, D width, V vocabulary, F expert width, K active experts, P ranks.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.models import attention_backends
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.layers import Norm
from trinity.models.moe import Router
from trinity.models.trinity import Block, Trinity
from trinity.parallel import expert_parallel, token_dispatcher
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.comm_counter import Traffic, count_collectives
from trinity.parallel.context_parallel import ContextParallel, heads_fit, row_parts
from trinity.parallel.fsdp import master_dtype
from trinity.parallel.mesh import Ranks
from trinity_kernels.cross_entropy import chunk_tokens


class ContextTraffic(NamedTuple):
    """One block's communication with the ranks that have the rest of its rows, for one microbatch.

    kind: "halo" of a local layer, "heads" of a global one, or "gather" where the ranks cannot split the heads.
    exchange: its all-to-alls in both passes. counts: the all-reduces of the sequence loss's counts. Both are counted as
        in trinity.parallel.comm_counter.
    """

    kind: str
    exchange: Traffic
    counts: Traffic


class Activations(NamedTuple):
    """Bytes of one part of the model for one microbatch.

    kept: saved from its forward to its backward pass, including its output, without its input.
    forward, backward: peak of the pass above memory at its start; backward includes the unsharded weight gradients.
    exchange: calls and bytes of its all-to-alls in both passes, counted as in trinity.parallel.comm_counter.
    context: communication of context parallelism; None without it.
    """

    kept: float
    forward: float
    backward: float
    exchange: Traffic = Traffic(0, 0)
    context: ContextTraffic | None = None


def tokens_per_microbatch(config: RunConfig, rows: int) -> int:
    """Tokens that a rank computes of a microbatch of `rows` rows."""
    return rows * config.data.sequence_length // config.parallel.context


def mean_destination_ranks(experts: int, active: int, ranks: int) -> float:
    """Mean number of ranks that a token is sent to under even routing: P·(1 − C(E − E/P, K)/C(E, K))."""
    return ranks * (1 - math.comb(experts - experts // ranks, active) / math.comb(experts, active))


def block_activations(config: RunConfig, ranks: Ranks, rows: int) -> list[Activations]:
    """Activations of every block, in order, for a microbatch of `rows` rows.

    Args:
        ranks: on meta, over a fake group (trinity.planning.fake_rank).
    """
    model = config.model
    by_kind: dict[tuple[bool, bool], Activations] = {}
    for layer in range(model.layers):
        kind = layer >= model.dense_layers, model.is_global(layer)
        if kind not in by_kind:
            by_kind[kind] = _measure_block(config, ranks, layer, rows)
    return [by_kind[layer >= model.dense_layers, model.is_global(layer)] for layer in range(model.layers)]


class _Measured(NamedTuple):
    """Peaks of one block as in Activations, and its collectives."""

    kept: float
    forward: float
    backward: float
    collectives: dict[tuple[str, int], Traffic]


def _measure_block(config: RunConfig, ranks: Ranks, layer: int, rows: int) -> Activations:
    model, none = config.model, Traffic(0, 0)
    measured = _run_block(config, ranks, layer, rows, ranks.context)
    workspace = _expert_workspace(model, tokens_per_microbatch(config, rows)) if layer >= model.dense_layers else 0
    in_expert_group = "all_to_all", ranks.sizes.expert
    exchange, context = measured.collectives.get(in_expert_group, none), None
    if ranks.context is not None:
        # the group of experts may be that of the context: its tokens are exchanged without context parallelism too
        exchange = _run_block(config, ranks, layer, rows, None).collectives.get(in_expert_group, none)
        size = ranks.context.size
        calls, sent = measured.collectives.get(("all_to_all", size), none)
        if size == ranks.sizes.expert:
            calls, sent = calls - exchange.calls, sent - exchange.bytes
        counts = measured.collectives.get(("all_reduce", size), none)
        by_heads = heads_fit(model.heads, model.kv_heads, size)
        kind = ("heads" if by_heads else "gather") if model.is_global(layer) else "halo"
        context = ContextTraffic(kind, Traffic(calls, sent), counts)
    return Activations(measured.kept, measured.forward, measured.backward + workspace, exchange, context)


def _run_block(config: RunConfig, ranks: Ranks, layer: int, rows: int, context: ContextParallel | None) -> _Measured:
    """One forward and backward pass of one block on meta."""
    model, tokens = config.model, tokens_per_microbatch(config, rows)
    compute, master = getattr(torch, config.precision.compute), master_dtype(config.precision)
    with torch.device("meta"):
        block = Block(model, layer).to(compute)
        for part in block.modules():
            if isinstance(part, Norm | Router):
                part.to(master)
        x_BSD = torch.empty(rows, tokens // rows, model.width, dtype=compute, requires_grad=True)
        positions = torch.arange(tokens // rows).unsqueeze(0)
    expert_parallel.split_experts(block, ranks.experts, config.parallel.exchange)
    if config.recompute != "none":
        only_block = cast(Trinity, SimpleNamespace(blocks=[block]))  # recompute_blocks reads the blocks alone
        recompute_blocks(only_block, config.recompute)
    rotation = rope_cos_sin(positions, model.head_dim, model.rope_theta, master)
    with _patched_for_meta(tokens, model), LiveBytes() as live, count_collectives() as collectives:
        mask = row_parts(context, x_BSD, None, None, "sdpa") or AttentionMask(positions, None, True, "sdpa")
        y_BSD, routing = block(x_BSD, rotation, mask, config.balancing.sequence_loss != 0)
        kept, forward = live.now, live.peak
        live.peak = live.now
        outputs = [y_BSD]
        if routing and routing.sequence_loss_B is not None:
            outputs.append(routing.sequence_loss_B)
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return _Measured(kept, forward, live.peak - kept, collectives)


@contextmanager
def _patched_for_meta(tokens: int, model: ModelConfig) -> Iterator[None]:
    """Patch attention to run on meta and the exchange to take even counts, without a collective for them."""

    def even_counts(own_P2: Tensor, _others_P2: Tensor) -> Tensor:
        ranks = len(own_P2)
        sent = round(tokens * mean_destination_ranks(model.experts, model.active_experts, ranks) / ranks)
        return torch.tensor([[[sent, tokens * model.active_experts // ranks]] * ranks] * 2)

    with (
        patch.dict(attention_backends._ENGINES, sdpa=_flash_attention),
        patch.object(token_dispatcher, "exchanged_counts", even_counts),
    ):
        yield


def _flash_attention(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, _window: int | None, _mask: AttentionMask
) -> Tensor:
    flash: Callable[..., tuple] = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2), 0.0, True)[0].transpose(1, 2)


def _expert_workspace(model: ModelConfig, tokens: int) -> float:
    """Peak bytes inside the backward pass of trinity_kernels.experts in bf16, the larger of two moments.

    SwiGLU's backward holds nine tensors [R, F] in fp32 and the gathered gradient. The sum over a token's rows holds
    seven, the pre-activations' gradient, and the rows twice in bf16 and once in fp32.
    """
    D, F = model.width, model.expert_width
    return tokens * model.active_experts * max(9 * 4 * F + 2 * D, 7 * 4 * F + 4 * F + 2 * D + 8 * D)


def embedding_activations(config: RunConfig, rows: int) -> Activations:
    """Activations of the embedding, by formula: its output, unscaled and scaled; backward forms a dense gradient."""
    size = getattr(torch, config.precision.compute).itemsize
    x = tokens_per_microbatch(config, rows) * config.model.width * size
    return Activations(x, 2 * x, x + config.model.vocab_size * config.model.width * size)


def head_activations(config: RunConfig, rows: int) -> Activations:
    """Activations of head and loss, by formula: the forward pass forms both gradients, in chunks of tokens."""
    size, V, D = getattr(torch, config.precision.compute).itemsize, config.model.vocab_size, config.model.width
    tokens = tokens_per_microbatch(config, rows)
    kept = tokens * D * size + V * D * max(size, 4)  # the weight's gradient is summed in fp32 at least
    # on a GPU one chunk's logits become their gradient in place; backward scales both gradients into new memory
    return Activations(kept, kept + chunk_tokens(tokens, V, size, "cuda") * V * size, (tokens + V) * D * size)


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that were created inside the mode; works on meta, where tensors have sizes alone.

    Counts each storage that an operation creates until nothing refers to it.

        with LiveBytes() as live:
            y = model(x)
        live.now, live.peak

    Attributes:
        now: bytes alive, including autograd's saved tensors. peak: the maximum of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            # a view of an input has the input's storage
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in inputs | self._counted:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: UntypedStorage) -> None:
        size = storage.nbytes()
        self._counted.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, id(storage), size)

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size
