"""Context parallelism against whole rows on one process, in float64: losses, raw gradients, counts and routes' effects.

The model is not sharded here: each rank computes its part, and gradients are summed over the ranks. The whole training
step is compared in test_every_mesh.py.

Bound: 1e-10 of the largest gradient of the model; rounding leaves 1e-14. A ratio for each parameter would show noise:
with a window of 1 the gradients of queries and keys are exactly 0. Loss curves would show almost nothing: without the
halo the loss moves by 0.3 %, and the gradient by 75 % (test_mistakes_are_caught).

Shapes: B rows, S tokens of a row, C tokens of a chunk, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.mesh_runs import BOUND
from trinity.config.model import ZOO, ModelConfig
from trinity.models import Trinity
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import next_tokens
from trinity.parallel import context_parallel
from trinity.parallel.context_parallel import ContextParts, halo, heads_fit, row_parts
from trinity.parallel.mesh import Sizes, join_meshes

B, S = 2, 24
CONFIG = ModelConfig(
    vocab_size=50, width=24, layers=4, dense_layers=1, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=4,
    global_every=3, experts=8, active_experts=3, expert_width=10, route_scale=2.5, rope_theta=100.0, max_positions=64,
)  # fmt: skip
# windows of a chunk of 6 tokens on 4 ranks: none before, shorter, as long, longer by one, of several chunks, of the row
WINDOWS = [1, 4, 6, 7, 14, 24, 100]
HEADS = [(4, 4), (4, 2), (4, 1), (3, 3), (6, 2)]  # key/value heads split, replicated; and heads that 4 ranks gather
DOCUMENTS = {
    "none": None,
    "short": [[3, 2, 7, 4, 4, 4], [1, 5, 5, 5, 5, 3]],
    "chunks": [[6, 6, 6, 6], [12, 12]],  # every boundary is a chunk's
    "straddling": [[5, 8, 11], [7, 1, 16]],  # one token before and after a chunk's, and across chunks
    "one": [[24], [24]],
}


def batch(documents: str, length: int = S) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets of which a third is ignored (and all of the first chunk but one), and document ids."""
    random = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(50, (B, length), generator=random)
    lengths = DOCUMENTS[documents]
    ids_BS = (
        None
        if lengths is None
        else torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths])
    )
    targets_BS = next_tokens(tokens_BS, ids_BS)
    targets_BS[torch.rand(B, length, generator=random) < 1 / 3] = -100
    targets_BS[:, : length // 4 - 1] = -100
    return tokens_BS, targets_BS, ids_BS


def make_model(config: ModelConfig) -> Trinity:
    """In float64, with the same weights on every rank; expert biases that matter."""
    model = Trinity(config).double()
    model.init_weights(0)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    return model


def results(model: Trinity, losses: Any, valid: int) -> dict[str, Tensor]:
    """The gradient of the mean loss with both extra losses, and the losses' sums."""
    model.zero_grad()
    (losses.token_loss / valid + 0.01 * losses.sequence_loss_B.sum() / B).backward()
    named = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    sums = {
        "ce": losses.ce_BS.sum(dim=1),
        "sequence loss": losses.sequence_loss_B.detach(),
        "entropy": losses.entropy_M,
    }
    return named | sums | {"counts": losses.counts_ME}


def whole_rows(config: ModelConfig, documents: str, length: int = S) -> dict[str, Tensor]:
    """In one process."""
    tokens_BS, targets_BS, ids_BS = batch(documents, length)
    model = make_model(config)
    losses = model(tokens_BS, document_ids_BS=ids_BS, targets_BS=targets_BS, z=1e-3)
    return results(model, losses, int((targets_BS != -100).sum()))


def divided_rows(cases: list[tuple[ModelConfig, str, int]], wrong: str | None = None) -> list[dict[str, Tensor]]:
    """The sums over the ranks, for each config, documents and length; every rank calls it."""
    world = dist.get_world_size()
    ranks = join_meshes(Sizes(1, world, 1, world, "experts", context=world), torch.device("cpu"))
    assert ranks.context is not None
    sums = []
    for config, documents, length in cases:
        tokens_BS, targets_BS, ids_BS = batch(documents, length)
        own = ranks.columns(length)
        model, tokens = make_model(config), tokens_BS[:, own]
        parts = row_parts(ranks.context, tokens, None if wrong == "documents dropped" else ids_BS, None, "sdpa")
        with MISTAKES[wrong]() if wrong in MISTAKES else nullcontext():
            losses = model(tokens, targets_BS=targets_BS[:, own], z=1e-3, parts=parts)
            valid = int((targets_BS != -100).sum())
            if wrong == "mean over each rank's targets":
                valid = max(1, int((targets_BS[:, own] != -100).sum())) * world
            result = results(model, losses, valid)
        for tensor in result.values():
            dist.all_reduce(tensor)
        sums.append(result)
    return sums


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Counts exactly, the rest to the bound, gradients relative to the largest of the model."""
    assert torch.equal(actual.pop("counts"), expected["counts"])
    largest = max(expected[name].abs().max().item() for name in expected if "." in name)
    for name, tensor in actual.items():
        scale = largest if "." in name else expected[name].abs().max().item()
        assert (tensor - expected[name]).abs().max().item() <= BOUND * scale, name


def compare(processes: Callable, world: int, cases: list[tuple[ModelConfig, str, int]]) -> None:
    """Every case on `world` ranks against whole rows."""
    for results_of_rank in processes(world).run(divided_rows, cases):
        for case, actual in zip(cases, results_of_rank, strict=True):
            try:
                assert_equal(actual, whole_rows(*case))
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("world", [2, 4])
def test_windows_and_documents(processes: Callable, world: int) -> None:
    """Local layers get exactly the keys of their window, from as many ranks as it takes, under every document mask.

    That a window or a document mask is dropped by context parallelism was reported of accelerate (#4177), prime-rl
    (#2828), TRL (#6843) and torchtitan (#2536); that gradients are wrong where the loss looks right, of Megatron-LM
    (#1464).
    """
    pairs = [(window, documents) for window in WINDOWS for documents in ("none", "straddling")]
    pairs += [(7, documents) for documents in ("short", "chunks", "one")]
    compare(processes, world, [(replace(CONFIG, window=window), documents, S) for window, documents in pairs])


@pytest.mark.parametrize("world", [2, 4])
def test_heads(processes: Callable, world: int) -> None:
    """Key/value heads split, replicated where ranks outnumber them, and gathered where ranks cannot split the heads."""
    cases = [(replace(CONFIG, heads=heads, kv_heads=kv_heads), "straddling", S) for heads, kv_heads in HEADS]
    compare(processes, world, cases)


def test_an_odd_chunk(processes: Callable) -> None:
    """Of 5 tokens; the row's last token keeps its place (TransformerEngine#1930, Megatron-LM#4495 lose it)."""
    compare(processes, 4, [(CONFIG, "none", 20)])


@contextmanager
def no_halo() -> Iterator[None]:
    """Local layers see the chunk alone."""
    exchange = ContextParts.before_attention

    def before(self: ContextParts, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple:
        return exchange(self, q, k, v, None) if window is None else (q, k, v, self._mask_of_chunk(0))

    with mock.patch.object(ContextParts, "before_attention", before):
        yield


@contextmanager
def window_dropped() -> Iterator[None]:
    """Attention sees every key that it is given."""
    dense = AttentionMask.dense
    with mock.patch.object(AttentionMask, "dense", lambda self, _window: dense(self, None)):
        yield


@contextmanager
def sequence_loss_by_chunk() -> Iterator[None]:
    """The loss of each chunk as if it were a row, divided by the number of chunks."""
    with mock.patch.object(ContextParts, "row_counts", lambda _self, counts_BE: counts_BE * dist.get_world_size()):
        yield


@contextmanager
def shared_keys_once() -> Iterator[None]:
    """The gradient of what a rank received is not sent back."""
    backward = context_parallel._AllToAll.backward
    with mock.patch.object(
        context_parallel._AllToAll, "backward", staticmethod(lambda ctx, grad: backward(ctx, torch.zeros_like(grad)))
    ):
        yield


MISTAKES: dict[str | None, Callable[[], Any]] = {
    "no halo": no_halo,
    "window dropped": window_dropped,
    "sequence loss by chunk": sequence_loss_by_chunk,
    "gradients of other ranks' keys dropped": shared_keys_once,
}


@pytest.mark.parametrize("wrong", [*MISTAKES, "documents dropped", "mean over each rank's targets"])
def test_mistakes_are_caught(processes: Callable, wrong: str) -> None:
    """Each fails the comparison. Reported of others: a loss or gradient times the ranks (Megatron-LM#673, #906,
    verl#6609), a sequence loss over the wrong span (Megatron-LM#5996, #6108, #4302), tokens that weigh more on ranks
    with few targets (prime-rl#1957)."""
    case = CONFIG, "straddling", S
    expected = whole_rows(*case)
    for (actual,) in processes(4).run(divided_rows, [case], wrong):
        with pytest.raises(AssertionError):
            assert_equal(dict(actual), expected)
        gradient = torch.cat([(actual[name] - expected[name]).flatten() for name in expected if "." in name]).norm()
        size = torch.cat([expected[name].flatten() for name in expected if "." in name]).norm()
        assert gradient > 1e-4 * size  # far above what rounding, or a run in fp32, would explain


def changed_logits(config: ModelConfig, documents: str, places: list[int]) -> list[Tensor]:
    """[B, C] bool for each place: whether this rank's logits change with the token there."""
    world = dist.get_world_size()
    ranks = join_meshes(Sizes(1, world, 1, world, "experts", context=world), torch.device("cpu"))
    tokens_BS, _, ids_BS = batch(documents)
    own, model = ranks.columns(S), make_model(config)

    @torch.no_grad()
    def logits(tokens_BS: Tensor) -> Tensor:
        tokens = tokens_BS[:, own]
        return model(tokens, parts=row_parts(ranks.context, tokens, ids_BS, None, "sdpa"))

    before, changes = logits(tokens_BS), []
    for place in places:
        other = tokens_BS.clone()
        other[:, place] = (other[:, place] + 1) % 50
        changes.append((logits(other) != before).any(dim=-1))
    return changes


@pytest.mark.parametrize("layer", ["local", "global"])
@pytest.mark.parametrize("documents", ["none", "straddling"])
def test_a_token_is_seen_exactly_where_the_mask_says(processes: Callable, layer: str, documents: str) -> None:
    """On every rank: the queries whose logits change with a token are those that may attend to it."""
    config = replace(CONFIG, layers=1, window=9, global_every=1 if layer == "global" else 2)
    places = [0, 4, 5, 6, 13, 17, 18, 23]
    ids_BS = batch(documents)[2]
    rule = AttentionMask(torch.arange(S).unsqueeze(0), ids_BS).dense(None if layer == "global" else 9).squeeze(1)
    per_rank = processes(4).run(changed_logits, config, documents, places)
    for number, place in enumerate(places):
        changed_BS = torch.cat([changes[number] for changes in per_rank], dim=1)
        assert torch.equal(changed_BS, rule[..., place].expand(B, S)), place


@pytest.mark.parametrize(("chunk", "size"), [(6, 4), (5, 3), (1, 4), (24, 1)])
def test_halos_by_brute_force(chunk: int, size: int) -> None:
    """What each rank gets, in the order in which it arrives, are the last keys before its chunk, as many as needed."""
    for reach in range(chunk * size + 3):
        halos = [halo(reach, chunk, size, index) for index in range(size)]
        for index, own in enumerate(halos):
            assert own.received == [other.sent[index] for other in halos]
            tokens = [
                source * chunk + place
                for source, count in enumerate(own.received)
                for place in range(chunk - count, chunk)
            ]
            start = index * chunk
            assert tokens == list(range(max(0, start - reach), start))
            assert own.keys == len(tokens)


@pytest.mark.parametrize(
    ("name", "sizes"), [("nano", [2, 4, 8]), ("mini", [2, 4, 8, 16, 32]), ("large", [2, 4, 8, 16, 24, 48])]
)
def test_head_counts_of_the_reports_models(name: str, sizes: list[int]) -> None:
    """On 12 ranks, the heads of some of Large's ranks would be in two groups of 6."""
    assert [n for n in range(2, 65) if heads_fit(ZOO[name].heads, ZOO[name].kv_heads, n)] == sizes


def test_every_query_head_finds_its_keys() -> None:
    """By brute force: on each rank, query head i attends with key head i // (query heads / key heads)."""
    for heads, size in itertools.product(range(1, 49), range(2, 17)):
        for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
            if not heads_fit(heads, kv_heads, size):
                continue
            group, own, copies = heads // kv_heads, heads // size, max(1, size // kv_heads)
            sent = [head for head in range(kv_heads) for _ in range(copies)]
            assert len(sent) % size == 0
            each = len(sent) // size
            for rank in range(size):
                keys = sent[rank * each : (rank + 1) * each]
                for place in range(own):
                    assert keys[place // (own // each)] == (rank * own + place) // group
