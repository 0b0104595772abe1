"""Attention engines: the mask, agreement with each other, and refusals.

The reference is sdpa on one document at a time; tests/models/test_attention.py compares that with loops. With fewer
queries than keys, it is the same part of the result for all queries.

Shapes: B batch, S sequence.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.errors import UserError
from trinity.models import attention_backends, attention_blocks
from trinity.models.attention_backends import ENGINE_NAMES, AttentionMask, Keys, attend, pick_engine, queries_before

LENGTHS = [37, 1, 90]
S = sum(LENGTHS)
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).unsqueeze(0)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_mask(window: int | None, packed: bool) -> None:
    """Against the mask's definition, token by token; positions of the second row have gaps."""
    positions_BS = torch.tensor([range(9), [3, 4, 5, 9, 10, 11, 12, 30, 31]])
    ids_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 7], [2] * 9]) if packed else None
    mask = AttentionMask(positions_BS, ids_BS).dense(window)
    assert mask.shape == (2, 1, 9, 9)
    for b in range(2):
        for i in range(9):
            for j in range(9):
                back = (positions_BS[b, i] - positions_BS[b, j]).item()
                sees = back >= 0 and (window is None or back < window)
                sees = sees and (ids_BS is None or bool(ids_BS[b, i] == ids_BS[b, j]))
                assert mask[b, 0, i, j].item() == sees


@pytest.mark.parametrize(("window", "allowed"), [(None, [1, 2, 3, 4, 5]), (3, [1, 2, 3, 3, 3]), (1, [1] * 5)])
def test_the_window_counts_the_token_itself(window: int | None, allowed: list[int]) -> None:
    assert AttentionMask(torch.arange(5).unsqueeze(0), None).dense(window).sum(dim=-1).flatten().tolist() == allowed


IDS_BS = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [5, 0, 0, 9]])


@pytest.mark.parametrize("documents", [None, 6, 7, 32, 33])
def test_cu_seqlens(documents: int | None) -> None:
    """Boundaries in the flattened batch: every row starts a document, even with the id of the previous row.

    With a bound on the number of documents, documents without tokens follow.
    """
    ends, longest = AttentionMask(torch.arange(4).unsqueeze(0), IDS_BS, documents=documents).cu_seqlens(3)
    bound = {None: 6, 33: 64}.get(documents, 32)
    assert (ends.tolist(), ends.dtype, longest) == ([0, 2, 4, 8, 9, 11, *[12] * (bound - 5)], torch.int32, 4)


@pytest.mark.parametrize("documents", [None, 6])
def test_cu_seqlens_do_not_wait_for_the_device(documents: int | None) -> None:
    """Their size follows from numbers that the host has: meta tensors have no values. Only counting does wait."""
    positions_BS = torch.arange(4, device="meta").unsqueeze(0)
    if documents is None:
        ends, _ = AttentionMask(torch.arange(4).unsqueeze(0), None).cu_seqlens(3)
        assert (ends.tolist(), ends.dtype) == ([0, 4, 8, 12], torch.int32)
        assert AttentionMask(positions_BS, None).cu_seqlens(3)[0].shape == (4,)
    else:
        mask = AttentionMask(positions_BS, IDS_BS.to("meta"), documents=documents)
        assert mask.cu_seqlens(3)[0].shape == (33,)
        with pytest.raises(NotImplementedError):
            AttentionMask(positions_BS, IDS_BS.to("meta")).cu_seqlens(3)


