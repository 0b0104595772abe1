"""Trinity: the report's decoder.

- Sandwich norms around every sublayer: y = x + RMSNorm₂(M(RMSNorm₁(x))), gains 1 and 1/√L (eq. 33-35).
- Three local layers (RoPE, sliding window), then one global layer (NoPE), repeated; gated attention with QK-norm.
- The first layers dense, then sparse MoE layers with a shared expert.
- Embedding times √d; untied head; no bias in any projection; final RMSNorm.

Shapes: B batch, S sequence, D width, V vocabulary, M MoE layers, E experts.
"""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.models.attention import Attention, rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.initialization import initialize
from trinity.models.kv_cache import KVCache, LayerCache
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
from trinity.models.moe import MoE, Padding, Routing
from trinity.models.row_parts import RowParts
from trinity_kernels.cross_entropy import IGNORE
from trinity_kernels.norm import wide


class Losses(NamedTuple):
    """Losses of one microbatch as sums, not means, so that they can be added over microbatches and ranks.

    token_loss: scalar, Σ over valid targets of w·(CE + z·lse²), differentiable; w is 1, or the target's weight.
    ce_BS, lse_BS: [B, S] fp32, each token's cross-entropy and log-sum-exp, 0 where the target is ignored; not weighted.
    top_logit: scalar fp32, the largest logit, of all tokens for which the head is computed.
    sequence_loss_B: [B] fp32, Σ over MoE layers of Σ_i f_i·P_i, differentiable; None without MoE layers
        or where it is not wanted.
    counts_ME: [M, E] int64, tokens per expert; None without MoE layers.
    entropy_M: [M], Σ over tokens of each router's entropy; None without MoE layers.
    top_BS: [B, S] fp32, each token's largest logit; −∞ where the head is not computed.
    """

    token_loss: Tensor
    ce_BS: Tensor
    lse_BS: Tensor
    top_logit: Tensor
    sequence_loss_B: Tensor | None
    counts_ME: Tensor | None
    entropy_M: Tensor | None
    top_BS: Tensor


