"""Score the tensors of a folder one after the other, and keep the scores of an interrupted scan.

One matrix is in memory at a time. The scores so far are written every SAVE_SECONDS and when the scan ends, also by an
error; the next scan of the same weights on the same kind of device takes them over.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

from trinity.errors import UserError
from trinity.io.json_files import read_json, write_json
from trinity.merging.sources import Source
from trinity.spectrum.modules import Module, sampled
from trinity.spectrum.scores import Score, score_matrix
from trinity.terminal import Progress

SAVE_SECONDS = 10.0
"""Seconds of work that a killed scan loses at most, and one matrix."""


def scan(
    source: Source, modules: list[Module], sample: int | None, device: str, kept: Path, force: bool = False
) -> dict[str, Score]:
    """The scores of the modules' tensors, by name.

    Args:
        sample: experts of each stack to score; None: all.
        device: where singular values are computed.
        kept: JSON file with the scores so far.
        force: replace scores of another model, or from another kind of device.
    Raises:
        UserError: `kept` holds something else, or a tensor has values that are not finite.
    """
    settings = {"weights": source.identity(), "device": torch.device(device).type}
    scores = {} if force else _kept_scores(kept, settings)
    wanted = [tensor for module in modules for tensor in sampled(module, sample)]
    missing = [tensor for tensor in wanted if tensor not in scores]
    _save(kept, settings, scores)  # now, so that a folder that cannot be written is known at once
    saved = time.monotonic()
    try:
        with Progress("scoring", len(wanted), "tensor") as bar:
            bar.skip_to(len(wanted) - len(missing))
            for tensor in missing:
                scores[tensor] = _score(source, tensor, device)
                bar.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(kept, settings, scores)
                    saved = time.monotonic()
    finally:
        _save(kept, settings, scores)
    return {tensor: scores[tensor] for tensor in wanted}


def _score(source: Source, tensor: str, device: str) -> Score:
    weight = source.read(tensor, 0, source.rows(tensor))
    if not torch.isfinite(weight).all():
        raise UserError(f"{source.folder} holds {tensor} with values that are not finite; give a sound model")
    if not weight.numel():
        raise UserError(f"{source.folder} holds {tensor} without values; give a sound model")
    return score_matrix(weight.to(device))


def _save(path: Path, settings: dict[str, Any], scores: dict[str, Score]) -> None:
    write_json(path, {"settings": settings, "scores": scores}, indent=None)


def _kept_scores(path: Path, settings: dict[str, Any]) -> dict[str, Score]:
    """The scores in a file; none without a file."""
    before = read_json(path, "remove it, or give --force")
    if before is None:
        return {}
    scores = before.get("scores")
    if not isinstance(scores, dict) or not all(
        isinstance(score, list) and len(score) == 3 for score in scores.values()
    ):
        raise UserError(f"{path} is no file of scores; give another --out, or --force to write over it")
    if before.get("settings") != settings:
        raise UserError(
            f"{path} has scores of other weights, or from another kind of device; give another --out, or --force to "
            "write over it"
        )
    # JSON has no infinity: it was written as null
    return {name: Score(one, math.inf if mp is None else mp, rank) for name, (one, mp, rank) in scores.items()}
