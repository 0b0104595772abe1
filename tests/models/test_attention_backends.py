"""Attention engines: the mask, agreement with each other, and refusals.

The reference is sdpa on one document at a time; tests/models/test_attention.py compares that with loops.

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
from trinity.models.attention_backends import ENGINE_NAMES, AttentionMask, attend, pick_engine

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


@pytest.mark.filterwarnings("ignore::UserWarning")  # flex warns that it is not compiled here
@pytest.mark.parametrize("window", [None, 16, 1000])
def test_flex_packed_equals_documents_one_by_one(window: int | None) -> None:
    """On a CPU flex has no gradients."""
    inputs = make(torch.float32, "cpu", grads=False)
    assert error(packed(*inputs, window, "flex"), one_by_one(*inputs, window)) <= BOUNDS[torch.float32]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("documents", [None, len(LENGTHS)])
@pytest.mark.parametrize("window", [None, 16, 1000])
@pytest.mark.parametrize("engine", [name for name in ENGINE_NAMES if name not in ("auto", "sdpa", "blocks")])
def test_gpu_engines_packed_equal_documents_one_by_one(engine: str, window: int | None, documents: int | None) -> None:
    """Outputs and gradients of every engine that is installed, bf16; a bound adds documents without tokens."""
    try:
        pick_engine(engine, "cuda", torch.bfloat16)
    except UserError as missing:
        pytest.skip(str(missing))
    inputs = make(torch.bfloat16, "cuda", grads=True)
    got, exact = packed(*inputs, window, engine, documents), one_by_one(*inputs, window)
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
        assert (cu_seq_q.tolist(), max_q, max_k) == (cu_seq_k.tolist(), S, S)
        outputs = []
        for start, end in itertools.pairwise(cu_seq_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            distance = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
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
