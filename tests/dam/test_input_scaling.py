"""Input scaling of frozen layers equals the merge that is written out: forward, and gradients of the coefficients.

In float64. BOUND is relative to the largest value: sums of a hundred products round by 1e-15, and a gradient passes
five layers.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.dam.materialized import materialized, random_coefficients
from tests.interop.small_model import CONFIG
from tests.merging.conftest import tensors_of
from trinity.dam.experts import MergedExperts, rows_at
from trinity.dam.layers import NORMS, MergedEmbedding, MergedHead, MergedLinear, Mixing, Mode
from trinity.dam.load import load_models, set_coefficients
from trinity.dam.model import PARTS, MergedTrinity, coefficients_of, hidden_states
from trinity.dam.names import places
from trinity.interop import load_hf
from trinity.merging.sources import FolderSource
from trinity.models import Trinity
from trinity.models.layers import Embedding, Head, Linear, QKNorm, RMSNorm
from trinity.models.moe import Experts

BOUND = 1e-12
MODELS = 3


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


def fill(module: nn.Module, seed: int = 3) -> None:
    """Random values in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def mixing(by_column: bool) -> Mixing:
    return Mixing(MODELS, 0, by_column, Mode())


def compare(layer: nn.Module, merged: nn.Module, weights: dict[str, Tensor], inputs: tuple) -> None:
    """Outputs of the layer with merged weights and of the merged layer, and their gradients in coefficients and x."""
    coefficients = [parameter for name, parameter in merged.named_parameters() if name.endswith("coefficients")]
    x = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
    expected = functional_call(layer, weights, inputs)
    found = merged(*inputs)
    assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad((expected * direction).sum(), [*coefficients, *x])
    for one, other in zip(torch.autograd.grad((found * direction).sum(), [*coefficients, *x]), wanted):
        assert_close(one, other)


@pytest.mark.parametrize("by_column", [True, False])
def test_linear(by_column: bool) -> None:
    """Two stacked matrices, each with coefficients of its own."""
    layer = Linear(7, (5, 4)).double()
    merged = MergedLinear(layer, mixing(by_column), "ffn").double()
    fill(merged)
    rows = [
        sum(getattr(merged, f"weight_{i}")[part] * merged.coefficients[p, i] for i in range(MODELS))
        for p, part in enumerate((slice(0, 5), slice(5, 9)))
    ]
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    compare(layer, merged, {"weight": torch.cat(rows)}, (x,))


@pytest.mark.parametrize("by_column", [True, False])
def test_embedding_head_and_gains(by_column: bool) -> None:
    x = torch.randn(2, 3, CONFIG.width, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[1, 5, 5], [7, 0, 299]])
    norm = RMSNorm(CONFIG.width, 1e-4, kernel="reference")
    cases = [
        (Embedding(CONFIG), MergedEmbedding, "weight", (tokens,)),
        (Head(CONFIG), MergedHead, "weight", (x,)),
        (norm, NORMS[RMSNorm], "gain", (x,)),
        (QKNorm(CONFIG.width, 1e-4, kernel="reference"), NORMS[QKNorm], "gain", (x.unsqueeze(2), None)),
    ]
    for layer, kind, name, inputs in cases:
        merged = kind(layer.double(), mixing(by_column), "gains").double()
        fill(merged)
        weight = sum(getattr(merged, f"weight_{i}") * merged.coefficients[0, i] for i in range(MODELS))
        compare(layer, merged, {name: weight}, inputs)


