"""From a config to the things it describes: model, data, optimizers. Each function builds one."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from trinity.config.paths import tokenizer_folder
from trinity.config.run import Kernels, RunConfig
from trinity.data.batches import BatchPlan
from trinity.data.shards import TokenSource
from trinity.data.stream import SequenceStream
from trinity.data.tokenizer import fingerprint, load_tokenizer, token_byte_lengths
from trinity.errors import UserError
from trinity.models.fp8 import use_fp8
from trinity.models.roles import parameter_roles
from trinity.models.trinity import Trinity
from trinity.optim.groups import Optimizers, build_optimizers
from trinity.optim.schedule import rate_scale
from trinity.parallel.compilation import compile_blocks
from trinity.parallel.mesh import Ranks
from trinity.parallel.recompute import recompute_blocks
from trinity.parallel.sharding import master_dtype, shard_model
from trinity_kernels.expert_engines import ENGINES, check_engine
from trinity_kernels.op import interpreted


def build_model(config: RunConfig, ranks: Ranks) -> Trinity:
    """The model, sharded over the mesh; its values are garbage until initialised or loaded.

    Raises:
        UserError: a kernel or a number format that is asked for and cannot run on this device.
    """
    will_run = ranks.device.type != "meta"  # else it is a plan's, wherever that is made
    if will_run:
        check_kernels(config.kernels, ranks.device)
    with torch.device("meta"):
        model = Trinity(config.model, config.kernels).to(master_dtype(config.precision))
    if config.precision.fp8 != "none" and will_run:
        use_fp8(model, config.precision.fp8, ranks.device)
    if config.recompute != "none":
        recompute_blocks(model, config.recompute)
    if config.compile == "block":
        compile_blocks(model)
    shard_model(model, ranks, config.precision, config.parallel.exchange)
    return model.to_empty(device=ranks.device)


def check_kernels(kernels: Kernels, device: torch.device) -> None:
    """Refuse kernels that were asked for by name and cannot run on a device.

    Raises:
        UserError: naming the setting.
    """
    for name in (field.name for field in fields(kernels)):
        if getattr(kernels, name) == "triton" and device.type != "cuda" and not interpreted():
            raise UserError(f"kernels.{name}=triton needs an NVIDIA GPU; use auto or reference")
    if kernels.experts in ENGINES:
        try:
            check_engine(kernels.experts, device.type)
        except ValueError as error:
            raise UserError(f"kernels.experts={kernels.experts} cannot be used: {error}") from error


def make_optimizers(config: RunConfig, model: Trinity) -> Optimizers:
    """Muon and AdamW over the model's parameters."""
    muon = {field.name: getattr(config.optim.muon, field.name) for field in fields(config.optim.muon)}
    muon["dtype"], muon["kernel"] = getattr(torch, config.optim.muon.dtype), config.kernels.newton_schulz
    adamw = config.optim.adamw
    return build_optimizers(
        parameter_roles(model),
        model.parameters(),
        muon=muon,
        adamw={"lr": adamw.lr, "betas": adamw.betas, "eps": adamw.eps, "weight_decay": adamw.weight_decay},
        router=config.optim.router,
    )


def batch_plan(config: RunConfig) -> BatchPlan:
    """Which sequences make which step."""
    ramp = [(entry.tokens, entry.sequences) for entry in config.batch.ramp]
    return BatchPlan(config.batch.sequences, ramp, config.data.sequence_length)


def total_steps(config: RunConfig) -> int:
    """Length of the run in optimizer steps."""
    if config.run.steps is not None:
        return config.run.steps
    return batch_plan(config).steps_for_tokens(config.run.tokens)


def microbatch_size(share: int, most: int) -> int:
    """The largest divisor of a rank's share of the batch that is at most `most`."""
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def check_batches(config: RunConfig, data_ranks: int) -> None:
    """Refuse global batches that do not divide by the ranks that hold different tokens.

    Raises:
        UserError: naming the nearest batch that does.
    """
    sizes = {"batch.sequences": config.batch.sequences}
    sizes |= {f"batch.ramp[{index}].sequences": entry.sequences for index, entry in enumerate(config.batch.ramp)}
    for key, sequences in sizes.items():
        if sequences % data_ranks:
            nearest = max(data_ranks, round(sequences / data_ranks) * data_ranks)
            raise UserError(f"{key}={sequences} does not divide by {data_ranks} data ranks; use {nearest}")


def rates_at(config: RunConfig, step: int, tokens: int) -> float:
    """Fraction of the peak learning rates for the step that begins after `step` steps and `tokens` tokens."""
    schedule = config.optim.schedule
    by_tokens = schedule.decay_start_tokens is not None
    start = schedule.decay_start_tokens if by_tokens else schedule.decay_start_steps
    length = schedule.decay_tokens if by_tokens else schedule.decay_steps
    if length is None and start is not None:
        whole = config.run.tokens if by_tokens else config.run.steps
        length = max(whole - start, 1) if whole is not None else 1
    return rate_scale(
        step,
        tokens,
        warmup_steps=schedule.warmup_steps,
        decay=schedule.decay,
        decay_start=start or 0,
        decay_length=length or 0,
        final=schedule.final,
        unit="tokens" if by_tokens else "steps",
    )


@dataclass
class RunData:
    """What a run reads.

    stream: this rank's training sequences, in order.
    validation: named held-out sources.
    byte_lengths_V: bytes of text that each token stands for; None without a tokenizer.
    """

    stream: SequenceStream
    validation: dict[str, TokenSource]
    byte_lengths_V: Tensor | None


def open_data(config: RunConfig, ranks: Ranks) -> RunData:
    """Open every source and check that it fits the model and the tokenizer.

    Raises:
        UserError: no training data, a damaged source, another tokenizer, a vocabulary larger than the model's.
    """
    stream = open_stream(config, ranks.rank, ranks.data_ranks)
    validation = _open_sources("validation", config.data.validation, config)
    folder = tokenizer_folder(config)
    return RunData(stream, validation, token_byte_lengths(load_tokenizer(folder)) if folder else None)


def open_stream(config: RunConfig, rank: int, ranks: int) -> SequenceStream:
    """The training sequences of one data rank, from the first on."""
    data = config.data
    if not data.train:
        raise UserError("data.train names no source; give one, as data.train.mine=FOLDER (see tools/prepare_data.py)")
    sources = _open_sources("train", data.train, config)
    return SequenceStream(
        sources,
        dict(data.mixture) or dict.fromkeys(sources, 1.0),
        sequence_length=data.sequence_length,
        streams=data.streams,
        seed=config.run.seed,
        bos_id=next(iter(sources.values())).bos_id,
        plan=batch_plan(config),
        loss_on_document_start=data.loss_on_document_start,
        rank=rank,
        ranks=ranks,
    )


def _open_sources(kind: str, folders: dict[str, str], config: RunConfig) -> dict[str, TokenSource]:
    sources = {}
    for name, folder in folders.items():
        source = sources[name] = TokenSource(Path(folder), config.data.verify)
        _check_source(f"data.{kind}.{name}={folder}", source, config)
    return sources


def _check_source(label: str, source: TokenSource, config: RunConfig) -> None:
    if source.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{label} has token ids up to {source.vocab_size - 1} and model.vocab_size={config.model.vocab_size}; "
            f"use a vocabulary of at least {source.vocab_size}"
        )
    folder = tokenizer_folder(config)
    if folder is not None and fingerprint(folder) != source.tokenizer_fingerprint:
        raise UserError(f"{label} was made with another tokenizer than {folder}; prepare it again with that one")
