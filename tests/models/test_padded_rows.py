"""A packed row of examples and padding equals its examples alone, in float64.

Sums of some hundred products through five layers: 1e-11, as for packed documents; counts exactly.

Shapes: B rows, S tokens of a row, M MoE layers, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.models import Losses, Trinity, next_tokens
from trinity_kernels.cross_entropy import IGNORE

S, Z = 24, 0.01
LENGTHS = [[7, 4, 9], [12, 5]]  # of the examples of each row; 4 and 7 tokens of padding follow
PADDING = sum(S - sum(row) for row in LENGTHS)
BOUND = 1e-11


class Rows(NamedTuple):
    """Packed rows: the arguments of the model's forward."""

    tokens_BS: Tensor
    document_ids_BS: Tensor
    targets_BS: Tensor
    weights_BS: Tensor


@pytest.fixture
def model(tiny: ModelConfig) -> Trinity:
    """In float64, with expert biases that change choices."""
    model = Trinity(tiny).double()
    model.init_weights(seed=0)
    random = torch.Generator().manual_seed(0)
    for name, tensor in model.named_buffers():
        if name.endswith("expert_bias"):
            tensor.normal_(std=0.1, generator=random)
    return model


def packed_rows(padding_token: int = 0) -> Rows:
    """A third of the tokens trained, and each example's weights sum to 1."""
    random = torch.Generator().manual_seed(0)
    ids_BS = torch.stack([
        torch.repeat_interleave(torch.tensor([*range(len(row)), -1]), torch.tensor([*row, S - sum(row)]))
        for row in LENGTHS
    ])  # fmt: skip
    tokens_BS = torch.randint(50, (len(LENGTHS), S), generator=random)
    tokens_BS[ids_BS < 0] = padding_token
    targets_BS = next_tokens(tokens_BS, ids_BS)
    targets_BS[torch.rand(targets_BS.shape, generator=random) > 0.4] = IGNORE
    weights_BS = torch.zeros(targets_BS.shape, dtype=torch.float64)
    for b, row in enumerate(LENGTHS):
        for document in range(len(row)):
            trained_S = (ids_BS[b] == document) & (targets_BS[b] != IGNORE)
            assert trained_S.any()
            weights_BS[b, trained_S] = 1 / trained_S.sum()
    return Rows(tokens_BS, ids_BS, targets_BS, weights_BS)


def forward(model: Trinity, rows: Rows, weighted: bool = True, **options: object) -> tuple[Losses, list[Tensor]]:
    """The losses, and the gradient of every parameter."""
    losses = model(
        rows.tokens_BS, None, rows.document_ids_BS, rows.targets_BS, Z,
        weights_BS=rows.weights_BS if weighted else None, **options,
    )  # fmt: skip
    total = losses.token_loss
    if losses.sequence_loss_B is not None:
        total = total + 0.1 * losses.sequence_loss_B.sum()
    return losses, list(torch.autograd.grad(total, list(model.parameters())))


