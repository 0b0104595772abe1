"""Build the data of a run: open its training and validation sources, and check them against model and tokenizer."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.config.changes import check_changes
from trinity.config.paths import config_files, run_directory, tokenizer_folder
from trinity.config.phases import ResolvedPhase, resolved_phases
from trinity.config.run import RunConfig
from trinity.data.chat.template import TEMPLATE_FILE, template_hash
from trinity.data.sources.inputs import holds_text
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.source import Source
from trinity.data.sources.text import TextSource
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.data.stream.loader import Loader
from trinity.data.stream.mixture import LengthBias, Phase, normalised
from trinity.data.stream.stream import SequenceStream
from trinity.data.tokenizer.tokenizer import fingerprint, load_tokenizer, token_byte_lengths
from trinity.errors import Failure, UserError
from trinity.parallel.mesh import Ranks
from trinity.run_directory import newest_config
from trinity.training.build import batch_plan
from trinity.training.resume import history_of

FEW_LONG = 0.05
"""Share of tokens in documents longer than half a row, below which a run with a length bias is warned. Not from the
report."""
MEASURED_DOCUMENTS = 1 << 20
"""Most documents of a source from which that share is estimated, evenly spaced."""
PREFETCHED_STEPS = 2
"""Steps whose rows the data workers prepare ahead."""
LEARNING = ["batch", "optim", "balancing", "loss", "precision"]
"""Sections of the config that may change without changing the data."""


@dataclass
class RunData:
    """The data of a run.

    loader: this rank's training rows, in order.
    validation: held-out sources by name.
    byte_lengths_V: bytes of text per token of the vocabulary; None without a tokenizer.
    """

    loader: Loader
    validation: dict[str, Source]
    byte_lengths_V: Tensor | None


def open_data(config: RunConfig, ranks: Ranks, plan: BatchPlan | None = None, step: int = 0) -> RunData:
    """Open every source and check that it fits the model and the tokenizer.

    Args:
        config: the run.
        ranks: the mesh.
        plan: the batch of each step; None: that of a new run.
        step: steps made so far.

    Raises:
        UserError: no training data, a damaged source, another tokenizer, or a vocabulary larger than the model's.
    """
    stream = open_stream(config, ranks.data_rank, ranks.data_ranks, plan)
    for source in stream.sources.values():
        _ = source.tokens  # counts the tokens of text sources now, not within the first step
    ahead = PREFETCHED_STEPS * stream.plan.at(step).sequences // ranks.data_ranks
    loader = Loader(stream, config.data.workers, ahead, pin=ranks.device.type == "cuda")
    validation = _open_sources("validation", config.data.validation, config)
    folder = tokenizer_folder(config)
    return RunData(loader, validation, token_byte_lengths(load_tokenizer(folder)) if folder else None)


def open_stream(config: RunConfig, rank: int, ranks: int, plan: BatchPlan | None = None) -> SequenceStream:
    """The training sequences of one data rank, from the first sequence on."""
    data = config.data
    if not data.train:
        raise UserError("data.train names no source; give one, as data.train.mine=FOLDER (see tools/prepare_data.py)")
    sources = _open_sources("train", data.train, config)
    return SequenceStream(
        sources,
        [_phase(phase, list(sources), data.best_fit_rows) for phase in resolved_phases(data)],
        streams=data.streams,
        seed=config.run.seed,
        bos_id=next(iter(sources.values())).bos_id,
        plan=plan or batch_plan(config),
        loss_on_document_start=data.loss_on_document_start,
        repeat=data.exhausted == "repeat",
        masked=data.loss == "masked",
        weigh_examples=config.loss.per == "example",
        rank=rank,
        ranks=ranks,
    )


def document_notes(stream: SequenceStream) -> list[str]:
    """A note for each source with fewer documents than streams: several streams then read the same documents."""
    notes = []
    for name, source in stream.sources.items():
        if source.documents < stream.streams:
            fewer = source.documents // stream.ranks * stream.ranks
            words = f", or start a new run with data.streams={fewer}" if fewer else ""
            notes.append(
                f"note: data.train.{name} has {source.documents} documents for data.streams={stream.streams}, so rows "
                f"of one step repeat each other's text; split its texts into more documents{words}"
            )
    return notes


def best_fit_notes(stream: SequenceStream, step: int) -> list[str]:
    """A note for each source whose epoch gives no full window of best-fit packing to each stream, in a step's phase.

    A window never holds two epochs, so each stream then ends each epoch in rows that it cannot fill.
    """
    plan, notes = stream.plan.at(step), []
    phase = stream.phases[plan.phase]
    for (name, source), weight in zip(stream.sources.items(), phase.weights):
        window = weight * phase.best_fit_rows * plan.sequence_length  # tokens of this source
        if source.tokens >= stream.streams * window:
            continue
        most = int(source.tokens // window)
        fewer = range(stream.ranks, most + 1, stream.ranks)
        good = max((streams for streams in fewer if stream.streams % streams == 0), default=max(fewer, default=0))
        mend = f"start a new run with data.streams={good}" if good else "use shorter rows, or more text"
        notes.append(
            f"note: data.train.{name} has {source.tokens} tokens, and data.streams={stream.streams} windows of "
            f"data.best_fit_rows={phase.best_fit_rows} rows take {int(stream.streams * window)} of it; a window ends "
            f"with the epoch, so the last rows of each epoch hold more padding; {mend}"
        )
    return notes


def length_bias_notes(config: RunConfig, sources: dict[str, Source], tokens: int) -> list[str]:
    """For each phase with a length bias, from the current one on: the share of its tokens in documents that are longer
    than half a row; a warning where that is less than FEW_LONG, because long rows then hold little long context.

    Args:
        config: the run's.
        sources: by name.
        tokens: trained on so far.
    """
    phases, notes = resolved_phases(config.data), []
    for number, phase in enumerate(phases):
        bias = LengthBias(**asdict(phase.length_bias))
        past = number + 1 < len(phases) and phases[number + 1].tokens <= tokens
        if past or bias.floor == bias.ceiling == 1:
            continue
        share, half = 0.0, phase.sequence_length // 2
        for name, weight in phase.mixture.items():
            documents = sources[name].documents
            step = -(-documents // MEASURED_DOCUMENTS)
            share += weight * bias.token_share(sources[name].lengths(np.arange(0, documents, step)), half)
        few = share < FEW_LONG
        key = "data.length_bias" if not number else f"data.phases[{number - 1}].length_bias"
        mend = "; add sources of longer documents, or a shorter sequence_length" if few else ""
        notes.append(
            f"{'warning' if few else 'note'}: with {key} {share:.1%} of the tokens are in documents of more than "
            f"{half} tokens, half a row{mend}"
        )
    return notes


def seek_near(stream: SequenceStream, config: RunConfig, step: int) -> None:
    """Set a stream to its state in the nearest checkpoint before a step, so that less must be replayed.

    Its batch plan becomes the run's: the history in the newest checkpoint, then the config's batches. The stream stays
    where it is if the config's directory holds no run or a run on other data, or if the checkpoints cannot be reached.
    A run with init.keep=all and no checkpoint of its own uses those of the run that it continues.
    """
    try:
        path, complete = _checkpoints_before(config)
        before = newest_config(path)
        checkpoints = CheckpointDirectory.at(path, before.checkpoint.url)
        if not complete:
            return
        history = history_of(checkpoints, complete[-1], before)
        tokens_read = batch_plan(before, history).at(complete[-1] - 1).tokens
        check_changes(before, config, tokens_read, LEARNING, str(path))
        stream.plan = batch_plan(config, history)
        done = [number for number in complete if number <= step]
        if not done:
            return
        state = empty_tensors(checkpoints.path_of(done[-1]), "data.")
        load(state, checkpoints.path_of(done[-1]))
        stream.load_state_dict({key.removeprefix("data."): value for key, value in state.items()})
    except (UserError, Failure):
        return


def _checkpoints_before(config: RunConfig) -> tuple[Path, list[int]]:
    """The run directory whose checkpoints a config's run continues, and their steps: its own, else that of init.run."""
    own, init = run_directory(config), config.init
    steps = _complete_steps(own)
    if steps or not init.run or init.keep != "all":
        return own, steps
    other = Path(init.run)
    return other, [step for step in _complete_steps(other) if init.step in (None, step)]


