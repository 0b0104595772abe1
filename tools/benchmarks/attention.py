"""Softmax attention of one layer, forward and backward, with each engine of trinity.models.attention_backends.

varlen is measured twice: called with the key and value heads as they are, and with them repeated.

Heads of the report's models, a local layer's window and a global layer, rows of 4096 and 8192 tokens, with and without
a document mask; bf16 on a GPU. On a CPU the heads of configs/smoke.yaml, in fp32. FLOPs count exactly the pairs that
the mask allows: 4 per head, feature and pair in forward, 10 in backward, which computes the scores again. A figure is
the median over rounds in which the engines take turns. Compilation is not counted.

Shapes: B rows, S sequence, H query heads, G key/value heads, C head width.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from benchmarks.timing import DENSE_TF, Marks, device, one_line, record, take_turns
from torch import Tensor
from tqdm import tqdm

REPEATED = "varlen, keys repeated"
"""varlen with each key and value head repeated for its query heads, as grouped queries need where it takes only H."""

CONTENDERS = {"flash4": "flash4", "flash2": "flash2", "varlen": "varlen", REPEATED: "varlen", "blocks": "blocks",
              "sdpa": "sdpa", "flex": "flex"}  # fmt: skip
"""Row → engine, in order of preference; flex last, because it compiles for each mask."""

MEAN_DOCUMENT = 1024
"""Mean length in tokens; lengths follow an exponential distribution. Not from the report: chosen for this benchmark."""

TOKENS = 16_384
"""B·S on a GPU."""


class Case(NamedTuple):
    """One layer's heads, its window (None: global), and its rows."""

    H: int
    G: int
    C: int
    window: int | None
    S: int
    B: int
    documents: bool


