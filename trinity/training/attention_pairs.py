"""How evenly attention's work is spread over the ranks: pairs of a query and a key that it attends to.

A row that is one long document has many more pairs than a row of short ones, and ranks wait for each other in every
layer. `attention_spread` in metrics.jsonl is the largest number of pairs of a rank over the mean of all ranks: 1 where
the work is even. Between the ranks of one context group it is even for heads, and all but even for halos; between
groups it depends on the rows, which no rank chooses.

Shapes: B rows of S tokens.
"""

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.parallel.context_parallel import heads_fit
from trinity.parallel.mesh import Ranks


def attention_pairs(model: ModelConfig, shape: torch.Size, document_ids_BS: Tensor | None, ranks: Ranks) -> float:
    """Pairs of query and key per query head that this rank's attention computes in one forward pass, over all layers.

    A rank that has 1/N of the heads of a layer has 1/N of its pairs.

    Args:
        shape: [B, S] of this rank's rows, whole.
        document_ids_BS: of whole rows, on the CPU; None: a row is one document.
    """
    keys_BS = visible_keys(shape, document_ids_BS)
    own_BS = keys_BS[:, ranks.columns(shape[1])]
    global_layers = sum(model.is_global(layer) for layer in range(model.layers))
    by_heads = ranks.context is None or heads_fit(model.heads, model.kv_heads, ranks.context.size)
    global_pairs = int(keys_BS.sum()) / ranks.sizes.context if by_heads else int(own_BS.sum())
    local_pairs = int(own_BS.clamp(max=model.window).sum())
    return global_layers * global_pairs + (model.layers - global_layers) * local_pairs


def visible_keys(shape: torch.Size, document_ids_BS: Tensor | None) -> Tensor:
    """[B or 1, S] int64: how many tokens each token attends to on a global layer, itself included."""
    places_1S = torch.arange(shape[1]).unsqueeze(0)
    if document_ids_BS is None:
        return (places_1S + 1).expand(shape)
    starts_BS = torch.zeros(shape, dtype=torch.int64)
    begins_BS = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts_BS[:, 1:] = places_1S[:, 1:].where(begins_BS, 0)
    return places_1S + 1 - starts_BS.cummax(dim=1).values
