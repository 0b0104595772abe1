"""Logits with a key-value cache equal those of one pass over the whole text, however it is divided into passes.

Shapes: B rows, S tokens of the longest row.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig
from trinity.models import Trinity
from trinity.models.kv_cache import KVCache

S = 23
# float64: 2⁻⁵³ in sums of some hundred terms. fp32: 2⁻²⁴ there, five layers deep, on logits of about 1
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
CHUNKS = [
    [S],
    [1] * S,
    [5, 1, 1, 1, 6, 7, 1, 1],  # a chunk as long as the window, single tokens, chunks that begin inside a window
    [5, 5, 1, 12],  # edges of chunks on edges of the window; a chunk longer than the ring
    [2, 6, 15],
    [16, 3, 4],
]
PADDING = [[0, 0], [0, 3], [9, 4]]


@pytest.fixture(params=BOUNDS, ids=["float64", "float32"])
def model(request: pytest.FixtureRequest, tiny: ModelConfig) -> Trinity:
    """Window 5, the fourth of five layers global."""
    return make(tiny, request.param)


def make(config: ModelConfig, dtype: torch.dtype, engine: str = "auto") -> Trinity:
    model = Trinity(config, KernelsConfig(attention=engine)).to(dtype)
    model.init_weights(seed=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "expert_bias")):
                tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.1)
    return model


def rows_of(padding: Sequence[int]) -> Tensor:
    """[B, S] random tokens, in the padding too: no token may see them."""
    return torch.randint(50, (len(padding), S), generator=torch.Generator().manual_seed(sum(padding)))


def cached_logits(model: Trinity, tokens_BS: Tensor, padding: Sequence[int], chunks: Sequence[int]) -> Tensor:
    cache = KVCache(model.config, padding)
    return torch.cat([model(part_BS, cache=cache) for part_BS in tokens_BS.split(list(chunks), dim=1)], dim=1)


def difference(model: Trinity, logits_BSV: Tensor, tokens_BS: Tensor, padding: Sequence[int]) -> float:
    """Largest difference of any row's logits from those of the row alone, without padding and without a cache."""
    rows = [
        (logits_SV[pad:] - model(tokens_S[None, pad:])[0]).abs().max()
        for logits_SV, tokens_S, pad in zip(logits_BSV, tokens_BS, padding)
    ]
    return max(rows).item()


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("padding", PADDING, ids=str)
def test_cached_equals_uncached(model: Trinity, padding: list[int], chunks: list[int]) -> None:
    tokens_BS = rows_of(padding)
    got = cached_logits(model, tokens_BS, padding, chunks)
    assert difference(model, got, tokens_BS, padding) < BOUNDS[got.dtype]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, S - 1, S, 100])
@pytest.mark.parametrize("chunks", [[9, 1, 1, 12], [1, 22]], ids=str)
def test_every_window(tiny: ModelConfig, window: int, chunks: list[int]) -> None:
    """A window of the token alone, and one longer than the text, whose ring never fills."""
    model, padding = make(replace(tiny, window=window), torch.float64), [0, 4]
    tokens_BS = rows_of(padding)
    got = cached_logits(model, tokens_BS, padding, chunks)
    assert difference(model, got, tokens_BS, padding) < BOUNDS[torch.float64]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")  # flex warns that it is not compiled here
@pytest.mark.parametrize("engine", ["sdpa", "blocks", "flex"])
def test_every_engine(tiny: ModelConfig, engine: str) -> None:
    """The engines that run on a CPU, for chunks; in fp32."""
    model, padding = make(tiny, torch.float32, engine), [0, 3]
    tokens_BS = rows_of(padding)
    got = cached_logits(model, tokens_BS, padding, [8, 10, 1, 4])
    assert difference(model, got, tokens_BS, padding) < BOUNDS[torch.float32]


@torch.inference_mode()
def test_inference_mode(tiny: ModelConfig) -> None:
    """As generation runs."""
    model, padding = make(tiny, torch.float32), [0, 3]
    tokens_BS = rows_of(padding)
    got = cached_logits(model, tokens_BS, padding, [8, *[1] * 15])
    with torch.inference_mode(False), torch.no_grad():
        assert difference(model, got, tokens_BS, padding) < BOUNDS[torch.float32]


@torch.no_grad()
def test_last_logits_alone(model: Trinity) -> None:
    tokens_BS = rows_of([0, 3])
    whole = cached_logits(model, tokens_BS, [0, 3], [10, 13])
    cache = KVCache(model.config, [0, 3])
    model(tokens_BS[:, :10], cache=cache, logits_to_keep=1)
    assert (model(tokens_BS[:, 10:], cache=cache, logits_to_keep=4) - whole[:, -4:]).abs().max() < BOUNDS[whole.dtype]


@torch.no_grad()
def test_rows_can_leave(model: Trinity) -> None:
    """Rows 2 and 0 of three go on, in that order, from inside the window and from beyond it."""
    padding = [6, 0, 2]
    tokens_BS = rows_of(padding)
    for first in (7, 14):
        cache, keep = KVCache(model.config, padding), [2, 0]
        model(tokens_BS[:, :first], cache=cache)
        cache.keep(keep, tokens_BS.device)
        got = torch.cat([model(part_B1, cache=cache) for part_B1 in tokens_BS[keep, first:].split(1, dim=1)], dim=1)
        for row, logits_SV in zip(keep, got):
            expected = model(tokens_BS[row : row + 1, padding[row] :])[0, first - padding[row] :]
            assert (logits_SV - expected).abs().max() < BOUNDS[got.dtype]


@torch.no_grad()
def test_memory(tiny: ModelConfig) -> None:
    """Local layers hold `window` tokens, global ones all, and no more where the length is known."""
    model, heads = make(tiny, torch.float64), 2 * tiny.kv_heads * tiny.head_dim * 8  # bytes of a token and layer
    cache = KVCache(tiny, [0, 0], capacity=S)
    for part_BS in rows_of([0, 0]).split([10, 1, 12], dim=1):
        model(part_BS, cache=cache)
    assert cache.bytes == 2 * heads * (4 * tiny.window + 1 * S)
    assert cache.length == S
    short = KVCache(tiny, [0], capacity=3)
    model(rows_of([0])[:, :2], cache=short)
    assert short.bytes == heads * 5 * 3


@torch.no_grad()
def test_uncached_forward_is_unchanged(model: Trinity) -> None:
    """The rows of a batch that has a cache leave no trace in the model."""
    tokens_BS = rows_of([0, 0])
    before = model(tokens_BS)
    model(tokens_BS, cache=KVCache(model.config, [0, 0]))
    assert torch.equal(model(tokens_BS), before)
