"""The small parts every block is made of: a projection that knows its matrices, norms, and the SwiGLU network.

Shapes: ... any leading dimensions, D model width, F feed-forward width, I and O a projection's input and output width,
B batch, S sequence, H heads, C head width.
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

    def forward(
        self, x: Tensor, stream: "Stream | None" = None, after: "PostNorm | None" = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; or, called by a PostNorm from its own forward, of the sum that the PostNorm stands for.

        Args:
            x: [..., width].
            stream, after: what PostNorm adds to, and itself.
        Returns:
            [..., width], x's dtype; with `after`: stream + after's norm of x, and the norm of this sum.
        """
        if after is None:
            return trinity_kernels.rms_norm(x, self.gain, self.eps, kernel=self.kernel)
        return trinity_kernels.add_norm(x, stream.x, after.gain, self.gain, self.eps, kernel=self.kernel)


class Stream:
    """The residual stream as an argument that FSDP2's hooks pass over.

    In recompute, the hooks of a module that comes after the experts take its tensors to be a new forward pass and put a
    view on each that the first pass had not, of which selective checkpointing forgives one. The sublayer's is that one.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x


class PostNorm(RMSNorm):
    """The norm after a sublayer, added to the residual stream; in one op with the norm that follows, if one does.

    That op needs the gains of two modules, and FSDP2 has a module's parameters whole only while its forward runs; what
    the modules of a group gathered is freed when each of them has run once. So this forward calls the following module,
    which calls the op: both run, hooks and all, and both gains are whole.
    """

    def forward(self, y: Tensor, stream: Stream, following: RMSNorm | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The residual stream after the sublayer (eq. 33).

        Args:
            y: [..., width], what the sublayer gave.
            stream: [..., width], what went into it before its first norm.
            following: the norm before the next sublayer, with the same ε.
        Returns:
            stream + the norm of y, the same shape and dtype; with `following`, that and its norm.
        """
        if following is None:
            return trinity_kernels.norm_add(y, stream.x, self.gain, self.eps, kernel=self.kernel)
        return following(y, stream, after=self)


class QKNorm(RMSNorm):
    """The norm of queries or keys over the head width, with RoPE where the layer has it."""

    def forward(self, x_BSHC: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, S, H, C], any strides → the same shape and dtype.

        Args:
            rotation: cos and sin [B or 1, S, 1, C/2]; None: no positional encoding.
        """
        return trinity_kernels.qk_norm(x_BSHC, self.gain, self.eps, rotation, kernel=self.kernel)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) ∘ W_up x): the dense FFN and the shared expert (Shazeer, arXiv 2002.05202).

    Args:
        width: D.
        hidden: F.
        kernel: which implementation of what is between the projections.
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
