"""Evaluate the model of a run between its steps: validation losses, and samples of the config's prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trinity.config.run import RunConfig
from trinity.data.stream.validation import validation_sequences
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
        directory: the run directory, for samples.jsonl.
        step: steps made before this start; later lines of samples.jsonl are cut off.
        tokenizer: its folder; needed only for evaluation.prompts and for the ends of turns.
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
        prompts, path = list(config.evaluation.prompts), directory / "samples.jsonl"
        writes = ranks.is_first and (prompts or path.exists())  # an old file is cut back even without prompts
        self._samples = JsonLines(path, step) if writes else None
        self._sampler: Sampler | None = None
        self._end_of_turn: int | None = None
        if config.data.loss == "masked" and tokenizer is not None:
            self._end_of_turn = special_ids(tokenizer, config.model.vocab_size).turn_end
        if prompts:
            assert tokenizer is not None  # tokenizer_at_start refuses prompts without one
            new_tokens, vocab_size = config.evaluation.sample_tokens, config.model.vocab_size
            self._sampler = Sampler(prompts, new_tokens, tokenizer, vocab_size)

    def validate(self, model: Trinity) -> dict[str, float]:
        """The metrics of trinity.evaluation.validation_loss of every validation source, as validation_METRIC.NAME."""
        config = self._config
        metrics: dict[str, float] = {}
        for name, source in self._data.validation.items():
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
            losses = evaluate(
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
            )
            metrics |= {f"validation_{metric}.{name}": value for metric, value in losses.items()}
        return metrics

    def write_samples(self, model: Trinity, record: dict[str, Any]) -> None:
        """Continue the config's prompts, on every rank, and append them to samples.jsonl on rank 0.

        Args:
            model: the run's.
            record: of the step, for its number and its tokens.
        """
        if self._sampler is None:
            return
        for sample in self._sampler(model, self._ranks.device, self._beat):
            if self._samples is not None:
                self._samples.write({"step": record["step"], "tokens": record["tokens"], **sample})

    def rewind(self, step: int) -> None:
        """Cut samples.jsonl back to an earlier step: a rollback."""
        if self._samples is not None:
            self._samples.rewind(step)

    def close(self) -> None:
        """Close samples.jsonl."""
        if self._samples is not None:
            self._samples.close()