class Block(nn.Module):
    """Attention and FFN (dense or MoE), each between two norms."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        pre_norm = (config.width, config.norm_eps, 1.0, kernels.norms)
        post_norm = (config.width, config.norm_eps, config.layers**-0.5, kernels.norms)
        self.attention_norm = RMSNorm(*pre_norm)
        self.attention = Attention(config, layer, kernels)
        self.attention_post_norm = FusedPostNorm(*post_norm)
        self.ffn_norm = FusedPreNorm(*pre_norm)
        self.sparse = layer >= config.dense_layers
        self.ffn: MoE | SwiGLU = (
            MoE(config, kernels) if self.sparse else SwiGLU(config.width, config.dense_width, kernels.gate)
        )
        self.ffn_post_norm = PostNorm(*post_norm)

    def forward(
        self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor], mask: AttentionMask | RowParts,
        with_sequence_loss: bool = True, padding: Padding | None = None, cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """[B, S, D] → the same shape and dtype; and the routing statistics of a MoE block, else None."""
        y_BSD = self.attention(self.attention_norm(x_BSD), rotation, mask, cache)
        x_BSD, u_BSD = self.attention_post_norm(y_BSD, x_BSD, self.ffn_norm)
        routing = None
        if self.sparse:
            out_BSD, routing = self.ffn(u_BSD, with_sequence_loss, padding, mask.row_counts)
        else:
            out_BSD = self.ffn(u_BSD)
        return self.ffn_post_norm(out_BSD, ResidualStream(x_BSD)), routing


class Trinity(nn.Module):
    """The model.

    Args:
        config: its sizes.
        kernels: which implementation of each operation; by default the best one for the tensors' device.

    The constructor initialises all parameters with seed 0, except on the meta device: there, call `to_empty` and then
    init_weights, or load a checkpoint. To load a checkpoint, build the model on the meta device, because initialising
    10⁹ parameters takes a minute on one CPU core.

    Attributes:
        variant: name of what hooks changed in the architecture, for an experiment; None: it is Trinity. The weights of
            a variant cannot be exported, because other programs would compute something else with them.
    """

    variant: str | None = None

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
        """Initialise every parameter and buffer (eq. 34-38); the values depend on the seed and its name alone."""
        initialize(self, self.config, seed)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        targets_BS: Tensor | None = None,
        z: float = 0.0,
        documents: int | None = None,
        with_sequence_loss: bool = True,
        weights_BS: Tensor | None = None,
        padding: int | None = None,
        trained: int | None = None,
        parts: RowParts | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor | Losses:
        """Logits; with targets, the losses.

        Args:
            tokens_BS: [B, S] int64.
            positions_BS: [B or 1, S] int64, increasing along the row; 0…S−1 by default.
            document_ids_BS: [B, S] integers; if given, attention stays within a document. Negative at the end of a row:
                padding, which is routed to no expert.
            targets_BS: [B, S] int64, already shifted: each token's successor; −100 is ignored.
            z: coefficient of the z-loss.
            documents: the number of documents in document_ids_BS or more, so that a GPU's attention need not count
                them, for which the host would wait; see AttentionMask.
            with_sequence_loss: compute the sequence-wise balancing loss; only with targets.
            weights_BS: [B, S] floating point, each target's weight in token_loss; None: 1.
            padding: the number of padding tokens; None: counted from document_ids_BS, for which the host waits.
            trained: the number of targets that are not ignored, to compute the head for their tokens alone; None: all.
            parts: where the tokens are a part of their rows (context parallelism): it has their positions, documents
                and mask, and the sums of Losses are this part's. None: they are whole rows.
            cache: keys and values of the rows' earlier tokens, to which these are added; without positions and targets.
            logits_to_keep: without targets, compute the logits of the last tokens alone, this many (0: of all); or of
                the tokens at these places of their rows, [B, N] int64.
        Returns:
            logits [B, S, V], or [B, N, V], in the compute dtype, or Losses.
        """
        mask: AttentionMask | RowParts
        if parts is not None:
            positions_BS, mask = parts.positions_BS, parts
        else:
            positions_BS, mask = self._mask_of_rows(tokens_BS, positions_BS, document_ids_BS, documents, cache)
        with_sequence_loss = with_sequence_loss and targets_BS is not None
        padded = _padding(document_ids_BS, padding)
        x_BSD, routings = self._hidden(tokens_BS, positions_BS, mask, with_sequence_loss, padded, cache)
        if targets_BS is None:
            return self.head(self.norm(_keep(x_BSD, logits_to_keep)))
        if trained is None:
            losses = self.head(self.norm(x_BSD), targets_BS, z, weights_BS)
        else:
            losses = self._losses_of_trained(x_BSD, targets_BS, z, weights_BS, trained)
        return _combine_losses(losses, routings, tokens_BS.shape)

    def _hidden(
        self, tokens_BS: Tensor, positions_BS: Tensor, mask: AttentionMask | RowParts, with_sequence_loss: bool,
        padding: Padding | None, cache: KVCache | None,
    ) -> tuple[Tensor, list[Routing]]:  # fmt: skip
        """The residual stream after the last block, [B, S, D], and the statistics of each MoE block."""
        x_BSD = self.embed(tokens_BS)
        precision = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
        rotation = rope_cos_sin(positions_BS, self.config.head_dim, self.config.rope_theta, precision)
        routings = []
        for block, layer_cache in zip(self.blocks, repeat(None) if cache is None else cache.layers):
            x_BSD, routing = block(x_BSD, rotation, mask, with_sequence_loss, padding, layer_cache)
            if routing is not None:
                routings.append(routing)
        return x_BSD, routings

    def _mask_of_rows(
        self, tokens_BS: Tensor, positions_BS: Tensor | None, document_ids_BS: Tensor | None, documents: int | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, AttentionMask]:  # fmt: skip
        """Positions and mask of whole rows, or of their new tokens; see forward."""
        if cache is not None:
            step = cache.begin(tokens_BS.shape[1], tokens_BS.device, self.attention_engine)
            return step.positions_BS, step.mask
        default_positions = positions_BS is None
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        engine = self.attention_engine
        return positions_BS, AttentionMask(positions_BS, document_ids_BS, default_positions, engine, documents)

    def _losses_of_trained(
        self, x_BSD: Tensor, targets_BS: Tensor, z: float, weights_BS: Tensor | None, trained: int
    ) -> tuple[Tensor, ...]:
        """The results of norm and head, computed for the `trained` tokens with a target alone.

        One token at least is computed: without any target the first, whose results are 0 as its target is ignored, and
        its largest logit −∞ as without it.
        """
        targets_T = targets_BS.flatten()
        # static: the host does not wait for the number of tokens
        index_N = torch.nonzero_static(targets_T != IGNORE, size=max(trained, 1), fill_value=0).squeeze(1)
        x_1ND = self.norm(x_BSD.flatten(0, 1).index_select(0, index_N).unsqueeze(0))
        weights_N = None if weights_BS is None else weights_BS.flatten()[index_N]
        targets_N = targets_T[index_N]
        token_loss, ce_N, lse_N, top_N = self.head(x_1ND, targets_N, z, weights_N)
        values = ((ce_N, 0.0), (lse_N, 0.0), (top_N.masked_fill(targets_N == IGNORE, -torch.inf), -torch.inf))
        return token_loss, *(x_N.new_full(targets_T.shape, empty).index_copy(0, index_N, x_N) for x_N, empty in values)

    def loss(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        z: float = 0.0,
    ) -> Tensor:
        """Mean loss over the valid targets of one batch on one process; call `backward` on it.

        It does not include the sequence-wise balancing loss. `forward` with targets returns that one, and sums instead
        of means.

        Args:
            tokens_BS: [B, S] int64.
            targets_BS: [B, S] int64; by default the next token of the row, or of the document if ids are given.
            document_ids_BS: as in `forward`.
            z: coefficient of the z-loss; 0: cross-entropy alone.
        Returns:
            scalar in nats per token, differentiable, fp32 or float64; 0 if no target is valid.
        """
        if targets_BS is None:
            targets_BS = next_tokens(tokens_BS, document_ids_BS)
        losses = self(tokens_BS, document_ids_BS=document_ids_BS, targets_BS=targets_BS, z=z, with_sequence_loss=False)
        return losses.token_loss / (targets_BS != IGNORE).sum().clamp(min=1)


def next_tokens(tokens_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
    """Targets of a batch: each token's successor, and −100 (ignored) at the end of a row or document, and for padding.

    Args:
        tokens_BS: [B, S] int64.
        document_ids_BS: [B, S] integers, negative for padding; None: each row is one document.
    Returns:
        [B, S] int64.
    """
    targets_BS = torch.full_like(tokens_BS, IGNORE)
    targets_BS[:, :-1] = tokens_BS[:, 1:]
    if document_ids_BS is not None:
        ends_BS = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        targets_BS[:, :-1][ends_BS] = IGNORE
        targets_BS[document_ids_BS < 0] = IGNORE
    return targets_BS


def _keep(x_BSD: Tensor, which: int | Tensor) -> Tensor:
    """Of each row the last `which` tokens, or those at the places `which`, [B, N]; 0: all."""
    if isinstance(which, Tensor):
        return x_BSD.take_along_dim(which.unsqueeze(-1), dim=1)
    return x_BSD[:, -which:] if which else x_BSD


def _padding(document_ids_BS: Tensor | None, tokens: int | None) -> Padding | None:
    """The padding of a batch, of as many tokens; None if there is none."""
    if document_ids_BS is None or tokens == 0:
        return None
    mask_BS = document_ids_BS < 0
    tokens = int(mask_BS.sum()) if tokens is None else tokens
    return Padding(mask_BS, tokens) if tokens else None


def _combine_losses(head_losses: tuple[Tensor, ...], routings: list[Routing], shape: torch.Size) -> Losses:
    token_loss, ce_T, lse_T, top_T = head_losses
    top_T = wide(top_T)
    per_token = ce_T.view(shape), lse_T.view(shape), top_T.amax()
    losses = Losses(token_loss, *per_token, None, None, None, top_BS=top_T.view(shape))
    if not routings:
        return losses
    sequence_losses = [routing.sequence_loss_B for routing in routings if routing.sequence_loss_B is not None]
    return losses._replace(
        sequence_loss_B=torch.stack(sequence_losses).sum(dim=0) if sequence_losses else None,
        counts_ME=torch.stack([routing.counts_E for routing in routings]),
        entropy_M=torch.stack([routing.entropy_sum for routing in routings]),
    )


def moe_layers(model: Trinity) -> list[MoE]:
    """The MoE layers, first to last."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