def test_masks_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per kind of layer and forward pass, not one per layer."""
    windows = []
    original = AttentionMask._dense
    monkeypatch.setattr(AttentionMask, "_dense", lambda self, window: windows.append(window) or original(self, window))
    visible = AttentionMask(torch.arange(8).unsqueeze(0), None)
    masks = [visible.dense(window) for window in (3, None, 3, None, 3)]
    assert windows == [3, None]
    assert masks[0] is masks[2] is masks[4]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_mask_with_a_key_side(window: int | None, packed: bool) -> None:
    """Token by token: queries among the keys, and slots of a cache in any order, some of them empty."""
    positions_BS, positions_BU = torch.tensor([[5, 6, 9], [2, 3, 4]]), torch.tensor([[9, 1, 5, 6, 99], [0, 1, 2, 3, 4]])
    ids_BS = torch.tensor([[1, 1, 2], [0, 0, 0]]) if packed else None
    ids_BU = torch.tensor([[2, 1, 1, 1, 2], [7, 0, 0, 0, 0]]) if packed else None
    mask = AttentionMask(positions_BS, ids_BS, keys=Keys(positions_BU, ids_BU, queries_last=False)).dense(window)
    assert mask.shape == (2, 1, 3, 5)
    for b, i, j in itertools.product(range(2), range(3), range(5)):
        back = (positions_BS[b, i] - positions_BU[b, j]).item()
        sees = back >= 0 and (window is None or back < window)
        assert mask[b, 0, i, j].item() == (sees and (not packed or bool(ids_BS[b, i] == ids_BU[b, j])))


@pytest.mark.parametrize("documents", [None, 9])
@pytest.mark.parametrize(("S", "U"), [(1, 1), (1, 6), (3, 6), (6, 6), (4, 5)])
def test_segments(S: int, U: int, documents: int | None) -> None:
    """Every query of a segment sees the segment's keys up to its own, by brute force over all packings of two rows."""
    for ends in itertools.product([False, True], repeat=2 * U - 2):
        starts_BU = torch.tensor([True, *ends[: U - 1], True, *ends[U - 1 :]]).view(2, U)
        ids_BU = starts_BU.long().cumsum(dim=1)
        positions_BU = torch.arange(U).unsqueeze(0)
        keys = Keys(positions_BU, ids_BU)
        mask = AttentionMask(positions_BU[:, U - S :], ids_BU[:, U - S :], documents=documents, keys=keys)
        segments = mask.segments(2)
        assert (segments.most_queries, segments.most_keys, segments.queries.dtype) == (S, U, torch.int32)
        assert segments.queries[-1] == 2 * S
        allowed = torch.zeros(2 * S, 2 * U, dtype=torch.bool)
        bounds = zip(*(itertools.pairwise(side.tolist()) for side in (segments.queries, segments.keys)))
        for (first_q, end_q), (first_k, end_k) in bounds:
            for i in range(first_q, end_q):  # bottom right: the last query has all keys
                allowed[i, first_k : end_k - (end_q - 1 - i)] = True
        by_row = torch.stack([allowed[b * S : (b + 1) * S, b * U : (b + 1) * U] for b in range(2)])
        assert allowed.sum() == by_row.sum()
        assert torch.equal(by_row, mask.dense(None).squeeze(1))


def test_queries_before_each_boundary() -> None:
    """Against counting: of two rows of 5 keys the last 3 have queries."""
    has_query = [False, False, True, True, True] * 2
    expected = [sum(has_query[:boundary]) for boundary in range(11)]
    assert queries_before(torch.arange(11, dtype=torch.int32), 3, 5).tolist() == expected


def test_segments_of_fewer_queries_do_not_wait_for_the_device() -> None:
    """On meta tensors, with a bound on the documents."""
    positions_BU, ids_BU = torch.arange(4, device="meta").unsqueeze(0), IDS_BS.to("meta")
    mask = AttentionMask(positions_BU[:, 2:], ids_BU[:, 2:], documents=6, keys=Keys(positions_BU, ids_BU))
    queries, keys, *most = mask.segments(3)
    assert queries.shape == keys.shape == (33,)
    assert most == [2, 4]