@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_experts(tokens: int, by_column: bool) -> None:
    """Grouped products; choices of −1 are on other ranks, and an expert may have no token."""
    layer = Experts(CONFIG).double()
    merged = MergedExperts(layer, mixing(by_column), "experts").double()
    fill(merged)

    def weight(name: str) -> Tensor:
        coefficients = getattr(merged, f"{name}_coefficients")
        return sum(getattr(merged, f"{name}_{i}") * coefficients[:, i].unsqueeze(1) for i in range(MODELS))

    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(CONFIG.experts - 1, generator=generator)[:2] for _ in range(40)])[:tokens]
    indices[::3, 0] = -1
    gates = torch.rand(tokens, 2, dtype=torch.float64, generator=generator).requires_grad_()
    x = torch.randn(tokens, CONFIG.width, dtype=torch.float64, generator=generator).requires_grad_()
    plus = torch.randn(tokens, CONFIG.width, dtype=torch.float64, generator=generator)
    weights = {"gate_up": torch.stack([weight("gate"), weight("up")], dim=1), "down": weight("down")}
    if tokens:
        compare(layer, merged, weights, (x, indices, gates, int((indices >= 0).sum()), plus))
    else:
        empty = merged(x, indices, gates, 0, plus)
        assert empty.shape == (0, CONFIG.width)
        empty.sum().backward()  # every rank has a gradient of every coefficient
        assert all(each.grad is not None for name, each in merged.named_parameters() if "coefficients" in name)


def merged_model(folders: list[Path], by_column: bool) -> MergedTrinity:
    """An unsharded merged model in float64 on this process."""
    with torch.device("meta"):
        model = MergedTrinity(CONFIG, len(folders), 0, by_column, PARTS).double()
    model.to_empty(device="cpu")
    model.freeze()
    load_models(model, [FolderSource(str(folder), folder) for folder in folders])
    return model


TOKENS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by_column", [True, False])
def test_whole_model(originals: Path, by_column: bool) -> None:
    """Logits, and the gradient of every coefficient; expert biases are the mean."""
    folders = [originals / name for name in ("base", "a", "b")]
    shapes = {name: tensor.shape for name, tensor in tensors_of(folders[0]).items()}
    coefficients = random_coefficients(MODELS, shapes, by_column)
    with torch.device("meta"):
        plain = Trinity(CONFIG).double()
    expected = functional_call(plain, materialized(folders, coefficients, CONFIG), (TOKENS,))
    model = merged_model(folders, by_column)
    set_coefficients(model, {name: value.detach() for name, value in coefficients.items()})
    found = model(TOKENS)
    assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    parameters = coefficients_of(model)
    largest = max(float(value.grad.abs().max()) for value in coefficients.values())
    for place in places(CONFIG):
        gradient = parameters[f"{place.module}.{place.coefficients}"].grad[place.row]
        wanted = coefficients[place.name].grad
        assert (gradient - wanted).abs().max() <= BOUND * largest, place.name
    assert len(list(places(CONFIG))) == len(coefficients)


def test_a_source_computes_as_its_own_model(originals: Path) -> None:
    """The teacher's logits are those of the folder's model in float64."""
    folders = [originals / "a", originals / "b"]
    model = merged_model(folders, True)
    for number, folder in enumerate(folders):
        with torch.no_grad():
            expected = load_hf(folder).double()(TOKENS)
            found = model.head.teacher_logits(hidden_states(model, number, TOKENS), number)
        assert_close(found, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_of_rows_has_one_order(threads: int) -> None:
    """Bit-equal to a sum in order; the gradient of indexing is not, as its threads add atomically."""
    generator = torch.Generator().manual_seed(0)
    index_R = torch.randint(64, (8192,), generator=generator)
    rows_ED, grad_RD = (torch.randn(size, 96, generator=generator) for size in (64, 8192))
    expected_ED = torch.zeros_like(rows_ED)
    for row, grad_D in zip(index_R.tolist(), grad_RD):
        expected_ED[row] += grad_D
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            leaf_ED = rows_ED.clone().requires_grad_()
            found_RD = rows_at(index_R, leaf_ED)
            found_RD.backward(grad_RD)
            assert torch.equal(found_RD, rows_ED[index_R])
            assert torch.equal(leaf_ED.grad, expected_ED)
    finally:
        torch.set_num_threads(before)
