"""What autograd keeps of one microbatch, and how far memory rises above it: one block of each kind, run on meta.

The blocks are the model's own, with the config's recompute and exchange; on meta nothing is computed and all sizes are
right. Three things are not the run's own:

    attention      torch's flash attention: it keeps q, k, v, the output and one fp32 number per head and token, as all
                   engines but sdpa do (on a GPU in 16 bits, auto never takes sdpa)
    routing        even: a token's K experts are any K of all, and every rank gets equally many rows
    expert         what the reference of trinity_kernels holds at most inside the operation, by formula: such an
    operation      operation shows meta nothing but its results

Shapes: B rows of a microbatch, S sequence, D width, V vocabulary, F expert width, K active experts, P ranks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.models import attention_backends
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.layers import Norm
from trinity.models.moe import Router
from trinity.models.trinity import Block
from trinity.parallel import expert_parallel
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.comm_counter import Traffic, count_collectives
from trinity.parallel.fsdp import master_dtype
from trinity.parallel.mesh import Ranks
from trinity.planning.meta_memory import LiveBytes
from trinity_kernels.cross_entropy import chunk_tokens


class Activations(NamedTuple):
    """Bytes of one part of the model for one microbatch.

    kept: from its forward pass to its backward pass, its output included, its input not.
    forward, backward: the most above what was there when it began; backward includes its whole weights' gradients.
    exchange: calls and bytes of its all-to-alls, as trinity.parallel.traffic counts them, forward to backward.
    """

    kept: float
    forward: float
    backward: float
    exchange: Traffic = Traffic(0, 0)


def destinations(experts: int, active: int, ranks: int) -> float:
    """Ranks that a token goes to on average, its K experts being any K of all: P·(1 − C(E − E/P, K)/C(E, K))."""
    return ranks * (1 - math.comb(experts - experts // ranks, active) / math.comb(experts, active))


def block_activations(config: RunConfig, ranks: Ranks, rows: int) -> list[Activations]:
    """Of every block, in order, for a microbatch of `rows` rows.

    Args:
        ranks: on meta, over a fake group (trinity.planning.sharded).
    """
    model, kinds = config.model, {}
    for layer in range(model.layers):
        kind = layer >= model.dense_layers, model.is_global(layer)
        if kind not in kinds:
            kinds[kind] = _measured(config, ranks, layer, rows)
    return [kinds[layer >= model.dense_layers, model.is_global(layer)] for layer in range(model.layers)]


def _measured(config: RunConfig, ranks: Ranks, layer: int, rows: int) -> Activations:
    model, length = config.model, config.data.sequence_length
    compute, master = getattr(torch, config.precision.compute), master_dtype(config.precision)
    with torch.device("meta"):
        block = Block(model, layer).to(compute)
        for part in block.modules():
            if isinstance(part, Norm | Router):
                part.to(master)
        x_BSD = torch.empty(rows, length, model.width, dtype=compute, requires_grad=True)
        positions = torch.arange(length).unsqueeze(0)
    expert_parallel.split_experts(block, ranks.experts, config.parallel.exchange)
    if config.recompute != "none":
        recompute_blocks(SimpleNamespace(blocks=[block]), config.recompute)
    rotation = rope_cos_sin(positions, model.head_dim, model.rope_theta, master)
    with _stand_ins(rows * length, model), LiveBytes() as live, count_collectives() as seen:
        y_BSD, routing = block(x_BSD, rotation, AttentionMask(positions, None, True, "sdpa"))
        kept, forward = live.now, live.peak
        live.peak = live.now
        losses = [routing.sequence_loss_B] if routing and config.balancing.sequence_loss else []
        outputs = [y_BSD, *losses]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    inside = _inside_experts(model, rows * length) if block.sparse else 0
    travelled = seen.get(("all_to_all", ranks.sizes.expert), Traffic(0, 0))
    return Activations(kept, forward, live.peak - kept + inside, travelled)


@contextmanager
def _stand_ins(tokens: int, model: ModelConfig) -> Iterator[None]:
    """While this lasts, attention runs on meta, and an exchange is told even counts instead of asking."""

    def even(own_P2: Tensor, _others_P2: Tensor) -> Tensor:
        ranks = len(own_P2)
        sent = round(tokens * destinations(model.experts, model.active_experts, ranks) / ranks)
        return torch.tensor([[[sent, tokens * model.active_experts // ranks]] * ranks] * 2)

    with patch.dict(attention_backends._ENGINES, sdpa=_flash), patch.object(expert_parallel, "exchanged_counts", even):
        yield


def _flash(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, _window: int | None, _visible: AttentionMask) -> Tensor:
    flash: Callable[..., tuple] = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2), 0.0, True)[0].transpose(1, 2)


def _inside_experts(model: ModelConfig, tokens: int) -> float:
    """Bytes inside the backward pass of trinity_kernels.experts in bf16, at its two fullest moments.

    Where SwiGLU is differentiated there are nine tensors [R, F] in fp32 and the gathered gradient; where rows are
    summed up, seven, the pre-activations' gradient, and the rows in bf16 twice and once in fp32.
    """
    D, F = model.width, model.expert_width
    return tokens * model.active_experts * max(9 * 4 * F + 2 * D, 7 * 4 * F + 4 * F + 2 * D + 8 * D)


def embedding_activations(config: RunConfig, rows: int) -> Activations:
    """Of the embedding, by formula: its output before and after scaling; backward makes a gradient for every row."""
    size = getattr(torch, config.precision.compute).itemsize
    x = rows * config.data.sequence_length * config.model.width * size
    return Activations(x, 2 * x, x + config.model.vocab_size * config.model.width * size)


def head_activations(config: RunConfig, rows: int) -> Activations:
    """Of the head and the loss, by formula: it forms both its gradients in the forward pass, in chunks of tokens."""
    size, V, D = getattr(torch, config.precision.compute).itemsize, config.model.vocab_size, config.model.width
    tokens = rows * config.data.sequence_length
    kept = tokens * D * size + V * D * max(size, 4)  # the weight's gradient is summed in fp32 at least
    # on a GPU one chunk's logits become their gradient in place; backward scales both gradients into new memory
    return Activations(kept, kept + chunk_tokens(tokens, V, size, "cuda") * V * size, (tokens + V) * D * size)