def make(dtype: torch.dtype, device: str, grads: bool) -> list[Tensor]:
    """q, k, v of one packed row: four query heads, two key/value heads."""
    random = torch.Generator().manual_seed(0)
    shapes = [(1, S, heads, 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [x.requires_grad_(grads) for x in inputs]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Each document as a row of its own, in float64, by sdpa."""
    outputs = []
    for parts in zip(*(x.double().split(LENGTHS, dim=1) for x in (q, k, v))):
        positions_BS = torch.arange(parts[0].shape[1], device=q.device).unsqueeze(0)
        outputs.append(attend(*parts, window, AttentionMask(positions_BS, None, default_positions=True, engine="sdpa")))
    return torch.cat(outputs, dim=1)


def packed(q: Tensor, k: Tensor, v: Tensor, window: int | None, engine: str, documents: int | None = None) -> Tensor:
    positions_BS = torch.arange(S, device=q.device).unsqueeze(0)
    mask = AttentionMask(positions_BS, DOCUMENTS.to(q.device), True, engine, documents)
    return attend(q, k, v, window, mask)


# fp32: rounding 2⁻²⁴ in sums of up to 128 terms; bf16: 2⁻⁹ of weights, results and, in backward, several products
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def error(got: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


CPU_ENGINES = [("sdpa", dtype) for dtype in BOUNDS] + [("blocks", dtype) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("engine", "dtype"), CPU_ENGINES)
@pytest.mark.parametrize("window", [None, 16, 70, 1000])
def test_packed_equals_documents_one_by_one(window: int | None, engine: str, dtype: torch.dtype) -> None:
    """Outputs and gradients; 128 tokens are two blocks of the engine blocks."""
    inputs = make(dtype, "cpu", grads=True)
    got, exact = packed(*inputs, window, engine), one_by_one(*inputs, window)
    assert got.dtype == dtype
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    grads, exact_grads = (torch.autograd.grad(y, inputs, dy.to(y.dtype)) for y in (got, exact))
    assert max(error(a, b) for a, b in zip((got, *grads), (exact, *exact_grads))) <= BOUNDS[dtype]


@pytest.mark.parametrize(("engine", "dtype"), CPU_ENGINES)
@pytest.mark.parametrize(("S", "window"), [(1, None), (1, 20), (70, 70), (100, 16), (100, None), (149, 2), (64, 1000)])
@pytest.mark.parametrize("ids", ["one document", "documents"])
def test_fewer_queries(engine: str, dtype: torch.dtype, S: int, window: int | None, ids: str) -> None:
    """Outputs and gradients of the last S queries of two rows, against sdpa for all queries in float64."""
    U, random = 150, torch.Generator().manual_seed(S)
    positions_BU = torch.arange(U).unsqueeze(0)
    ids_BU = None if ids == "one document" else torch.tensor([[0] * 40 + [1] * 63 + [2] * 47, [0] * 99 + [1] * 51])
    inputs = [torch.randn(2, U, heads, 16, generator=random, dtype=torch.float64) for heads in (4, 2, 2)]
    dy = torch.randn(2, S, 4, 16, generator=random, dtype=torch.float64)

    exact_inputs = [x.clone().requires_grad_() for x in inputs]
    exact = attend(*exact_inputs, window, AttentionMask(positions_BU, ids_BU, engine="sdpa"))[:, U - S :]
    exact_grads = torch.autograd.grad(exact, exact_inputs, dy)
    q, k, v = (x.to(dtype).requires_grad_() for x in (inputs[0][:, U - S :], *inputs[1:]))
    part_ids_BS = None if ids_BU is None else ids_BU[:, U - S :]
    mask = AttentionMask(positions_BU[:, U - S :], part_ids_BS, engine=engine, keys=Keys(positions_BU, ids_BU))
    got = attend(q, k, v, window, mask)
    grads = torch.autograd.grad(got, (q, k, v), dy.to(dtype))
    exact_grads = exact_grads[0][:, U - S :], *exact_grads[1:]
    assert got.dtype == dtype
    assert max(error(a, b) for a, b in zip((got, *grads), (exact, *exact_grads))) <= BOUNDS[dtype]


@pytest.mark.parametrize("engine", ["blocks", "varlen"])
def test_keys_in_any_order_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """A cache whose slots are rotated: the result is that of keys in order."""
    monkeypatch.setattr(attention_backends, "pick_engine", lambda engine, *_: engine)
    random = torch.Generator().manual_seed(0)
    positions_BU = torch.tensor([[4, 5, 6, 1, 2, 3]])
    q, k, v = (torch.randn(1, n, 2, 8, generator=random, dtype=torch.float64) for n in (1, 6, 6))
    rotated = AttentionMask(positions_BU[:, 2:3], None, engine=engine, keys=Keys(positions_BU, None, False))
    order = positions_BU[0].argsort()
    ordered = AttentionMask(torch.tensor([[6]]), None, engine="sdpa", keys=Keys(positions_BU[:, order]))
    got, exact = attend(q, k, v, 4, rotated), attend(q, k[:, order], v[:, order], 4, ordered)
    assert error(got, exact) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("batch", "length", "window"), [(3, 200, 50), (1, 63, 64), (2, 65, 2), (1, 70, 8)])
def test_blocks_of_several_rows(
    monkeypatch: pytest.MonkeyPatch, batch: int, length: int, window: int, grouped: bool
) -> None:
    """Against sdpa in float64: rows whose positions have gaps, and a torch whose kernel does not share keys."""
    monkeypatch.setattr(attention_blocks, "_flash_groups_queries", lambda: grouped)
    random = torch.Generator().manual_seed(length)
    positions_BS = torch.randint(1, 4, (batch, length), generator=random).cumsum(dim=1)
    inputs = [torch.randn(batch, length, heads, 16, generator=random, requires_grad=True) for heads in (4, 2, 2)]
    wide_inputs = [x.detach().double().requires_grad_() for x in inputs]
    got = attend(*inputs, window, AttentionMask(positions_BS, None, engine="blocks"))
    exact = attend(*wide_inputs, window, AttentionMask(positions_BS, None, engine="sdpa"))
    dy = torch.randn(exact.shape, generator=random)
    grads, exact_grads = torch.autograd.grad(got, inputs, dy), torch.autograd.grad(exact, wide_inputs, dy.double())
    assert max(error(a, b) for a, b in zip((got, *grads), (exact, *exact_grads))) <= BOUNDS[torch.float32]


def test_blocks_read_only_the_keys_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 tokens with a window of 100: 64 queries × at most 163 keys."""
    scores = []
    flash = attention_blocks._flash
    monkeypatch.setattr(
        attention_blocks,
        "_flash",
        lambda q, k, v, bias: scores.append((q.shape[2], k.shape[2])) or flash(q, k, v, bias),
    )
    x = torch.randn(1, 256, 2, 8)
    attend(x, x, x, 100, AttentionMask(torch.arange(256).unsqueeze(0), None, True, engine="blocks"))
    assert scores == [(64, 64), (64, 128), (64, 163), (64, 163)]
    scores.clear()
    keys = Keys(torch.arange(256).unsqueeze(0))
    attend(x[:, 126:], x, x, 100, AttentionMask(torch.arange(126, 256).unsqueeze(0), None, engine="blocks", keys=keys))
    assert scores == [(64, 163), (64, 163), (2, 101)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # flex warns that it is not compiled here
@pytest.mark.parametrize("window", [None, 16, 1000])
def test_flex_packed_equals_documents_one_by_one(window: int | None) -> None:
    """On a CPU flex has no gradients."""
    inputs = make(torch.float32, "cpu", grads=False)
    assert error(packed(*inputs, window, "flex"), one_by_one(*inputs, window)) <= BOUNDS[torch.float32]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("window", [None, 16])
def test_flex_with_fewer_queries(window: int | None) -> None:
    """On a CPU flex has no gradients."""
    inputs, first = make(torch.float32, "cpu", grads=False), 30
    positions_BU = torch.arange(S).unsqueeze(0)
    keys = Keys(positions_BU, DOCUMENTS)
    mask = AttentionMask(positions_BU[:, first:], DOCUMENTS[:, first:], engine="flex", keys=keys)
    got = attend(inputs[0][:, first:], *inputs[1:], window, mask)
    assert error(got, one_by_one(*inputs, window)[:, first:]) <= BOUNDS[torch.float32]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("queries", [S, 50, 91])
@pytest.mark.parametrize("documents", [None, len(LENGTHS)])
@pytest.mark.parametrize("window", [None, 16, 1000])
@pytest.mark.parametrize("engine", [name for name in ENGINE_NAMES if name not in ("auto", "sdpa", "blocks")])
def test_gpu_engines_packed_equal_documents_one_by_one(
    engine: str, window: int | None, documents: int | None, queries: int
) -> None:
    """Outputs and gradients of every engine that is installed, bf16; a bound adds documents without tokens.

    With fewer queries than keys, some documents have keys alone, and one has fewer queries than keys.
    """
    try:
        pick_engine(engine, "cuda", torch.bfloat16)
    except UserError as missing:
        pytest.skip(str(missing))
    inputs = make(torch.bfloat16, "cuda", grads=True)
    positions_BU, ids_BU, first = torch.arange(S, device="cuda").unsqueeze(0), DOCUMENTS.cuda(), S - queries
    keys = Keys(positions_BU, ids_BU) if first else None
    mask = AttentionMask(positions_BU[:, first:], ids_BU[:, first:], not first, engine, documents, keys)
    got, exact = attend(inputs[0][:, first:], *inputs[1:], window, mask), one_by_one(*inputs, window)[:, first:]
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).cuda()
    grads, exact_grads = (torch.autograd.grad(y, inputs, dy.to(y.dtype)) for y in (got, exact))
    assert max(error(a, b) for a, b in zip((got, *grads), (exact, *exact_grads))) <= BOUNDS[torch.bfloat16]


class StandIn:
    """torch's varlen_attn by loops over sequences and heads; records the numbers of heads it is called with.

    refusal: fewer key and value heads than query heads raise an error of this type.
    """

    def __init__(self, refusal: type[Exception] | None = None) -> None:
        self.refusal, self.heads = refusal, []

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        self.heads.append((query.shape[1], key.shape[1], value.shape[1]))
        if self.refusal is not None and query.shape[1] != key.shape[1]:
            raise self.refusal("Expect query and key/value to have the same number of heads")
        assert (max_q, max_k) == (query.shape[0], key.shape[0])
        outputs = []
        for bounds in zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist())):
            (queries, keys) = (slice(start, end) for start, end in bounds)
            q, k, v = (x[part].transpose(0, 1) for x, part in ((query, queries), (key, keys), (value, keys)))
            # causality and the window count from the last query and the last key
            own = torch.arange(q.shape[1]).unsqueeze(1) + k.shape[1] - q.shape[1]
            distance = own - torch.arange(k.shape[1])
            seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(0, 1))
        return torch.cat(outputs)


