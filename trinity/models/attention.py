"""The report's grouped-query attention (eq. 9-14): QK-norm, RoPE on local layers only, a sigmoid gate on the output.

- One projection computes queries, keys, values and gate: one GEMM, four matrices for the optimizer. In backward the
  norms and the gate write their gradients into one tensor, the gradient of the projection (trinity_kernels.split).
- RMSNorm over the head width on queries and keys, before RoPE.
- Local layers: RoPE (rotate-half, fp32) and a causal window. Global layers: causal, no positional encoding (NoPE).
- σ(W_G x) multiplies the attention output elementwise before the output projection.

Shapes: B batch, S sequence, D width, H query heads, G key/value heads, C head width.
"""

import torch
from torch import Tensor, nn

import trinity_kernels
from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.models.attention_backends import AttentionMask, attend
from trinity.models.kv_cache import LayerCache
from trinity.models.layers import Linear, QKNorm
from trinity.models.row_parts import RowParts


class AttentionCore(nn.Module):
    """Softmax attention: a module without parameters, so that a hook sees the queries and keys of the engine."""

    def forward(
        self, q_BSHC: Tensor, k_BUGC: Tensor, v_BUGC: Tensor, window: int | None, mask: AttentionMask
    ) -> Tensor:
        """See attention_backends.attend."""
        return attend(q_BSHC, k_BUGC, v_BUGC, window, mask)


class Attention(nn.Module):
    """One attention sublayer.

    Args:
        config: the model's sizes.
        layer: 0-based index of the block; decides local or global.
        kernels: which implementation of each operation.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.gate_kernel = kernels.gate
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.window = None if config.is_global(layer) else config.window
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkvg = Linear(config.width, (q_width, kv_width, kv_width, q_width))
        self.q_norm = QKNorm(config.head_dim, config.norm_eps, kernel=kernels.qk_norm)
        self.k_norm = QKNorm(config.head_dim, config.norm_eps, kernel=kernels.qk_norm)
        self.core = AttentionCore()
        self.out = Linear(q_width, (config.width,))

    def forward(
        self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: AttentionMask | RowParts,
        cache: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention output before the post-norm.

        Args:
            x_BSD: the normalised input.
            rotation: cos and sin [B or 1, S, 1, C/2] fp32 of every position; global layers ignore it.
            mask: which keys each query may attend to; or the rest of the rows, where x is a part of them.
            cache: keys and values of earlier tokens, to which those of x are added.
        Returns:
            [B, S, D], x's dtype.
        """
        (q, k, v, gate), into = trinity_kernels.split_projection(self.qkvg(x_BSD), self.qkvg.rows)
        if self.window is None:  # a global layer: NoPE
            rotation = None
        q_BSHC = self.q_norm(q.unflatten(-1, (self.heads, self.head_dim)), rotation, into[0])
        k_BSGC = self.k_norm(k.unflatten(-1, (self.kv_heads, self.head_dim)), rotation, into[1])
        v_BSGC = v.unflatten(-1, (self.kv_heads, self.head_dim))
        if cache is None:
            q, k, v, visible = mask.before_attention(q_BSHC, k_BSGC, v_BSGC, self.window)
            mixed = mask.after_attention(self.core(q, k, v, self.window, visible), self.window)
        else:
            mixed = cache.attend(q_BSHC, k_BSGC, v_BSGC)
        return self.out(trinity_kernels.sigmoid_gate(mixed.flatten(-2), gate, into[3], kernel=self.gate_kernel))


def rope_cos_sin(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (Su et al., arXiv 2104.09864), one angle per pair of features.

    The angles are computed in float64: in fp32, the angle of position 260,000 is off by up to 0.01 radian, and logits
    would depend on the absolute position (transformers computes them in fp32). See README.md.

    Args:
        positions_BS: [B or 1, S] int64, the tokens' positions.
        dtype: fp32, or float64 for a model in float64.
    Returns:
        cos, sin: [B or 1, S, 1, C/2].
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float64) / head_dim
    angles = (positions_BS.double().unsqueeze(-1) * theta**-exponent).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