def far(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, over the largest value."""
    largest = max(tensor.abs().max() for tensor in other)
    return max(((a - b).abs().max() / largest).item() for a, b in zip(one, other, strict=True))


def examples_alone(model: Trinity, rows: Rows, weighted: bool) -> tuple[float, Tensor, list[Tensor]]:
    """Loss, counts and gradients, each example a batch of its own: no other example, no padding, no document ids."""
    total, counts_ME, gradients = 0.0, torch.zeros((), dtype=torch.int64), None
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            example = Rows(*(tensor[b : b + 1, part] for tensor in rows))._replace(document_ids_BS=None)
            losses, parts = forward(model, example, weighted, with_sequence_loss=False)
            total, counts_ME = total + losses.token_loss.item(), counts_ME + losses.counts_ME
            gradients = parts if gradients is None else [a + b for a, b in zip(gradients, parts)]
            start += length
    return total, counts_ME, gradients


def assert_equals_its_examples(model: Trinity, rows: Rows, weighted: bool, packed: Rows | None = None) -> None:
    """Loss, counts and gradients of the packed rows against those of the examples one by one."""
    packed = rows if packed is None else packed
    losses, gradients = forward(model, packed, weighted, with_sequence_loss=False)
    total, counts_ME, expected = examples_alone(model, rows, weighted)
    assert torch.equal(losses.counts_ME, counts_ME), "counts"
    assert losses.token_loss.item() == pytest.approx(total, rel=BOUND), "loss"
    assert far(gradients, expected) < BOUND, "gradients"


def without_padding(rows: Rows, b: int) -> Rows:
    """One row, cut before its padding."""
    return Rows(*(tensor[b : b + 1, : sum(LENGTHS[b])] for tensor in rows))


def assert_padding_enters_nothing(model: Trinity, rows: Rows) -> None:
    """Statistics and gradients, those of the sequence loss among them, against each row cut before its padding."""
    losses, gradients = forward(model, rows)
    cut = [forward(model, without_padding(rows, b)) for b in range(len(LENGTHS))]
    assert torch.equal(losses.counts_ME, sum(part.counts_ME for part, _ in cut)), "counts"
    sequence_losses = torch.cat([part.sequence_loss_B for part, _ in cut])
    assert torch.allclose(losses.sequence_loss_B, sequence_losses, rtol=0, atol=BOUND), "sequence loss"
    assert torch.allclose(losses.entropy_M, sum(part.entropy_M for part, _ in cut), rtol=BOUND, atol=0), "entropy"
    assert far(gradients, [a + b for a, b in zip(*(parts for _, parts in cut))]) < BOUND, "gradients"


@pytest.mark.parametrize("weighted", [False, True])
def test_packed_examples_are_examples_alone(model: Trinity, weighted: bool) -> None:
    assert_equals_its_examples(model, packed_rows(), weighted)


def test_padding_enters_no_statistic(model: Trinity) -> None:
    rows = packed_rows()
    assert_padding_enters_nothing(model, rows)
    counts_ME = forward(model, rows)[0].counts_ME
    assert counts_ME.sum(dim=1).tolist() == [2 * (2 * S - PADDING)] * 4


def without_mask(rows: Rows) -> Rows:
    return rows._replace(
        targets_BS=next_tokens(rows.tokens_BS, rows.document_ids_BS), weights_BS=torch.ones_like(rows.weights_BS)
    )


def across_examples(rows: Rows) -> Rows:
    """The first token of an example as the target of the last of the one before."""
    targets_BS, weights_BS, last = rows.targets_BS.clone(), rows.weights_BS.clone(), LENGTHS[0][0] - 1
    targets_BS[0, last], weights_BS[0, last] = rows.tokens_BS[0, last + 1], 0.1
    return rows._replace(targets_BS=targets_BS, weights_BS=weights_BS)


MISTAKES: dict[str, Callable[[Rows], Rows]] = {
    "the mask is lost": without_mask,
    "weights are lost": lambda rows: rows._replace(weights_BS=torch.ones_like(rows.weights_BS)),
    "examples see each other": lambda rows: rows._replace(document_ids_BS=rows.document_ids_BS.clamp_max(0)),
    "a target across examples": across_examples,
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_caught(model: Trinity, wrong: str) -> None:
    rows = packed_rows()
    with pytest.raises(AssertionError, match=r"counts|loss|gradients"):
        assert_equals_its_examples(model, rows, True, MISTAKES[wrong](rows))


def test_routed_padding_is_caught(model: Trinity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinity.models.trinity._padding", lambda *_: None)
    with pytest.raises(AssertionError, match="counts"):
        assert_equals_its_examples(model, packed_rows(), True)
    with pytest.raises(AssertionError, match="counts"):
        assert_padding_enters_nothing(model, packed_rows())


def test_the_content_of_padding_changes_nothing(model: Trinity) -> None:
    """Losses and gradients bit for bit, with another token as padding; the number of padding tokens may be given."""
    expected, gradients = forward(model, packed_rows(0))
    for padding in (None, PADDING):
        losses, others = forward(model, packed_rows(17), padding=padding)
        for name in ("token_loss", "ce_BS", "lse_BS", "sequence_loss_B", "counts_ME", "entropy_M"):
            assert torch.equal(getattr(losses, name), getattr(expected, name)), name
        assert all(torch.equal(a, b) for a, b in zip(gradients, others))


def test_without_padding_nothing_changes(model: Trinity) -> None:
    """Document ids without padding: bit for bit, whether the model counts the padding or is given 0."""
    rows = without_padding(packed_rows(), 0)
    results = [forward(model, rows, padding=padding) for padding in (None, 0)]
    (one, gradients), (other, others) = results
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, other))
    assert all(torch.equal(a, b) for a, b in zip(gradients, others))


def test_rows_of_padding_alone(model: Trinity) -> None:
    """A batch without any example: all losses and gradients are 0, and none is NaN."""
    rows = packed_rows()
    rows = rows._replace(
        document_ids_BS=torch.full_like(rows.document_ids_BS, -1), targets_BS=torch.full_like(rows.targets_BS, IGNORE)
    )
    for trained in (None, 0):
        losses, gradients = forward(model, rows, trained=trained)
        assert (losses.token_loss.item(), losses.counts_ME.sum().item(), losses.entropy_M.sum().item()) == (0, 0, 0)
        assert losses.sequence_loss_B.tolist() == [0.0, 0.0]
        if trained == 0:
            assert losses.top_logit == -torch.inf
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("weighted", [False, True])
def test_head_for_trained_tokens_alone(model: Trinity, weighted: bool) -> None:
    """The same losses and gradients as for all tokens; the rows of matrix products differ, so not bit for bit."""
    rows = packed_rows()
    trained_BS = rows.targets_BS != IGNORE
    expected, gradients = forward(model, rows, weighted)
    losses, others = forward(model, rows, weighted, trained=int(trained_BS.sum()))
    assert losses.token_loss.item() == pytest.approx(expected.token_loss.item(), rel=1e-13)
    for name in ("ce_BS", "lse_BS"):
        assert torch.allclose(getattr(losses, name), getattr(expected, name), rtol=0, atol=1e-13)
    assert torch.allclose(losses.top_BS[trained_BS], expected.top_BS[trained_BS], rtol=0, atol=1e-13)
    assert losses.top_BS[~trained_BS].eq(-torch.inf).all()
    assert losses.top_logit == losses.top_BS.max()
    assert far(others, gradients) < 1e-13


def test_the_host_does_not_wait_for_the_device(model: Trinity) -> None:
    """On meta tensors, which cannot return a value to the host: with the counts given, nothing is counted."""
    rows = Rows(*(tensor.to("meta") for tensor in packed_rows()))
    losses, gradients = forward(model.to("meta"), rows, padding=PADDING, documents=7, trained=9)
    assert losses.ce_BS.shape == (2, S)
    assert all(gradient.is_meta for gradient in gradients)
