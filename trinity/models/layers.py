"""The small parts every block is made of: a projection that knows its matrices, RMSNorm, and the SwiGLU network.

Shapes: ... any leading dimensions, D model width, F feed-forward width, I and O a projection's input and output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinity_kernels
from trinity.config.model import ModelConfig


class Linear(nn.Module):
    """y = x·Wᵀ without bias, where W may hold several matrices stacked by rows.

    Args:
        inputs: I.
        rows: output width of each matrix; each is orthogonalised on its own.
    """

    def __init__(self, inputs: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(sum(rows), inputs))
        self.roles = {"weight": ("matrix", rows)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], x's dtype, which must be the weight's."""
        return trinity_kernels.linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, its gain kept and multiplied in fp32.

    Args:
        width: of the last dimension.
        eps: added to the mean square.
        initial_gain: 1, or 1/√L for the norms after a sublayer (eq. 34-35).
        kernel: which implementation.
    """

    roles = {"gain": ("gain", ())}

    def __init__(self, width: int, eps: float, initial_gain: float = 1.0, kernel: str = "auto") -> None:
        super().__init__()
        self.eps, self.initial_gain, self.kernel = eps, initial_gain, kernel
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same shape and dtype."""
        return trinity_kernels.rms_norm(x, self.gain, self.eps, kernel=self.kernel)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) ∘ W_up x): the dense FFN and the shared expert (Shazeer, arXiv 2002.05202).

    Args:
        width: D.
        hidden: F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, (hidden, hidden))
        self.down = Linear(hidden, (width,))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


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
    """Untied LM head. The loss is computed inside its forward: only there are its sharded weights whole."""

    roles = {"weight": ("head", ())}

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(
        self, x_BSD: Tensor, targets_BS: Tensor | None = None, z: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, S, V]; with targets, what trinity_kernels.linear_cross_entropy returns."""
        if targets_BS is None:
            return trinity_kernels.linear(x_BSD, self.weight)
        x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        return trinity_kernels.linear_cross_entropy(x_TD, self.weight, targets_T, z, kernel=self.kernel)
