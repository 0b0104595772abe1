"""Probe the attention of a running model: an extra forward pass of one row, without gradients, every few steps.

- The largest attention logit, q·k/√C: attention diverges when it grows without bound, and no attention engine returns
  its logits. Sampled: QUERIES queries, evenly spaced over the first row of the global batch, in every layer and head,
  with all keys that they attend to. With context parallelism each rank of the row's group sees its share of them: some
  heads in global layers, some queries in local ones.
- Each rank's time in attention. Ranks wait for each other in every layer, so a whole step takes as long on all of them
  as on the slowest. The attention engine does not communicate, so its time shows which rank is slow.

Shapes: B = 1 row, S queries and U keys of it on this rank, N sampled queries, H query heads, G key/value heads, C head
width.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trinity.models.attention import AttentionCore
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import all_gather_single
from trinity.parallel.context_parallel import row_parts
from trinity.parallel.mesh import Ranks
from trinity_kernels.norm import wide

QUERIES = 64


class ProbeResult(NamedTuple):
    """Result of one probe, equal on every rank.

    max_logit: largest sampled attention logit of the first row of the global batch.
    seconds_R: each rank's time in attention, summed over the layers.
    """

    max_logit: float
    seconds_R: list[float]


@torch.no_grad()
def probe_attention(
    model: Trinity, tokens_BS: Tensor, targets_BS: Tensor, document_ids_BS: Tensor | None, ranks: Ranks
) -> ProbeResult:
    """Run the first of this rank's rows through the model; every rank calls this. One collective.

    Args:
        tokens_BS, targets_BS, document_ids_BS: this rank's rows, on the CPU.
    """
    first, own = slice(0, 1), ranks.columns(tokens_BS.shape[1])
    tokens, targets = (row[first, own].to(ranks.device) for row in (tokens_BS, targets_BS))
    row_ids = None if document_ids_BS is None else document_ids_BS[first].to(ranks.device)
    ids = None if row_ids is None else row_ids[:, own]
    parts = row_parts(ranks.context, tokens, row_ids, None, model.attention_engine)
    clock = _Clock(ranks.device)
    with _probe_hooks(model, tokens_BS.shape[1], clock) as logits:
        model(tokens, document_ids_BS=ids, targets_BS=targets, parts=parts)
    local = torch.stack([torch.stack(logits).amax().double(), logits[0].new_full((), clock.seconds()).double()])
    gathered = local.new_empty(dist.get_world_size() * 2)
    all_gather_single(gathered, local)
    logit_R, seconds_R = gathered.view(-1, 2).t().tolist()
    # the first row of the global batch, the same on every mesh, is that of the first data rank
    return ProbeResult(max(logit_R[: ranks.sizes.context]), seconds_R)


@contextmanager
def _probe_hooks(model: Trinity, length: int, clock: "_Clock") -> Iterator[list[Tensor]]:
    """Hook every attention engine: it adds its largest sampled logit to the yielded list, and its time to the clock.

    Args:
        length: of the whole row.
    """
    logits: list[Tensor] = []
    handles: list[RemovableHandle] = []
    for core in model.modules():
        if isinstance(core, AttentionCore):
            handles += [
                core.register_forward_pre_hook(lambda *_: clock.start()),
                core.register_forward_hook(partial(_measure, logits, length, clock)),
            ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not see the hooks
            yield logits
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    logits: list[Tensor], length: int, clock: "_Clock", _core: nn.Module, inputs: tuple, _output: Tensor
) -> None:
    clock.stop()
    q_BSHC, k_BUGC, _, window, mask = inputs
    logits.append(largest_logit(q_BSHC, k_BUGC, window, mask, length))


def largest_logit(
    q_BSHC: Tensor, k_BUGC: Tensor, window: int | None, mask: AttentionMask, length: int | None = None
) -> Tensor:
    """The largest q·k/√C of evenly spaced queries of a row with the keys that they attend to.

    Args:
        q_BSHC, k_BUGC, window, mask: one row, or a part of it, as `attend` takes them; positions count from its start.
        length: tokens of the whole row; None: q is the whole row.
    Returns:
        scalar fp32, or float64 of float64; −∞ if none of the queries is here.
    """
    _, S, H, C = q_BSHC.shape
    G, length = k_BUGC.shape[2], length or S
    positions_N = torch.linspace(0, length - 1, min(QUERIES, length), device=q_BSHC.device).round().long()
    index_N = positions_N - mask.positions_BS[0, 0]
    index_N = index_N[(index_N >= 0) & (index_N < S)]
    if not len(index_N):
        return wide(q_BSHC).new_full((), -torch.inf)
    distance_NU = mask.positions_BS[0, index_N].unsqueeze(1) - mask.keys.positions_BU[0]
    visible_NU = (distance_NU >= 0) if window is None else (distance_NU >= 0) & (distance_NU < window)
    if mask.document_ids_BS is not None and mask.keys.document_ids_BU is not None:
        visible_NU &= mask.document_ids_BS[0, index_N].unsqueeze(1) == mask.keys.document_ids_BU[0]
    q_NGHC = wide(q_BSHC[0, index_N]).unflatten(1, (G, H // G))
    maxima = []
    for group in range(G):  # one group at a time, for memory: a row may be long
        logits_NHU = q_NGHC[:, group] @ wide(k_BUGC[0, :, group]).t() * C**-0.5
        maxima.append(logits_NHU.masked_fill(~visible_NU.unsqueeze(1), -torch.inf).amax())
    return torch.stack(maxima).amax()


class _Clock:
    """Sums the time between start and stop: of the device's events on a GPU, of the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._intervals: list[list[Any]] = []  # [start, stop], in seconds or as CUDA events

    def start(self) -> None:
        self._intervals.append([self._now()])

    def stop(self) -> None:
        self._intervals[-1].append(self._now())

    def seconds(self) -> float:
        if not self._cuda:
            return sum(stop - start for start, stop in self._intervals)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._intervals) / 1e3

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
