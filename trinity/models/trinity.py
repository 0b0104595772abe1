"""Trinity: the report's decoder, whole, in one place.

- Sandwich norms around every sublayer: y = x + RMSNorm₂(M(RMSNorm₁(x))), gains 1 and 1/√L (eq. 33-35).
- Three local layers (RoPE, window), then one global (NoPE), repeated; gated attention with QK-norm.
- The first layers dense, then sparse MoE layers with a shared expert.
- Embedding times √d; untied head; no biases anywhere; final RMSNorm.

Shapes: B batch, S sequence, D width, V vocabulary, M MoE layers, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.models.attention import Attention, rotation_of
from trinity.models.attention_backends import Visibility
from trinity.models.initialization import initialize
from trinity.models.layers import (
    Embedding,
    FusedPostNorm,
    FusedPreNorm,
    Head,
    PostNorm,
    ResidualStream,
    RMSNorm,
    SwiGLU,
)
from trinity.models.moe import MoE, Routing
from trinity_kernels.cross_entropy import IGNORE
from trinity_kernels.norm import wide


class Losses(NamedTuple):
    """Sums over one microbatch, so that microbatches and ranks add up; nothing here is divided yet.

    token_loss: scalar, Σ over valid targets of CE + z·lse², differentiable.
    ce_BS, lse_BS: [B, S] fp32, each token's cross-entropy and log-sum-exp, 0 where the target is ignored.
    top_logit: scalar fp32, the largest logit.
    sequence_loss_B: [B] fp32, Σ over MoE layers of Σ_i f_i·P_i, differentiable; None without MoE layers.
    counts_ME: [M, E] int64, tokens per expert; None without MoE layers.
    entropy_M: [M], Σ over tokens of each router's entropy; None without MoE layers.
    """

    token_loss: Tensor
    ce_BS: Tensor
    lse_BS: Tensor
    top_logit: Tensor
    sequence_loss_B: Tensor | None
    counts_ME: Tensor | None
    entropy_M: Tensor | None


class Block(nn.Module):
    """Attention and FFN (dense or MoE), each between its two norms."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        pre_norm = (config.width, config.norm_eps, 1.0, kernels.norms)
        post_norm = (config.width, config.norm_eps, config.layers**-0.5, kernels.norms)
        self.attention_norm = RMSNorm(*pre_norm)
        self.attention = Attention(config, layer, kernels)
        self.attention_post_norm = FusedPostNorm(*post_norm)
        self.ffn_norm = FusedPreNorm(*pre_norm)
        self.sparse = layer >= config.dense_layers
        self.ffn = MoE(config, kernels) if self.sparse else SwiGLU(config.width, config.dense_width, kernels.gate)
        self.ffn_post_norm = PostNorm(*post_norm)

    def forward(
        self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor], visible: Visibility
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] → the same, and the routing where the block is sparse."""
        y_BSD = self.attention(self.attention_norm(x_BSD), rotation, visible)
        x_BSD, u_BSD = self.attention_post_norm(y_BSD, x_BSD, self.ffn_norm)
        y, routing = self.ffn(u_BSD), None
        if self.sparse:
            y, routing = y
        return self.ffn_post_norm(y, ResidualStream(x_BSD)), routing


class Trinity(nn.Module):
    """The model.

    Args:
        config: its sizes.
        kernels: which implementation of each operation; by default what is best on the device the tensors are on.

    Initialised with seed 0, on any device but meta: there nothing is computed, and after `to_empty` init_weights or a
    checkpoint must fill the values. A model to be loaded is best built there: initialising takes a minute for 10⁹
    parameters on a CPU core.
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.config, self.attention_engine = config, kernels.attention
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer, kernels) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, kernel=kernels.norms)
        self.head = Head(config, kernels.head)
        if self.head.weight.device.type != "meta":
            self.init_weights(seed=0)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer as a function of the seed and its name alone (eq. 34-38)."""
        initialize(self, self.config, seed)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        targets_BS: Tensor | None = None,
        z: float = 0.0,
    ) -> Tensor | Losses:
        """Logits, or the losses of given targets.

        Args:
            tokens_BS: [B, S] int64.
            positions_BS: [B or 1, S] int64, increasing along the row; 0…S−1 by default.
            document_ids_BS: [B, S] integers; where given, attention never crosses a document.
            targets_BS: [B, S] int64, already shifted: the token that follows; −100 counts nowhere.
            z: coefficient of the z-loss.
        Returns:
            logits [B, S, V] in the compute dtype, or Losses.
        """
        plain = positions_BS is None
        if plain:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        visible = Visibility(positions_BS, document_ids_BS, plain, self.attention_engine)
        x_BSD = self.embed(tokens_BS)
        precision = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
        rotation = rotation_of(positions_BS, self.config.head_dim, self.config.rope_theta, precision)
        routings = []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD, rotation, visible)
            if routing is not None:
                routings.append(routing)
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return self.head(x_BSD)
        return _collect(self.head(x_BSD, targets_BS, z), routings, tokens_BS.shape)

    def loss(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        z: float = 0.0,
    ) -> Tensor:
        """Mean loss over the valid targets of one batch on one process, to call `backward` on.

        The sequence-wise loss is not in it: `forward` with targets returns that, and the sums for a mean over ranks.

        Args:
            tokens_BS: [B, S] int64.
            targets_BS: [B, S] int64; by default the next token of the row, within a document where ids are given.
            document_ids_BS: as in `forward`.
            z: coefficient of the z-loss; 0 leaves cross-entropy alone.
        Returns:
            scalar in nats per token, differentiable, fp32 or float64; 0 where no target is valid.
        """
        if targets_BS is None:
            targets_BS = next_tokens(tokens_BS, document_ids_BS)
        losses = self(tokens_BS, document_ids_BS=document_ids_BS, targets_BS=targets_BS, z=z)
        return losses.token_loss / (targets_BS != IGNORE).sum().clamp(min=1)


def next_tokens(tokens_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
    """The targets of a batch of rows: each token's successor, −100 (counts nowhere) where the row or document ends.

    Args:
        tokens_BS: [B, S] int64.
        document_ids_BS: [B, S] integers, or None where a row is one document.
    Returns:
        [B, S] int64.
    """
    targets_BS = torch.full_like(tokens_BS, IGNORE)
    targets_BS[:, :-1] = tokens_BS[:, 1:]
    if document_ids_BS is not None:
        ends_BS = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        targets_BS[:, :-1][ends_BS] = IGNORE
    return targets_BS


def _collect(head: tuple[Tensor, ...], routings: list[Routing], rows: torch.Size) -> Losses:
    token_loss, ce_T, lse_T, top_T = head
    losses = Losses(token_loss, ce_T.view(rows), lse_T.view(rows), wide(top_T).amax(), None, None, None)
    if not routings:
        return losses
    return losses._replace(
        sequence_loss_B=torch.stack([routing.sequence_loss_B for routing in routings]).sum(dim=0),
        counts_ME=torch.stack([routing.counts_E for routing in routings]),
        entropy_M=torch.stack([routing.entropy_sum for routing in routings]),
    )


def moe_layers(model: Trinity) -> list[MoE]:
    """The sparse layers, first to last."""
    return [block.ffn for block in model.blocks if block.sparse]
