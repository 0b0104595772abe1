"""Probe the attention of a running model: an extra forward pass of one row, without gradients, every few steps.

- The largest attention logit, q·k/√C: attention diverges when it grows without bound, and no attention engine returns
  its logits. Sampled: QUERIES queries, evenly spaced over the first row of the global batch, in every layer and head,
  with all keys that they attend to.
- Each rank's time in attention. Ranks wait for each other in every layer, so a whole step takes as long on all of them
  as on the slowest. Attention does not communicate, so its time shows which rank is slow.

Shapes: B = 1 row, S sequence, N sampled queries, H query heads, G key/value heads, C head width.
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

from trinity.models.attention import Attention
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import all_gather_single
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
    rows = (tokens_BS, targets_BS, document_ids_BS)
    tokens, targets, documents = (None if row is None else row[:1].to(ranks.device) for row in rows)
    clock = _Clock(ranks.device)
    with _probe_hooks(model, documents, clock) as logits:
        model(tokens, document_ids_BS=documents, targets_BS=targets)
    local = torch.stack([torch.stack(logits).amax().double(), logits[0].new_full((), clock.seconds()).double()])
    gathered = local.new_empty(dist.get_world_size() * 2)
    all_gather_single(gathered, local)
    logit_R, seconds_R = gathered.view(-1, 2).t().tolist()
    return ProbeResult(logit_R[0], seconds_R)  # rank 0's row is the same on every mesh


@contextmanager
def _probe_hooks(model: Trinity, documents_BS: Tensor | None, clock: "_Clock") -> Iterator[list[Tensor]]:
    """Hook every attention layer: it adds its largest sampled logit to the yielded list, and its time to the clock."""
    logits: list[Tensor] = []
    handles: list[RemovableHandle] = []
    for attention in model.modules():
        if not isinstance(attention, Attention):
            continue
        outputs: dict[str, Tensor] = {}
        handles += [
            attention.q_norm.register_forward_hook(partial(_store, outputs, "q")),
            attention.k_norm.register_forward_hook(partial(_store, outputs, "k")),
            attention.register_forward_hook(partial(_measure, logits, outputs, documents_BS, clock)),
            attention.register_forward_pre_hook(lambda *_: clock.start()),
        ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not see the hooks
            yield logits
    finally:
        for handle in handles:
            handle.remove()


def _store(outputs: dict[str, Tensor], name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    outputs[name] = output


def _measure(
    logits: list[Tensor], outputs: dict[str, Tensor], documents_BS: Tensor | None, clock: "_Clock",
    attention: Attention, _inputs: tuple, _output: Tensor,
) -> None:  # fmt: skip
    clock.stop()
    logits.append(largest_logit(outputs.pop("q"), outputs.pop("k"), attention.window, documents_BS))


def largest_logit(q_BSHC: Tensor, k_BSGC: Tensor, window: int | None, documents_BS: Tensor | None) -> Tensor:
    """The largest q·k/√C of evenly spaced queries with the keys that they attend to.

    Args:
        q_BSHC, k_BSGC: one row, as attention takes them.
        window, documents_BS: the attention mask; see trinity.models.attention_backends.
    Returns:
        scalar fp32, or float64 of float64.
    """
    _, S, H, C = q_BSHC.shape
    G = k_BSGC.shape[2]
    positions_S = torch.arange(S, device=q_BSHC.device)
    positions_N = torch.linspace(0, S - 1, min(QUERIES, S), device=q_BSHC.device).round().long()
    distance_NS = positions_N.unsqueeze(1) - positions_S
    visible_NS = (distance_NS >= 0) if window is None else (distance_NS >= 0) & (distance_NS < window)
    if documents_BS is not None:
        visible_NS &= documents_BS[0, positions_N].unsqueeze(1) == documents_BS[0]
    q_NGHC = wide(q_BSHC[0, positions_N]).unflatten(1, (G, H // G))
    maxima = []
    for group in range(G):  # one group at a time, for memory: a row may be long
        logits_NHS = q_NGHC[:, group] @ wide(k_BSGC[0, :, group]).t() * C**-0.5
        maxima.append(logits_NHS.masked_fill(~visible_NS.unsqueeze(1), -torch.inf).amax())
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
