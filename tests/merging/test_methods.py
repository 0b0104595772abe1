"""Every merge method with its float64 transcription, in one block and in many, and the random ones by their rules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.merging import transcriptions
from trinity.merging import sparse
from trinity.merging.inputs import combined, whole
from trinity.merging.methods import METHODS

SHAPES = [(1, 1), (1, 7), (9, 1), (6, 5), (23, 17)]
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
W3, D3 = [0.5, -0.3, 0.8], [0.5, 0.3, 0.8]
CASES = [
    ("linear", 3, {"weight": W3, "normalize": True}), ("linear", 3, {"weight": W3, "normalize": False}),
    ("linear", 1, {"weight": [2.0], "normalize": True}),
    ("slerp", 1, {"t": 0.3}), ("slerp", 1, {"t": 0.0}), ("slerp", 1, {"t": 1.0}),
    ("nuslerp", 2, {"weight": [0.5, 0.3], "nuslerp_flatten": True, "nuslerp_row_wise": False}),
    ("nuslerp", 2, {"weight": [0.5, 0.3], "nuslerp_flatten": False, "nuslerp_row_wise": False}),
    ("nuslerp", 2, {"weight": [0.5, 0.3], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, {"weight": [0.5, 0.3, 0.8], "normalize_weights": True, "eps": 1e-8}),
    ("multislerp", 3, {"weight": [0.5, 0.3, 0.8], "normalize_weights": False, "eps": 1e-8}),
    ("karcher", 3, {"max_iter": 10, "tol": 1e-9}),
    ("task_arithmetic", 3, {"weight": W3, "normalize": False, "lambda_": 0.7}),
    ("task_arithmetic", 3, {"weight": W3, "normalize": True, "lambda_": 0.7}),
    ("ties", 3, {"weight": W3, "density": D3, "normalize": True, "lambda_": 1.0}),
    ("ties", 3, {"weight": W3, "density": D3, "normalize": False, "lambda_": 0.7}),
    ("ties", 1, {"weight": [1.0], "density": [0.0], "normalize": True, "lambda_": 1.0}),
    ("breadcrumbs", 3, {"weight": W3, "density": D3, "gamma": [0.0, 0.1, 0.4], "normalize": False, "lambda_": 0.7}),
    ("breadcrumbs", 3, {"weight": W3, "density": D3, "gamma": [0.0, 0.1, 0.4], "normalize": True, "lambda_": 1.0}),
    ("breadcrumbs_ties", 3, {"weight": W3, "density": D3, "gamma": [0.0, 0.1, 0.4], "normalize": False,
                             "lambda_": 1.0}),
    ("sce", 3, {"select_topk": 1.0}), ("sce", 3, {"select_topk": 0.4}),
    ("model_stock", 3, {"filter_wise": False}), ("model_stock", 2, {"filter_wise": True}),
    ("nearswap", 1, {"t": 0.05}), ("nearswap", 1, {"t": 0.0}),
    ("arcee_fusion", 1, {}),
    ("ram", 3, {"epsilon": 0.05}), ("ramplus_tl", 3, {"epsilon": 0.05, "r": 0.5, "alpha": 0.9}),
    ("passthrough", 1, {"scale": [0.5]}),
]  # fmt: skip

ANGLES = ("nuslerp", "multislerp", "karcher", "model_stock", "slerp", "arcee_fusion")
# vectors of one number are collinear, or equally important: these formulas divide 0 by 0 there
WITH_SHAPES = [(*case, shape) for case in CASES for shape in SHAPES if not (case[0] in ANGLES and 1 in shape)]


def tensors(shape: tuple[int, int], models: int, spread: float = 0.1) -> tuple[list[Tensor], Tensor]:
    """Models near a base; a third of each difference is 0, as between checkpoints in bf16."""
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    base = torch.randn(shape, generator=generator)
    found = []
    for _ in range(models):
        delta = torch.randn(shape, generator=generator) * spread
        delta[torch.rand(shape, generator=generator) < 0.3] = 0
        found.append(base + delta)
    if shape == (1, 1):  # all differ, so that no method divides by the norm of nothing
        found = [base + 0.1 * (number + 1) for number in range(models)]
    return found, base


def close(result: Tensor, expected: Tensor) -> None:
    """fp32 arithmetic on numbers of size 1: a few roundings of 6e-8 each, and the sum of eight of them at most."""
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 20, 40], ids=["one block", "many blocks"])
@pytest.mark.parametrize(("name", "models", "parameters", "shape"), WITH_SHAPES, ids=str)
def test_float64(name: str, models: int, parameters: dict, shape: tuple[int, int], block: int) -> None:
    W, B = tensors(shape, models)
    method = METHODS[name]
    bases = {"no": [None], "yes": [B], "may": [None, B]}[method.base]
    for base in bases:
        inputs = whole(W, base, block=block)
        result = combined(inputs, method.merge(inputs, **parameters))
        formula = getattr(transcriptions, name)
        # differences are taken in fp32, because their order decides what is kept; the sums are exact
        deltas = [x - B for x in W]
        exact = W if base is None else [B.double() + d.double() for d in deltas]
        expected = formula([x.double() for x in exact], None if base is None else base.double(), **parameters)
        close(result, expected)


@pytest.mark.parametrize("name", ["interpolate", "mean"])
def test_smooth_counterparts(name: str) -> None:
    from trinity.merging import methods

    W, B = tensors((6, 5), 1 if name == "interpolate" else 3)
    arguments = {"t": 0.3} if name == "interpolate" else {}
    inputs = whole(W, B)
    result = combined(inputs, getattr(methods, name)(inputs, **arguments))
    close(result, getattr(transcriptions, name)([x.double() for x in W], B.double(), **arguments))


def test_every_method_is_tested() -> None:
    assert {name for name, _, _ in CASES} | RANDOM == METHODS.keys()
    assert all(callable(getattr(transcriptions, name)) for name in METHODS.keys() - RANDOM)


def test_slerp_of_nearly_collinear_tensors_is_linear() -> None:
    W, B = tensors((6, 5), 1, spread=0.01)
    inputs = whole(W, B)
    close(combined(inputs, METHODS["slerp"].merge(inputs, t=0.3)), 0.7 * B.double() + 0.3 * W[0].double())


def parameters_of(name: str, models: int, **changes: object) -> dict:
    common = {"weight": [0.6] * models, "density": [0.5] * models, "normalize": False, "lambda_": 1.0, "rescale": "l1"}
    return common | ({"epsilon": [0.2] * models} if "della" in name else {}) | changes


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_nothing_is_dropped_at_density_1(name: str) -> None:
    W, B = tensors((23, 17), 3)
    parameters = parameters_of(name, 3, density=[1.0] * 3)
    inputs = whole(W, B)
    result = combined(inputs, METHODS[name].merge(inputs, **parameters))
    consensus = name in ("dare_ties", "della")
    deltas = [(x - B).double() for x in W]
    close(result, transcriptions.add_up(B.double(), deltas, [0.6] * 3, False, 1.0, consensus))


def dropped(name: str, rescale: str, **changes: object) -> tuple[Tensor, Tensor]:
    """(δ, what a random method makes of it) for one model with weight 1 and no zero difference."""
    generator = torch.Generator().manual_seed(0)
    B = torch.zeros(300, 200)
    delta = torch.rand(B.shape, generator=generator) + 0.5
    inputs = whole([B + delta], B, seed="0/a name", block=5000)
    parameters = parameters_of(name, 1, weight=[1.0], rescale=rescale, **changes)
    return delta, combined(inputs, METHODS[name].merge(inputs, **parameters))


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_kept_entries_and_their_scale(name: str) -> None:
    """What is kept is δ times one number: that of the L1 norm, 1, or the inverse probability."""
    delta, plain = dropped(name, "none")
    mask = plain != 0
    assert torch.equal(plain[mask], delta[mask])
    # 60,000 draws of probability 1/2: five standard deviations are 0.01
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.01)
    _, rescaled = dropped(name, "l1")
    factor = delta.double().sum() / plain.double().sum()
    torch.testing.assert_close(rescaled, (plain * factor).float(), rtol=1e-6, atol=0)
    assert rescaled.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)
    _, expected = dropped(name, "density")
    if "dare" in name:
        assert torch.equal(expected, plain * 2)
    assert torch.equal(expected != 0, mask)
    assert expected.mean().item() == pytest.approx(delta.mean().item(), rel=0.02)


def test_della_keeps_by_the_rank_in_the_row() -> None:
    """density 0.5, ε 0.2: the smallest of a row with probability 0.3, the largest with 0.7, the others between."""
    delta, plain = dropped("della_linear", "none")
    ranks = delta.argsort(1).argsort(1) / 199
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (ranks >= low) & (ranks <= low + 0.25)
        # 15,000 draws: five standard deviations are 0.02
        assert (plain != 0)[inside].float().mean().item() == pytest.approx(0.3 + 0.4 * (low + 0.125), abs=0.02)


def test_the_seed_is_the_name_and_the_model() -> None:
    B = torch.zeros(4, 50)
    W = [torch.ones(4, 50)] * 2

    def masks(seed: str) -> list[Tensor]:
        inputs = whole(W, B, seed=seed)
        keep = sparse._rescaled(inputs, sparse._bernoulli([0.5, 0.5]), "none")
        return [keep(block, model, block.delta(model)) for block in inputs for model in range(2)]

    first, again, other = masks("0/x"), masks("0/x"), masks("0/y")
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_models_equal_to_the_base_give_the_base() -> None:
    """No difference, norm or variance is divided by."""
    B = torch.randn(6, 5)
    for name, method in METHODS.items():
        if method.base == "no" or name in ("nearswap",):
            continue
        models = method.models[1] or 3
        parameters = {each: [0.5] * models for each in method.per_model}
        parameters |= {key: value for key, value in method.whole.items() if key not in ("t", "lambda")}
        parameters |= {"t": 0.5} if "t" in method.whole else {}
        parameters |= {"lambda_": 1.0} if "lambda" in method.whole else {}
        inputs = whole([B] * models, B)
        torch.testing.assert_close(combined(inputs, method.merge(inputs, **parameters)), B, msg=name)


def test_arcee_fusion_where_fp32_cancels() -> None:
    """Close rows: the divergence is 1e-9, below what log-softmax in fp32 resolves, and yet the right entries change."""
    generator = torch.Generator().manual_seed(5)
    B = torch.randn(40, 64, generator=generator)
    W = B + torch.randn(40, 64, generator=generator) * 3e-5
    inputs: Callable = whole([W], B)
    result = combined(inputs, METHODS["arcee_fusion"].merge(inputs))
    assert torch.equal(result.double(), transcriptions.arcee_fusion([W.double()], B.double()))