class NewStandIn(StandIn):
    """Of torch from 2.12 on: fewer key and value heads only with enable_gqa."""

    def __call__(self, query, key, value, *rest, window_size=(-1, -1), enable_gqa=False):
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Try setting enable_gqa=True for GQA.")
        return super().__call__(query, key, value, *rest, window_size=window_size)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[StandIn], None]]:
    """varlen(function): function takes the place of torch's varlen_attn, which needs a GPU."""

    def replace(function: StandIn) -> None:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        monkeypatch.setattr(attention_backends, "pick_engine", lambda engine, *_: engine)
        attention_backends._varlen_function.cache_clear()

    yield replace
    attention_backends._varlen_function.cache_clear()


def varlen_and_exact(window: int | None, documents: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the engine varlen, and of sdpa on one document at a time."""
    inputs = make(torch.float64, "cpu", grads=True)
    got, exact = packed(*inputs, window, "varlen", documents), one_by_one(*inputs, window)
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tuple([y, *torch.autograd.grad(y, inputs, dy)] for y in (got, exact))


@pytest.mark.parametrize("documents", [None, len(LENGTHS)])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("function", [StandIn, NewStandIn])
def test_varlen_repeats_no_keys(
    varlen: Callable, function: type[StandIn], window: int | None, documents: int | None
) -> None:
    """Two key and value heads for four query heads in every call; float64, sums of up to 128 products in other orders.

    A bound on the documents adds sequences without tokens, which change nothing.
    """
    stand_in = function()
    varlen(stand_in)
    for _ in range(2):
        for actual, expected in zip(*varlen_and_exact(window, documents)):
            assert actual.shape == expected.shape
            assert error(actual, expected) <= BOUNDS[torch.float64]
    assert stand_in.heads == [(4, 2, 2)] * 2


@pytest.mark.parametrize("documents", [None, len(LENGTHS)])
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("queries", [1, 50, 90, 91, 92, 120])
def test_varlen_with_fewer_queries(varlen: Callable, queries: int, window: int | None, documents: int | None) -> None:
    """The first query inside a document, at its start and one token after it; documents before it have no query."""
    varlen(NewStandIn())
    inputs = make(torch.float64, "cpu", grads=True)
    positions_BU, first = torch.arange(S).unsqueeze(0), S - queries
    keys = Keys(positions_BU, DOCUMENTS)
    mask = AttentionMask(positions_BU[:, first:], DOCUMENTS[:, first:], engine="varlen", documents=documents, keys=keys)
    got, exact = attend(inputs[0][:, first:], *inputs[1:], window, mask), one_by_one(*inputs, window)[:, first:]
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads, exact_grads = (torch.autograd.grad(y, inputs, dy) for y in (got, exact))
    for actual, expected in zip((got, *grads), (exact, *exact_grads)):
        assert error(actual, expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("refusal", [ValueError, RuntimeError])
def test_varlen_repeats_keys_after_a_refusal(varlen: Callable, refusal: type[Exception]) -> None:
    """By torch's Python code or by its kernel; fewer heads are tried once. Gradients have the shapes of k and v."""
    stand_in = StandIn(refusal)
    varlen(stand_in)
    for _ in range(2):
        for actual, expected in zip(*varlen_and_exact(16)):
            assert actual.shape == expected.shape
            assert error(actual, expected) <= BOUNDS[torch.float64]
    assert stand_in.heads == [(4, 2, 2), (4, 4, 4), (4, 4, 4)]


def test_an_error_that_repeated_keys_do_not_cure(varlen: Callable) -> None:
    """It is raised, and does not end the use of fewer heads."""

    def broken(*_: object, window_size: tuple[int, int]) -> None:
        raise RuntimeError("the device is gone")

    varlen(broken)
    with pytest.raises(RuntimeError, match="gone"):
        varlen_and_exact(None)
    assert not attention_backends._varlen_function().repeats


@pytest.fixture
def installed_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The optional packages that pick_engine finds installed: a set for the test to fill."""
    packages: set[str] = set()
    monkeypatch.setattr(attention_backends, "_is_installed", lambda module: module in packages)
    pick_engine.cache_clear()
    yield packages
    pick_engine.cache_clear()


@pytest.mark.parametrize(
    ("packages", "engine"),
    [
        ((), "varlen"),
        (("flash_attn.flash_attn_interface",), "flash2"),
        (("flash_attn.flash_attn_interface", "flash_attn.cute"), "flash4"),
    ],
)
def test_auto_takes_the_best_available_engine(
    installed_packages: set[str], packages: tuple[str, ...], engine: str
) -> None:
    installed_packages.update(packages)
    assert pick_engine("auto", "cuda", torch.bfloat16) == engine
    assert pick_engine("auto", "cuda", torch.float32) == "sdpa"
    assert pick_engine("auto", "cpu", torch.bfloat16) == pick_engine("auto", "cpu", torch.float32) == "blocks"
    assert pick_engine("auto", "cpu", torch.float64) == "sdpa"


@pytest.mark.parametrize(
    ("engine", "device", "dtype", "sentence"),
    [
        ("flash3", "cuda", torch.bfloat16, "kernels.attention=flash3 is not known; use one of auto, sdpa, blocks"),
        ("blocks", "cuda", torch.float32, "needs a CPU and fp32 or 16 bits, not cuda and torch.float32; use auto"),
        ("blocks", "cpu", torch.float64, "needs a CPU and fp32 or 16 bits, not cpu and torch.float64; use auto"),
        ("varlen", "cpu", torch.bfloat16, "needs a CUDA device in 16 bits, not cpu in torch.bfloat16; use auto"),
        ("varlen", "cuda", torch.float32, "needs a CUDA device in 16 bits, not cuda in torch.float32; use auto"),
        ("flash4", "cuda", torch.bfloat16, "kernels.attention=flash4 needs the package flash-attn-4 and a CUDA device"),
        ("flash2", "cuda", torch.float16, "kernels.attention=flash2 needs the package flash-attn and a CUDA device"),
    ],
)
@pytest.mark.usefixtures("installed_packages")
def test_refusals(engine: str, device: str, dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        pick_engine(engine, device, dtype)
    assert sentence in str(caught.value)


def test_every_name_has_an_engine() -> None:
    assert set(attention_backends._ENGINES) | {"auto"} == set(ENGINE_NAMES)