def cases() -> dict[str, Case]:
    """Cases by name, those without documents first."""
    if not torch.cuda.is_available():
        heads, lengths, tokens = {"smoke": (4, 2, 64, 128)}, (256,), 2048
    else:
        heads = {"Nano": (8, 2, 128, 2048), "Mini": (32, 4, 128, 2048), "Large": (48, 8, 128, 4096)}
        lengths, tokens = (4096, 8192), TOKENS
    named = {}
    for documents in (False, True):
        for S in lengths:
            for name, (H, G, C, window) in heads.items():
                for kind, limit in (("local", window), ("global", None)):
                    words = f"{name}, {kind}, {S}" + (", documents" if documents else "")
                    named[words] = Case(H, G, C, limit, S, tokens // S, documents)
    return named


def run(
    quick: bool,
    *,
    engines: Collection[str] = tuple(CONTENDERS),
    lengths: Collection[int] | None = None,
    documents: Collection[bool] = (False, True),
) -> dict[str, Any]:
    """Measure every case with every engine; returns the figures and what they were measured on.

    Args:
        engines: rows of CONTENDERS to measure.
        lengths: only cases with rows of these lengths; all by default.
        documents: only cases without or with a document mask.
    """
    from benchmarks.step import machine

    results: dict[str, Any] = {"on": machine(), "unit": "TF" if torch.cuda.is_available() else "GF", "cases": {}}
    chosen = {k: c for k, c in cases().items() if c.documents in documents and (lengths is None or c.S in lengths)}
    for name, case in tqdm(chosen.items(), unit="case", file=sys.stderr, disable=None):
        try:
            results["cases"][name] = _measure(case, 2 if quick else 5, engines)
        except Exception as error:  # an engine may break the device: keep what was measured before
            results["cases"][name] = {"all": {"failed": one_line(error)}}
        for engine, figures in results["cases"][name].items():
            record(f"{name}: {engine}", figures)
    return results


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table; an engine that fails everywhere is one line below it."""
    unit = results["unit"]
    lines = [
        results["on"], "",
        f"| | engine | forward, ms | {unit} | backward, ms | {unit} | of 789 TF |", "|---" * 7 + "|",
    ]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for name, engines in results["cases"].items():
        for engine, figures in engines.items():
            if "failed" in figures:
                reasons.setdefault(f"{engine}: {figures['failed']}", []).append(name)
                continue
            scale = {"TF": 1, "GF": 1000}[unit]
            share = f"{figures['tf_both'] / DENSE_TF:.0%}" if unit == "TF" else ""
            cells = [
                f"{value:.3g}" for s, r in zip(figures["seconds"], figures["tf"]) for value in (1000 * s, scale * r)
            ]
            lines.append("| " + " | ".join([name, engine, *cells, share]) + " |")
    total = len(results["cases"])
    lines += [""] + [f"{why} ({'everywhere' if len(w) == total else '; '.join(w)})" for why, w in reasons.items()]
    return "\n".join(lines)


def pairs_seen(documents_BS: Tensor, window: int | None) -> int:
    """Number of (query, key) pairs that the mask allows.

    Args:
        documents_BS: [B, S] integers, equal within a document, contiguous.
    """
    B, S = documents_BS.shape
    starts_BS = torch.ones(B, S, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    position_S = torch.arange(S)
    first_BS = torch.where(starts_BS, position_S, 0).cummax(dim=1).values
    keys_BS = position_S - first_BS + 1
    return int((keys_BS if window is None else keys_BS.clamp_max(window)).sum())


def flops(case: Case, documents_BS: Tensor) -> tuple[int, int]:
    """FLOPs of forward (QKᵀ, PV) and of backward (dV, dP, dQ, dK and QKᵀ again)."""
    product = 2 * case.H * case.C * pairs_seen(documents_BS, case.window)
    return 2 * product, 5 * product


def make_documents(case: Case) -> Tensor:
    """Document ids [B, S] int64; one document per row if the case has none."""
    if not case.documents:
        return torch.zeros(case.B, case.S, dtype=torch.int64)
    begins = torch.rand(case.B, case.S, generator=torch.Generator().manual_seed(0)) < 1 / MEAN_DOCUMENT
    return begins.cumsum(dim=1)


def _measure(case: Case, rounds: int, engines: Collection[str] = tuple(CONTENDERS)) -> dict[str, dict[str, Any]]:
    from trinity.models.attention_backends import pick_engine

    where, dtype = device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    random = torch.Generator(where).manual_seed(0)
    heads = (case.H, case.G, case.G, case.H)
    shapes = [(case.B, case.S, count, case.C) for count in heads]
    *qkv, grad = (torch.randn(shape, generator=random, device=where, dtype=dtype) for shape in shapes)
    documents_BS = make_documents(case)
    results: dict[str, dict[str, Any]] = {}
    calls = {}
    for name in engines:
        engine = CONTENDERS[name]
        try:
            pick_engine(engine, where.type, dtype)
            repeats = case.H // case.G if name == REPEATED else 1
            inputs = [x.requires_grad_() for x in qkv]
            calls[name] = _timed(engine, case, inputs, documents_BS.to(where), grad, repeats)
        except ValueError as error:
            results[name] = {"failed": one_line(error)}
    work = flops(case, documents_BS)
    for name, figures in take_turns(calls, rounds).items():
        if "seconds" in figures:
            figures["tf"] = [flop / seconds / 1e12 for flop, seconds in zip(work, figures["seconds"])]
            figures["tf_both"] = sum(work) / sum(figures["seconds"]) / 1e12
        results[name] = figures
    return results


def _timed(
    engine: str, case: Case, qkv: list[Tensor], documents_BS: Tensor, grad: Tensor, repeats: int = 1
) -> Callable[[Marks], None]:
    from trinity.models.attention_backends import AttentionMask, attend

    positions = torch.arange(case.S, device=documents_BS.device).unsqueeze(0)
    # masks are cached, as in a model, where all layers of a forward pass share them: only the first call computes them
    mask = AttentionMask(positions, documents_BS if case.documents else None, default_positions=True, engine=engine)

    def call(mark: Marks) -> None:
        q, k, v = qkv
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        mixed = attend(q, k, v, case.window, mask)
        mark()
        torch.autograd.grad(mixed, qkv, grad)

    return call
