"""A closer look at a run now and then: one row goes through the model once more, without gradients.

- The largest attention logit, q·k/√C. No engine of attention gives its logits out, and when they run away, attention
  diverges. Sampled: QUERIES queries, evenly spaced over the first row of the global batch, in every layer and head,
  against all keys they see.
- How long this rank's own attention takes. The ranks wait for each other in every layer, so a whole step takes as long
  on all of them as on the slowest; but attention talks to nobody, and there a slow rank shows.

Shapes: B = 1 row, S sequence, N sampled queries, H query heads, G key/value heads, C head width.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.models.attention import Attention
from trinity.models.trinity import Trinity
from trinity.parallel.collectives import all_gather_single
from trinity.parallel.mesh import Ranks
from trinity_kernels.norm import wide

QUERIES = 64


class ProbeResult(NamedTuple):
    """max_logit: of the first row of the global batch. seconds_R: in attention, of each rank, its layers together."""

    max_logit: float
    seconds_R: list[float]


@torch.no_grad()
def probe_attention(
    model: Trinity, tokens_BS: Tensor, targets_BS: Tensor, document_ids_BS: Tensor | None, ranks: Ranks
) -> ProbeResult:
    """Send the first of this rank's rows through the model; every rank calls this.

    Args:
        tokens_BS, targets_BS, document_ids_BS: this rank's rows, on the CPU.
    """
    rows = (tokens_BS, targets_BS, document_ids_BS)
    tokens, targets, documents = (None if row is None else row[:1].to(ranks.device) for row in rows)
    clock = _Clock(ranks.device)
    with _looking(model, documents, clock) as logits:
        model(tokens, document_ids_BS=documents, targets_BS=targets)
    own = torch.stack([torch.stack(logits).amax().double(), logits[0].new_full((), clock.seconds()).double()])
    everyone = own.new_empty(dist.get_world_size() * 2)
    all_gather_single(everyone, own)
    logit_R, seconds_R = everyone.view(-1, 2).t().tolist()
    return ProbeResult(logit_R[0], seconds_R)  # of the one row that is looked at on every mesh


@contextmanager
def _looking(model: Trinity, documents_BS: Tensor | None, clock: "_Clock") -> Iterator[list[Tensor]]:
    """Within it, each attention adds its largest sampled logit to a list, and its time to the clock."""
    logits: list[Tensor] = []
    handles = []
    for block in model.blocks:
        attention, made = block.attention, {}
        hooks = [(attention.q_norm, partial(_keep, made, "q")), (attention.k_norm, partial(_keep, made, "k"))]
        hooks += [(attention, partial(_note, logits, made, documents_BS, clock))]
        handles += [module.register_forward_hook(hook) for module, hook in hooks]
        handles.append(attention.register_forward_pre_hook(lambda *_: clock.start()))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not see the hooks
            yield logits
    finally:
        for handle in handles:
            handle.remove()


def _keep(made: dict[str, Tensor], name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    made[name] = output


def _note(
    logits: list[Tensor], made: dict[str, Tensor], documents_BS: Tensor | None, clock: "_Clock",
    attention: Attention, _inputs: tuple, _output: Tensor,
) -> None:  # fmt: skip
    clock.stop()
    logits.append(largest_logit(made.pop("q"), made.pop("k"), attention.window, documents_BS))


def largest_logit(q_BSHC: Tensor, k_BSGC: Tensor, window: int | None, documents_BS: Tensor | None) -> Tensor:
    """The largest q·k/√C of evenly spaced queries with the keys that they see.

    Args:
        q_BSHC, k_BSGC: one row, as attention takes them.
        window, documents_BS: what hides keys; see trinity.models.backends.
    Returns:
        scalar fp32, or float64 of float64.
    """
    _, S, H, C = q_BSHC.shape
    G = k_BSGC.shape[2]
    places_S = torch.arange(S, device=q_BSHC.device)
    places_N = torch.linspace(0, S - 1, min(QUERIES, S), device=q_BSHC.device).round().long()
    back_NS = places_N.unsqueeze(1) - places_S
    seen_NS = (back_NS >= 0) if window is None else (back_NS >= 0) & (back_NS < window)
    if documents_BS is not None:
        seen_NS &= documents_BS[0, places_N].unsqueeze(1) == documents_BS[0]
    q_NGHC = wide(q_BSHC[0, places_N]).unflatten(1, (G, H // G))
    tops = []
    for group in range(G):  # one after the other: a row may be long
        scores_NHS = q_NGHC[:, group] @ wide(k_BSGC[0, :, group]).t() * C**-0.5
        tops.append(scores_NHS.masked_fill(~seen_NS.unsqueeze(1), -torch.inf).amax())
    return torch.stack(tops).amax()


class _Clock:
    """Adds up the time between start and stop, as the device has it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list = []

    def start(self) -> None:
        self._marks.append([self._now()])

    def stop(self) -> None:
        self._marks[-1].append(self._now())

    def seconds(self) -> float:
        if not self._cuda:
            return sum(stop - start for start, stop in self._marks)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._marks) / 1e3

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