def _complete_steps(run: Path) -> list[int]:
    return CheckpointDirectory.of_run(run).complete_steps() if config_files(run) else []


def _phase(phase: ResolvedPhase, names: list[str], best_fit_rows: int) -> Phase:
    bias = phase.length_bias
    return Phase(
        normalised(names, phase.mixture),
        phase.rsdb_size if phase.packing == "rsdb" else 0,
        None if bias.floor == 1 else LengthBias(bias.tokens, bias.floor, bias.ceiling),
        best_fit_rows if phase.packing == "best_fit" else 0,
    )


def _open_sources(kind: str, places: dict[str, str], config: RunConfig) -> dict[str, Source]:
    sources = {}
    for name, place in places.items():
        source = sources[name] = _open_source(f"data.{kind}.{name}", place, config)
        _check_source(f"data.{kind}.{name}={place}", source, config)
    return sources


def _open_source(label: str, place: str, config: RunConfig) -> Source:
    """Open a folder of shards, or text that is tokenised as it is read."""
    if not holds_text(place):
        return TokenSource(place, config.data.verify)
    if config.data.loss == "masked":
        raise UserError(
            f"{label}={place} is text, which has no loss mask, and data.loss=masked; prepare it with "
            f"tools/prepare_data.py --chat and set {label} to the folder of shards, or set data.loss=all"
        )
    folder = tokenizer_folder(config)
    if folder is None:
        raise UserError(f"{label}={place} is text, and data.tokenizer is not given; set it to a tokenizer's folder")
    return TextSource([place], folder, field=config.data.text_field, option=label, progress=True)


def _check_source(label: str, source: Source, config: RunConfig) -> None:
    if source.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{label} has token ids up to {source.vocab_size - 1} and model.vocab_size={config.model.vocab_size}; "
            f"use a vocabulary of at least {source.vocab_size}"
        )
    folder = tokenizer_folder(config)
    if folder is not None and fingerprint(folder) != source.tokenizer_fingerprint:
        raise UserError(
            f"{label} was made with another tokenizer than {folder}; set data.tokenizer to the folder it was made "
            "with, or prepare it again with this one"
        )
    if config.data.loss == "masked" and not source.masked:
        raise UserError(
            f"{label} has no loss mask, and data.loss=masked; prepare it with tools/prepare_data.py --chat, or set "
            "data.loss=all"
        )
    if folder is not None and source.template not in (None, template_hash(folder)):
        raise UserError(
            f"{label} was rendered with another chat template than {folder} holds, and exports would have that one; "
            f"copy the {TEMPLATE_FILE} of the shards into {folder}, or prepare them again"
        )
    rows = min(phase.sequence_length for phase in resolved_phases(config.data))
    longest = source.longer_than(rows) if config.data.packing == "best_fit" else None
    if longest is not None:
        shorter = f"prepare the data with --max-tokens {rows} --too-long drop" if source.masked else "split its texts"
        raise UserError(
            f"{label} has a document of {longest} tokens, and data.packing=best_fit splits none into rows of {rows}; "
            f"use data.sequence_length={longest} or more, or {shorter}"
        )
