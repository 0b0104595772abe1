"""Needles at every evaluation of a run: `evaluation.needles`, scored by forced decoding on all ranks.

The samples are made once, at the start, each rank its own. They depend on the tokenizer, the validation set, the config
and run.seed alone, so a resumed run asks the same questions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trinity.config.run import RunConfig
from trinity.data.sources.source import Source
from trinity.data.tokenizer.tokenizer import load_tokenizer
from trinity.evaluation.needle import KINDS, Haystack, NeedleSample, NeedleTask
from trinity.evaluation.needle_score import forced_cell, share
from trinity.models.trinity import Trinity

OPTION = "evaluation.needles.lengths"


class Needles:
    """The needles of a run.

    Args:
        config: the run's; evaluation.needles names at least one length.
        validation: the run's validation sets.
        tokenizer: folder of the run's tokenizer.
        data_rank, data_ranks: which samples this process scores.
    Raises:
        UserError: a length is too small for a question, or the tokenizer does not fit.
    """

    def __init__(
        self, config: RunConfig, validation: dict[str, Source], tokenizer: Path, data_rank: int = 0, data_ranks: int = 1
    ) -> None:
        needles = config.evaluation.needles
        self._count, self._row_tokens = needles.samples, config.batch.microbatch * config.data.sequence_length
        haystack = None
        if any(KINDS[kind].in_text for kind in needles.kinds):
            name = needles.haystack or next(iter(validation))
            haystack = Haystack.of_source(validation[name], load_tokenizer(tokenizer), name)
        numbers = share(self._count, data_rank, data_ranks)
        self._samples: dict[tuple[int, int], dict[int, NeedleSample]] = {}
        for kind in needles.kinds:
            for length in needles.lengths:
                vocab_size, seed = config.model.vocab_size, config.run.seed
                task = NeedleTask(tokenizer, vocab_size, kind, length, haystack, seed, option=OPTION)
                self._samples[kind, length] = {number: task.sample(number) for number in sorted(set(numbers))}

    def __call__(
        self, model: Trinity, device: torch.device, beat: Callable[[], None] | None = None
    ) -> list[dict[str, Any]]:
        """{"kind", "length", and the fields of a Cell} for each kind and length. Every rank must call this."""
        lines = []
        for (kind, length), samples in self._samples.items():
            rows = max(1, self._row_tokens // length)
            cell = forced_cell(model, samples, self._count, rows, length, device, beat)
            lines.append({"kind": kind, "length": length, **cell._asdict()})
        return lines


def metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    """needle.LENGTH and needle_nats.LENGTH; those of kinds 2 and 3 as needle_2.LENGTH, needle_2_nats.LENGTH, …"""
    fields: dict[str, float] = {}
    for line in lines:
        prefix = "needle" if line["kind"] == 1 else f"needle_{line['kind']}"
        fields |= {f"{prefix}.{line['length']}": line["score"], f"{prefix}_nats.{line['length']}": line["nats"]}
    return fields
