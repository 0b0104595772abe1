"""Pairs of query and key per rank against counting them one by one in the attention mask."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trinity.config.model import ModelConfig
from trinity.models.attention_backends import AttentionMask
from trinity.training.attention_pairs import attention_pairs

S = 12
IDS_BS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [0] * 12])
CONFIG = ModelConfig(layers=5, window=4, global_every=2, heads=4, kv_heads=2)  # layers 1 and 3 are global


def rank(index: int, context: int) -> Any:
    """What attention_pairs needs of a rank of a context group."""
    columns = slice(index * S // context, (index + 1) * S // context)
    group = SimpleNamespace(size=context) if context > 1 else None
    return SimpleNamespace(context=group, sizes=SimpleNamespace(context=context), columns=lambda _: columns)


@pytest.mark.parametrize("ids_BS", [None, IDS_BS])
@pytest.mark.parametrize(("heads", "context"), [(4, 1), (4, 2), (4, 4), (3, 2)])
def test_pairs_of_each_rank(ids_BS: torch.Tensor | None, heads: int, context: int) -> None:
    """By heads a rank has its share of all queries of a row, otherwise all pairs of its own queries."""
    config = replace(CONFIG, heads=heads, kv_heads=heads)
    mask = AttentionMask(torch.arange(S).unsqueeze(0), ids_BS)
    local_BS, global_BS = (mask.dense(window).sum(dim=-1)[:, 0].expand(2, S) for window in (4, None))
    for index in range(context):
        own = slice(index * S // context, (index + 1) * S // context)
        by_heads = heads % context == 0
        of_global = global_BS.sum().item() / context if by_heads else global_BS[:, own].sum().item()
        expected = 3 * local_BS[:, own].sum().item() + 2 * of_global
        assert attention_pairs(config, torch.Size((2, S)), ids_BS, rank(index, context)) == expected
