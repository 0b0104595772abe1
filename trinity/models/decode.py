"""Decode one token of each row: Trinity's forward pass with a cache, on a CPU by as few calls of torch as possible.

For few tokens, calling torch takes longer than computing, so that fused products and short functions decide the speed.
The equations are those of the modules (trinity.py, attention.py, moe.py), to which tests compare this file. It runs
where all weights are fp32 on a CPU and in their plain modules; elsewhere the model itself runs.

RMSNorm is √D·g·x / hypot(‖x‖, √(ε·D)), which is g·x / √(mean(x²) + ε). Queries and keys are normalised and rotated as
one tensor of H + G heads, and RoPE is x·cos + roll(x)·(−sin, sin).

Shapes: B rows, D width, V vocabulary, H query heads, G key/value heads, N = H + G, C head width, E experts, K active
experts.
"""

from functools import cache as cached
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.models.attention import rope_cos_sin
from trinity.models.kv_cache import KVCache, LayerCache
from trinity.models.layers import SwiGLU
from trinity.models.moe import MoE, local_dispatch
from trinity.models.trinity import Block, Trinity
from trinity_kernels import expert_mlp
from trinity_kernels.expert_engines import ENGINES
from trinity_kernels.experts_cpu import forward_one_token
from trinity_kernels.routing import TINY


class Decoder:
    """The forward pass of one new token of each row, after a first pass over their prompts.

    Args:
        model: not sharded.
        cache: of the rows. It and the weights' values belong together: make new ones when weights change.
    """

    def __init__(self, model: Trinity, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._layers: list[_Layer] | None = None
        if _is_plain(model):
            self._layers = [_Layer(cast(Block, block), layer) for block, layer in zip(model.blocks, cache.layers)]

    @property
    def is_short(self) -> bool:
        """Whether the model is decoded here, and not by its own forward."""
        return self._layers is not None

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] of the tokens after these."""
        model, cache = self._model, self._cache
        if self._layers is None:
            return model(tokens_B.unsqueeze(1), cache=cache)[:, -1]
        step = cache.begin(1, tokens_B.device)
        rope = _rope(step.positions_BS, model.config.head_dim, model.config.rope_theta)
        x_BD = model.embed(tokens_B)
        for layer in self._layers:
            x_BD = layer(x_BD, rope)
        return F.linear(_norm(x_BD, model.norm.gain, model.norm.eps), model.head.weight)


def _is_plain(model: Trinity) -> bool:
    """Whether every weight is an fp32 tensor on a CPU, and every module computes as it was built, unobserved."""
    weights = all(
        type(weight.data) is Tensor and weight.is_cpu and weight.dtype == torch.float32 for weight in model.parameters()
    )
    built = all(
        "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
        for module in model.modules()
    )
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    return weights and built and all(m.dispatcher is local_dispatch and m.experts.kernel not in ENGINES for m in moes)


class _Rope(NamedTuple):
    """cos and (−sin, sin) [B or 1, 1, C]; `half` is C/2."""

    cos: Tensor
    sin: Tensor
    half: int


def _rope(positions_B1: Tensor, head_dim: int, theta: float) -> _Rope:
    cos, sin = (x.squeeze(1) for x in rope_cos_sin(positions_B1, head_dim, theta, torch.float32))
    return _Rope(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1), head_dim // 2)


class _Layer:
    """One block."""

    def __init__(self, block: Block, cache: LayerCache) -> None:
        attention = block.attention
        self._cache, self._heads, self._eps = cache, attention.heads, block.attention_norm.eps
        self._gains = [
            norm.gain for norm in (block.attention_norm, block.attention_post_norm, block.ffn_norm, block.ffn_post_norm)
        ]
        self._qkvg, self._out = attention.qkvg.weight, attention.out.weight
        q, k, v, gate = attention.qkvg.rows
        self._widths = (q + k, v, gate)
        self._qk_shape = (-1, attention.heads + attention.kv_heads, attention.head_dim)
        self._qk_gain_NC = torch.cat(
            (attention.q_norm.gain.expand(attention.heads, -1), attention.k_norm.gain.expand(attention.kv_heads, -1))
        )
        self._ffn = _MoE(block.ffn) if isinstance(block.ffn, MoE) else _SwiGLU(block.ffn)

    def __call__(self, x_BD: Tensor, rope: _Rope) -> Tensor:
        before_attention, after_attention, before_ffn, after_ffn = self._gains
        y_BD = self._attend(_norm(x_BD, before_attention, self._eps), rope)
        x_BD = _norm(y_BD, after_attention, self._eps, x_BD)
        return _norm(self._ffn(_norm(x_BD, before_ffn, self._eps)), after_ffn, self._eps, x_BD)

    def _attend(self, x_BD: Tensor, rope: _Rope) -> Tensor:
        qk, v, gate = F.linear(x_BD, self._qkvg).split_with_sizes(self._widths, dim=-1)
        qk_BNC = _norm(qk.view(self._qk_shape), self._qk_gain_NC, self._eps)
        if self._cache.window is not None:
            qk_BNC = torch.addcmul(qk_BNC * rope.cos, qk_BNC.roll(rope.half, -1), rope.sin)
        q_BHC, k_BGC = qk_BNC.tensor_split((self._heads,), dim=1)
        mixed_BHC = self._cache.attend_once(q_BHC, k_BGC, v.view(k_BGC.shape))
        return F.linear(torch.sigmoid(gate).mul_(mixed_BHC.view(gate.shape)), self._out)


class _SwiGLU:
    """A dense FFN, or the shared expert."""

    def __init__(self, ffn: SwiGLU) -> None:
        self._gate_up, self._down = ffn.gate_up.weight, ffn.down.weight

    def __call__(self, x_BD: Tensor) -> Tensor:
        gate, up = F.linear(x_BD, self._gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), self._down)


class _MoE:
    """Router, routed experts and shared expert, without statistics."""

    def __init__(self, moe: MoE) -> None:
        self._router, self._bias_E = moe.router.weight, moe.expert_bias
        self._active, self._scale = moe.router.active, moe.router.route_scale
        self._gate_up, self._down, self._shared = moe.experts.gate_up, moe.experts.down, _SwiGLU(moe.shared)

    def __call__(self, x_BD: Tensor) -> Tensor:
        scores_BE = torch.sigmoid(F.linear(x_BD, self._router))
        indices_BK = torch.topk(scores_BE + self._bias_E, self._active).indices
        gates_BK = scores_BE.gather(1, indices_BK)
        gates_BK = gates_BK / gates_BK.sum(dim=1, keepdim=True).add_(_constant(TINY)) * _constant(self._scale)
        experts = forward_one_token if len(x_BD) == 1 else expert_mlp
        return experts(x_BD, self._gate_up, self._down, indices_BK, gates_BK, plus_TD=self._shared(x_BD))


def _norm(x: Tensor, gain: Tensor, eps: float, plus: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension, plus another tensor of x's shape."""
    width = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / torch.hypot(length, _constant((eps * width) ** 0.5))
    return torch.addcmul(_constant(0.0) if plus is None else plus, unit, gain, value=width**0.5)


@cached
def _constant(value: float) -> Tensor:
    """A number as a tensor: making one takes as long as an operation."""
    return torch.tensor(value)
