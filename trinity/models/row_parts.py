"""What the model needs of the rest of its rows, where the tokens of a forward pass are a part of each row.

Attention needs keys and values of other tokens of the row, and the sequence-wise balancing loss the counts of the whole
row; everything else of the model acts on single tokens. trinity.parallel.context_parallel implements this. Where the
tokens are whole rows, the mask itself (attention_backends.AttentionMask) takes its place.

Shapes: B rows, S tokens of each row, U keys of a row, H query heads, G key/value heads, C head width, E experts.
"""

from typing import Protocol

from torch import Tensor

from trinity.models.attention_backends import AttentionMask


class RowParts(Protocol):
    """The tokens of one forward pass as parts of their rows; every rank that has a part of them makes the same calls.

    Attributes:
        positions_BS: [B or 1, S] int64, the tokens' positions in their rows.
    """

    positions_BS: Tensor

    def before_attention(
        self, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
        """Queries, keys and values that attend to each other on this rank, in place of these tokens'; differentiable.

        Args:
            window: of the layer; None on a global layer.
        Returns:
            q, k, v of any numbers of queries, keys and heads that `attend` takes, and the mask between them.
        """
        ...

    def after_attention(self, mixed: Tensor, window: int | None) -> Tensor:
        """These tokens' attention output [B, S, H, C] from that of the queries of `before_attention`."""
        ...

    def row_counts(self, counts_BE: Tensor) -> Tensor:
        """The sum over the whole rows of counts over these tokens, [B, E] int64; the same in recomputation."""
        ...
