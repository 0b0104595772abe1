"""Evaluate the model of a run between its steps: validation losses, needles, and samples of the config's prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trinity.config.run import RunConfig
from trinity.data.sources.source import Source
from trinity.data.stream.validation import validation_sequences
from trinity.evaluation.needle_run import Needles
from trinity.evaluation.needle_run import metrics as needle_metrics
from trinity.evaluation.samples import Sampler
from trinity.evaluation.validation_loss import evaluate
from trinity.interop.tokenizer_files import special_ids
from trinity.models.trinity import Trinity
from trinity.monitor.loggers import JsonLines
from trinity.parallel.mesh import Ranks
from trinity.training.build_data import RunData


class Evaluator:
    """Evaluates one run's model; every rank takes part.

    Args:
        config: the run's.
        ranks: the mesh.
        data: validation sources, and the tokens' byte lengths.
        directory: the run directory, for samples.jsonl and needles.jsonl.
        step: steps made before this start; later lines of these files are cut off.
        tokenizer: its folder; needed only for evaluation.prompts, evaluation.needles and the ends of turns.
        beat: called after each forward pass.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        data: RunData,
        directory: Path,
        step: int,
        tokenizer: Path | None,
        beat: Callable[[], None],
    ) -> None:
        self._config, self._ranks, self._data, self._beat = config, ranks, data, beat
        prompts, needles = list(config.evaluation.prompts), config.evaluation.needles
        self._files: dict[str, JsonLines] = {}
        for name, wanted in {"samples": prompts, "needles": needles.lengths}.items():
            path = directory / f"{name}.jsonl"
            if ranks.is_first and (wanted or path.exists()):  # an old file is cut back even if nothing is wanted now
                self._files[name] = JsonLines(path, step)
        self._needles: Needles | None = None
        self._needle_lines: list[dict[str, Any]] = []
        if needles.lengths:
            assert tokenizer is not None  # tokenizer_at_start refuses needles without one
            self._needles = Needles(config, data.validation, tokenizer, ranks.rank, ranks.world)
        self._sampler: Sampler | None = None
        self._end_of_turn: int | None = None
        if config.data.loss == "masked" and tokenizer is not None:
            self._end_of_turn = special_ids(tokenizer, config.model.vocab_size).turn_end
        if prompts:
            assert tokenizer is not None  # tokenizer_at_start refuses prompts without one
            new_tokens, vocab_size = config.evaluation.sample_tokens, config.model.vocab_size
            self._sampler = Sampler(prompts, new_tokens, tokenizer, vocab_size)

    def validate(self, model: Trinity) -> dict[str, float]:
        """Loss and balance of every validation set, and the scores of needles, under their names in metrics.jsonl."""
        metrics: dict[str, float] = {}
        for name, source in self._data.validation.items():
            measured = self._measure(model, source, self._config.evaluation.by_position, with_load=True)
            metrics |= {f"validation_{metric}.{name}": value for metric, value in measured.items()}
        if self._needles is not None:
            self._needle_lines = self._needles(model, self._ranks.device, self._beat)
            metrics |= needle_metrics(self._needle_lines)
        return metrics

    def validate_average(self, model: Trinity) -> dict[str, float]:
        """Losses of every validation set for a model that holds an average (checkpoint_average.py)."""
        losses = {name: self._measure(model, source) for name, source in self._data.validation.items()}
        return {f"validation_loss_average.{name}": values["loss"] for name, values in losses.items()}

    def _measure(
        self, model: Trinity, source: Source, by_position: bool = False, with_load: bool = False
    ) -> dict[str, float]:
        """What `evaluate` measures on one validation set."""
        config = self._config
        rows = validation_sequences(
            source,
            config.data.sequence_length,
            config.evaluation.sequences,
            config.data.loss_on_document_start,
            rank=self._ranks.data_rank,
            ranks=self._ranks.data_ranks,
            best_fit_rows=config.data.best_fit_rows if config.data.packing == "best_fit" else 0,
            masked=config.data.loss == "masked",
        )
        return evaluate(
            model,
            rows,
            config.batch.microbatch,
            config.data.document_mask,
            self._data.byte_lengths_V,
            self._ranks.device,
            self._beat,
            masked=config.data.loss == "masked",
            end_of_turn=self._end_of_turn,
            context=self._ranks.context,
            by_position=by_position,
            with_load=with_load,
        )

    def write_samples(self, model: Trinity, record: dict[str, Any]) -> None:
        """Append the last scores of needles to needles.jsonl, and the prompts' continuations to samples.jsonl.

        Every rank continues the config's prompts; rank 0 writes.

        Args:
            model: the run's.
            record: of the step, for its number and its tokens.
        """
        samples = [] if self._sampler is None else self._sampler(model, self._ranks.device, self._beat)
        for name, lines in {"needles": self._needle_lines, "samples": samples}.items():
            if name in self._files:
                for line in lines:
                    self._files[name].write({"step": record["step"], "tokens": record["tokens"], **line})

    def rewind(self, step: int) -> None:
        """Cut samples.jsonl and needles.jsonl back to an earlier step: a rollback."""
        for file in self._files.values():
            file.rewind(step)

    def close(self) -> None:
        """Close samples.jsonl and needles.jsonl."""
        for file in self._files.values():
            file.close()
