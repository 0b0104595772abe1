"""Layers that a model is built from: projection, norms, SwiGLU, embedding and head.

Shapes: ... any leading dimensions, D model width, F feed-forward width, I and O a projection's input and output width,
B batch, S sequence, H heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinity_kernels
from trinity.config.model import ModelConfig
from trinity_kernels.split import GradientSlice


class Linear(nn.Module):
    """y = x·Wᵀ without bias, where W may hold several matrices stacked by rows.

    Args:
        inputs: I.
        rows: output width of each stacked matrix; Muon orthogonalises each matrix on its own.
    """

    def __init__(self, inputs: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(sum(rows), inputs))
        self.roles = {"weight": ("matrix", rows)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], x's dtype, which must be the weight's."""
        return trinity_kernels.linear(x, self.weight)


class Norm(nn.Module):
    """Base of the RMSNorm modules: holds the gain, which is kept and multiplied in fp32.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
        initial_gain: 1, or 1/√L for the norms after a sublayer (eq. 34-35).
        kernel: which implementation.
    """

    roles = {"gain": ("gain", ())}

    def __init__(self, width: int, eps: float, initial_gain: float = 1.0, kernel: str = "auto") -> None:
        super().__init__()
        self.eps, self.initial_gain, self.kernel = eps, initial_gain, kernel
        self.gain = nn.Parameter(torch.empty(width))


class RMSNorm(Norm):
    """RMSNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same shape and dtype."""
        return trinity_kernels.rms_norm(x, self.gain, self.eps, kernel=self.kernel)


class ResidualStream:
    """The residual stream x, wrapped in an object in which FSDP2's hooks find no tensor.

    In recompute, the hooks of a module that runs after the experts treat the call as a new forward pass and put a view
    on each input tensor, which the first pass did not have. Selective checkpointing tolerates one extra view; the
    sublayer's output already uses it, so x is hidden.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x


class PostNorm(Norm):
    """The norm after the last sublayer of a block, added to the residual stream: r = x + RMSNorm(y) (eq. 33)."""

    def forward(self, y: Tensor, residual: ResidualStream) -> Tensor:
        """The residual stream after the sublayer.

        Args:
            y: [..., width], the sublayer's output.
            residual: x, [..., width]: the residual stream before the sublayer.
        Returns:
            [..., width], x's dtype.
        """
        return trinity_kernels.norm_add(y, residual.x, self.gain, self.eps, kernel=self.kernel)


class FusedPreNorm(Norm):
    """The norm before the second sublayer, with the residual addition before it (eq. 33); FusedPostNorm calls it."""

    def forward(self, y: Tensor, x: Tensor, post_gain: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream r = x + RMSNorm(y)·post_gain and its norm RMSNorm(r)·gain.

        Args:
            y: [..., width], the first sublayer's output.
            x: [..., width], the residual stream before that sublayer.
            post_gain: [width], the gain of the norm after that sublayer.
        Returns:
            r and its norm, each [..., width], x's dtype.
        """
        return trinity_kernels.add_norm(y, x, post_gain, self.gain, self.eps, kernel=self.kernel)


class FusedPostNorm(Norm):
    """The norm after the first sublayer of a block, computed together with the norm before the second sublayer.

    One op, trinity_kernels.add_norm, needs the gains of both norms. They stay two modules because checkpoint keys and
    initial values follow the parameter names `attention_post_norm.gain` and `ffn_norm.gain`. This one's forward calls
    the other, because FSDP2 frees the gathered gains of a block once each of its norms has run: both have to run.
    """

    def forward(self, y: Tensor, x: Tensor, next_norm: FusedPreNorm) -> tuple[Tensor, Tensor]:
        """Call `next_norm`, which has the same ε, with this norm's gain; see FusedPreNorm.forward."""
        return next_norm(y, x, self.gain)


class QKNorm(Norm):
    """RMSNorm of queries or keys over the head width, then RoPE in local layers."""

    def forward(
        self, x_BSHC: Tensor, rotation: tuple[Tensor, Tensor] | None, into: GradientSlice | None = None
    ) -> Tensor:
        """[B, S, H, C], any strides → the same shape and dtype.

        Args:
            rotation: cos and sin [B or 1, S, 1, C/2]; None: no positional encoding (NoPE).
            into: where x's gradient belongs, if x is a part of trinity_kernels.split_projection.
        """
        return trinity_kernels.qk_norm(x_BSHC, self.gain, self.eps, rotation, into, kernel=self.kernel)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) ∘ W_up x): the dense FFN and the shared expert (Shazeer, arXiv 2002.05202).

    Args:
        width: D.
        hidden: F.
        kernel: which implementation of the op between the two projections.
    """

    def __init__(self, width: int, hidden: int, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.gate_up = Linear(width, (hidden, hidden))
        self.down = Linear(hidden, (width,))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down(trinity_kernels.swiglu(self.gate_up(x), kernel=self.kernel))


class Embedding(nn.Module):
    """Token embedding, its output multiplied by √d (eq. 39)."""

    roles = {"weight": ("embedding", ())}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.width**0.5
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] int64 → [B, S, D], the weight's dtype."""
        return F.embedding(tokens_BS, self.weight) * self.scale


class Head(nn.Module):
    """Untied LM head. Its forward also computes the loss, because FSDP2 gathers the sharded weight only there."""

    roles = {"weight": ("head", ())}

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(
        self, x_BSD: Tensor, targets_BS: Tensor | None = None, z: float = 0.0, weights_BS: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, S, V]; with targets, the four results of trinity_kernels.linear_cross_entropy.

        Args:
            weights_BS: [B, S], each target's weight in the loss; None: 1.
        """
        if targets_BS is None:
            return trinity_kernels.linear(x_BSD, self.weight)
        x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        weights_T = None if weights_BS is None else weights_BS.flatten()
        return trinity_kernels.linear_cross_entropy(
            x_TD, self.weight, targets_T, z, weights_T=weights_T, kernel=self.kernel
        )
