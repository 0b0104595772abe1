"""Text on which the models of a merge and the merged one are evaluated, and their figures on it.

The figures are those of `tools/evaluate.py --text DATA --packed`: documents are packed into rows of one length, as in a
run's validation, and the loss is in nats per token.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.balancing import dead_share, max_violation
from trinity.data.sources.inputs import holds_text
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource
from trinity.data.stream.validation import validation_sequences
from trinity.data.tokenizer.tokenizer import load_tokenizer, token_byte_lengths
from trinity.errors import UserError
from trinity.evaluation.expert_load import ExpertLoad
from trinity.evaluation.perplexity import open_documents, packed_perplexity
from trinity.evaluation.validation_loss import evaluate
from trinity.merging.plan import Plan
from trinity.merging.sources import Source
from trinity.models.trinity import Trinity

WINDOW = 2048
"""Most tokens of a row, where the model has as many positions; that of tools/evaluate.py."""

Documents = TokenSource | TextSource


@dataclass(frozen=True)
class RowSettings:
    """How documents are packed and computed.

    window: tokens of a row; None: WINDOW, or all positions of the model.
    rows: most rows of each text; None: all.
    document_mask: no attention between documents.
    batch_tokens: most tokens in a forward pass.
    device: cpu or cuda.
    """

    window: int | None = None
    rows: int | None = None
    document_mask: bool = False
    batch_tokens: int = 8192
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("window", "rows", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError):  # unknown device type, none on this machine, or too high an index
            raise UserError(f"--device {self.device} is not available; use cpu") from None

    def row_tokens(self, model: Trinity) -> int:
        """Tokens of a row for this model."""
        return self.window or min(WINDOW, model.config.max_positions)


class Figures(NamedTuple):
    """What was measured on one text.

    metrics: under their names in tools/evaluate.py: loss, perplexity, bits_per_byte, max_violation, …
    violation_M, dead_M: MaxVio and the share of dead experts of each MoE layer, float64; empty without MoE layers.
    first_layer: number of the first MoE layer in the model.
    """

    metrics: dict[str, float]
    violation_M: Tensor
    dead_M: Tensor
    first_layer: int


def measure(model: Trinity, source: Documents, tokenizer: Path, settings: RowSettings) -> Figures:
    """Evaluate a model on a text.

    Args:
        model: on settings.device.
        source: made with the tokenizer in this folder.
    """
    with ExpertLoad(model) as load:
        metrics = packed_perplexity(
            model,
            source,
            settings.row_tokens(model),
            byte_lengths_V=token_byte_lengths(load_tokenizer(tokenizer)),
            rows=settings.rows,
            document_mask=settings.document_mask,
            loss_on_document_start=True,
            batch_tokens=settings.batch_tokens,
        )
    counts_ME, first = load.counts_ME, model.config.dense_layers
    return Figures(metrics | load.metrics(), max_violation(counts_ME), dead_share(counts_ME), first)


class PackedText:
    """A text packed into rows once, for models that are evaluated on it again and again.

    Args:
        source: made with the tokenizer in this folder.
        window: tokens of a row.
        settings: how many rows, and how they are computed.
    """

    def __init__(self, source: Documents, tokenizer: Path, window: int, settings: RowSettings) -> None:
        count = sys.maxsize if settings.rows is None else settings.rows
        self._rows = list(validation_sequences(source, window, count, True, masked=source.masked))
        self._byte_lengths_V = token_byte_lengths(load_tokenizer(tokenizer))
        self._window, self._settings, self._masked = window, settings, source.masked

    def measure(self, model: Trinity) -> dict[str, float]:
        """The metrics of `measure` but perplexity, to the last bit."""
        with ExpertLoad(model) as load:
            metrics = evaluate(
                model,
                self._rows,
                max(1, self._settings.batch_tokens // self._window),
                self._settings.document_mask,
                self._byte_lengths_V,
                model.embed.weight.device,
                masked=self._masked,
            )
        return metrics | load.metrics()


@dataclass
class ValidationSets:
    """Texts by name, opened for models whose tokenizers may differ.

    paths: name → shards, or text files.
    option: the option that gives them, for messages.
    """

    paths: Mapping[str, str]
    option: str = "--validation"
    _open: dict[tuple[str, Path], Documents] = field(default_factory=dict)

    def check(self, plan: Plan) -> None:
        """Refuse, before a merge, texts that the merged model will not be able to read.

        Raises:
            UserError: a text is missing or empty, or was made with another tokenizer than that of the merged model.
        """
        donor = plan.vocabulary.donor
        if donor.tokenizer is None:
            raise UserError(
                f"{self.option} needs a tokenizer, and {donor.label} has no tokenizer.json; add the file to the model"
            )
        for name, path in self.paths.items():
            if plan.vocabulary.tokenizer_json is not None and Path(path).is_dir() and not holds_text(path):
                raise UserError(
                    f"{self.option} {path} has token ids, and the merge makes a new tokenizer; give text files instead"
                )
            self.documents(name, donor.tokenizer, plan.vocabulary.size)

    def documents(self, name: str, tokenizer: Path, vocab_size: int) -> Documents:
        """A text as the token ids of a tokenizer.

        Raises:
            UserError: it is missing, or was made with another tokenizer.
        """
        key = name, tokenizer
        if key not in self._open:
            self._open[key] = open_documents(self.paths[name], tokenizer, "text", vocab_size, option=self.option)
        return self._open[key]

    def figures(self, model: Trinity, source: Source, settings: RowSettings) -> dict[str, Figures]:
        """Evaluate a model on all texts, which it can all read; see measure."""
        found, notes = self.measure(model, source, None, settings)
        if notes:
            raise UserError(notes[0])
        return found

    def measure(
        self, model: Trinity, source: Source, fallback: Path | None, settings: RowSettings
    ) -> tuple[dict[str, Figures], list[str]]:
        """Evaluate a model on all texts.

        Args:
            model: the source's, on settings.device.
            source: gives the tokenizer.
            fallback: folder of the tokenizer of a source without one.
        Returns:
            name of the text → figures; and a remark for each text that cannot be read with the source's tokenizer.
        """
        tokenizer = source.tokenizer or fallback
        assert tokenizer is not None  # check refuses models without one
        found, notes = {}, []
        for name in self.paths:
            try:
                documents = self.documents(name, tokenizer, model.config.vocab_size)
            except UserError as error:
                notes.append(str(error))
                continue
            found[name] = measure(model, documents, tokenizer, settings)
        return found, notes
