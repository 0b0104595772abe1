"""Decoding by few calls of torch equals the model's own forward pass, and runs where the model is plain.

Shapes: B rows, S tokens of a prompt, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig
from trinity.models import Trinity
from trinity.models.decode import Decoder
from trinity.models.kv_cache import KVCache

S, NEW = 7, 15
BOUND = 1e-5
"""fp32: 2⁻²⁴ in sums of some dozen terms, in another order, five layers deep, on logits of about 1."""


def make(config: ModelConfig, **kernels: str) -> Trinity:
    model = Trinity(config, KernelsConfig(**kernels))
    model.init_weights(seed=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "expert_bias")):
                tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.1)
    return model


def rows_of(rows: int) -> Tensor:
    return torch.randint(50, (rows, S + NEW), generator=torch.Generator().manual_seed(rows))


def decoded(model: Trinity, tokens_BS: Tensor, padding: list[int]) -> tuple[Tensor, Decoder]:
    """Logits [B, NEW, V] after each of the last tokens, which are given one by one."""
    cache = KVCache(model.config, padding)
    with torch.inference_mode():
        model(tokens_BS[:, :S], cache=cache)
    decoder = Decoder(model, cache)
    return torch.stack([decoder(tokens_B) for tokens_B in tokens_BS[:, S:].unbind(1)], dim=1), decoder


def whole_pass(model: Trinity, tokens_BS: Tensor, padding: list[int]) -> Tensor:
    """The same logits from one pass over each row without a cache."""
    with torch.no_grad():
        return torch.cat([model(row[None, pad:])[:, -NEW:] for row, pad in zip(tokens_BS, padding)])


@pytest.mark.parametrize("padding", [[0], [0, 3], [0] * 40], ids=["one row", "padded", "more rows than few"])
def test_equals_the_whole_pass(tiny: ModelConfig, padding: list[int]) -> None:
    """Past the window of 5; 40 rows of 2 experts are more than forward_few_rows takes."""
    model, tokens_BS = make(tiny), rows_of(len(padding))
    got, decoder = decoded(model, tokens_BS, padding)
    assert decoder.is_short
    assert (got - whole_pass(model, tokens_BS, padding)).abs().max() < BOUND


def test_every_shape_of_layer(tiny: ModelConfig) -> None:
    """All layers dense, all global or all local; one key head for all; every expert active."""
    for changes in (
        {"dense_layers": 5},
        {"global_every": 1, "dense_layers": 0},
        {"global_every": 9, "kv_heads": 1},
        {"kv_heads": 4, "active_experts": 6, "route_scale": 1.0},
    ):
        model, tokens_BS = make(replace(tiny, **changes)), rows_of(2)
        got, decoder = decoded(model, tokens_BS, [0, 2])
        assert decoder.is_short
        assert (got - whole_pass(model, tokens_BS, [0, 2])).abs().max() < BOUND, changes


def test_other_models_run_themselves(tiny: ModelConfig) -> None:
    """In float64, with a hook, with a replaced forward, with another dispatcher or engine of the experts."""
    hooked, replaced, dispatched = make(tiny), make(tiny), make(tiny)
    seen = []
    hooked.blocks[2].register_forward_hook(lambda *_: seen.append(1))
    replaced.blocks[1].forward = replaced.blocks[1].forward
    moe = dispatched.blocks[1].ffn
    dispatcher = moe.dispatcher
    moe.dispatcher = lambda *arguments, **named: dispatcher(*arguments, **named)
    engine = make(replace(tiny, expert_width=12), experts="grouped_mm")  # rows of 16·n bytes
    for model in (make(tiny).double(), hooked, replaced, dispatched, engine):
        got, decoder = decoded(model, rows_of(2), [0, 3])
        assert not decoder.is_short
        assert (got - whole_pass(model, rows_of(2), [0, 3])).abs().max() < BOUND
    assert len(seen) == 1 + NEW + 2


def test_rows_can_leave(tiny: ModelConfig) -> None:
    model, tokens_BS = make(tiny), rows_of(3)
    cache = KVCache(tiny, [0, 0, 0])
    with torch.inference_mode():
        model(tokens_BS[:, :S], cache=cache)
    decoder = Decoder(model, cache)
    decoder(tokens_BS[:, S])
    cache.keep([2, 0], tokens_BS.device)
    got = decoder(tokens_BS[[2, 0], S + 1])
    with torch.no_grad():
        expected = model(tokens_BS[[2, 0], : S + 2])[:, -1]
    assert (got - expected).abs().max() < BOUND
