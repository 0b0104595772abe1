"""What must hold between the values of a run, each failure with its mend. Single values are checked by their type."""

import math

from trinity.config.paths import tokenizer_folder
from trinity.config.profiled import check_last_step, profiled_steps
from trinity.config.run import LengthBias, RunConfig
from trinity.errors import UserError


def check_run(config: RunConfig) -> None:
    """Refuse a run whose values do not fit together.

    Raises:
        UserError: naming the value and what to write instead.
    """
    _check_positive(config)
    _check_length(config)
    _check_schedule(config)
    _check_data(config)
    _check_prompts(config)
    _check_profile(config)
    if config.init.hf and config.init.run:
        raise UserError("init.hf and init.run are both given; keep the one the run should start from")
    if config.compile != "none" and config.recompute != "none":
        raise UserError(
            f"compile={config.compile} with recompute={config.recompute} would compile nothing, because compiled code "
            "cannot say what recompute keeps; use compile=none or recompute=none"
        )
    if config.precision.compute == "float64" and config.optim.muon.dtype == "bfloat16":
        raise UserError("precision.compute=float64 with optim.muon.dtype=bfloat16 is not a float64 run; use float64")
    if config.precision.fp8 != "none" and config.precision.compute != "bfloat16":
        raise UserError(
            f"precision.fp8={config.precision.fp8} rounds bfloat16 to 8 bits and precision.compute="
            f"{config.precision.compute}; use precision.compute=bfloat16 or precision.fp8=none"
        )


def _check_positive(config: RunConfig) -> None:
    at_least = {
        "data.sequence_length": (config.data.sequence_length, 1),
        "data.streams": (config.data.streams, 1),
        "data.rsdb_size": (config.data.rsdb_size, 1),
        "data.workers": (config.data.workers, 0),
        "batch.sequences": (config.batch.sequences, 1),
        "batch.microbatch": (config.batch.microbatch, 1),
        "optim.muon.lr": (config.optim.muon.lr, 0),
        "optim.muon.steps": (config.optim.muon.steps, 1),
        "optim.muon.weight_decay": (config.optim.muon.weight_decay, 0),
        "optim.adamw.lr": (config.optim.adamw.lr, 0),
        "optim.adamw.weight_decay": (config.optim.adamw.weight_decay, 0),
        "optim.clip_norm": (config.optim.clip_norm, 0),
        "optim.schedule.warmup_steps": (config.optim.schedule.warmup_steps, 0),
        "optim.schedule.final": (config.optim.schedule.final, 0),
        "balancing.sequence_loss": (config.balancing.sequence_loss, 0),
        "loss.z": (config.loss.z, 0),
        "checkpoint.every": (config.checkpoint.every, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "checkpoint.keep_every": (config.checkpoint.keep_every, 0),
        "export.every": (config.export.every, 0),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.sequences": (config.evaluation.sequences, 1),
        "evaluation.sample_tokens": (config.evaluation.sample_tokens, 1),
        "log.every": (config.log.every, 1),
        "log.het_sequences": (config.log.het_sequences, 1),
        "log.router_every": (config.log.router_every, 0),
        "log.norms_every": (config.log.norms_every, 0),
        "log.probe_every": (config.log.probe_every, 0),
        "health.bad_steps": (config.health.bad_steps, 1),
        "health.heartbeat_seconds": (config.health.heartbeat_seconds, 0),
        "health.spike.sigma": (config.health.spike.sigma, 1),
        "health.spike.window": (config.health.spike.window, 2),
        "health.violation_factor": (config.health.violation_factor, 0),
        "health.dead_steps": (config.health.dead_steps, 0),
        "health.slow_factor": (config.health.slow_factor, 0),
    }
    for key, (value, least) in at_least.items():
        if not value >= least:
            raise UserError(f"{key}={value} must be at least {least}")
        if value == math.inf:
            raise UserError(f"{key}={value} must be finite")
    if config.health.spike.window > 1024:
        raise UserError(f"health.spike.window={config.health.spike.window} must be at most 1024")
    if config.run.threads is not None and config.run.threads < 1:
        raise UserError(f"run.threads={config.run.threads} must be at least 1")
    beta = {"optim.muon.momentum": config.optim.muon.momentum, "balancing.beta": config.balancing.beta}
    for index, value in enumerate(config.optim.adamw.betas):
        beta[f"optim.adamw.betas[{index}]"] = value
    for key, value in beta.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}={value} must be at least 0 and less than 1")


def _check_length(config: RunConfig) -> None:
    steps, tokens = config.run.steps, config.run.tokens
    if (steps is None) == (tokens is None):
        given = "neither is" if steps is None else "both are"
        raise UserError(f"the length of the run is run.steps or run.tokens, and {given} given; set exactly one")
    if steps is not None and steps < 0:
        raise UserError(f"run.steps={steps} must be at least 0")
    if tokens is not None and tokens < 1:
        raise UserError(f"run.tokens={tokens} must be at least 1")
    last = 0
    for entry in config.batch.ramp:
        if entry.tokens <= last or entry.sequences < 1:
            raise UserError(
                f"batch.ramp has {{tokens: {entry.tokens}, sequences: {entry.sequences}}} after {last} tokens; "
                "each entry must begin later than the one before it and have at least 1 sequence"
            )
        last = entry.tokens


def _check_schedule(config: RunConfig) -> None:
    schedule = config.optim.schedule
    for name in ("start", "length"):
        key = "decay_start" if name == "start" else "decay"
        by_tokens, by_steps = getattr(schedule, f"{key}_tokens"), getattr(schedule, f"{key}_steps")
        if by_tokens is not None and by_steps is not None:
            raise UserError(f"optim.schedule.{key}_tokens and .{key}_steps are both given; keep one")
    units = {
        unit for unit in ("tokens", "steps")
        if getattr(schedule, f"decay_start_{unit}") is not None or getattr(schedule, f"decay_{unit}") is not None
    }  # fmt: skip
    if len(units) > 1:
        raise UserError("optim.schedule mixes decay in tokens with decay in steps; write both in one unit")
    started = schedule.decay_start_tokens is not None or schedule.decay_start_steps is not None
    if schedule.decay != "none" and not started:
        raise UserError(
            f"optim.schedule.decay={schedule.decay} has no beginning; set decay_start_tokens or decay_start_steps"
        )
    length = schedule.decay_tokens if schedule.decay_start_tokens is not None else schedule.decay_steps
    whole = config.run.tokens if schedule.decay_start_tokens is not None else config.run.steps
    if schedule.decay != "none" and length is None and whole is None:
        raise UserError(
            "optim.schedule gives no length of decay and the run's length is in another unit; "
            "set decay_tokens or decay_steps"
        )


def _check_data(config: RunConfig) -> None:
    data, named = config.data, set(config.data.mixture)
    _check_mixture("data.mixture", data.mixture, data.train)
    _check_bias("data.length_bias", data.length_bias)
    last = 0
    for index, phase in enumerate(data.phases):
        key = f"data.phases[{index}]"
        if phase.tokens <= last:
            raise UserError(f"{key}.tokens={phase.tokens} does not come after {last}; a phase must begin later")
        last = phase.tokens
        for name in ("sequence_length", "rsdb_size"):
            value = getattr(phase, name)
            if value is not None and value < 1:
                raise UserError(f"{key}.{name}={value} must be at least 1")
        _check_mixture(f"{key}.mixture", phase.mixture, data.train)
        if phase.length_bias is not None:
            _check_bias(f"{key}.length_bias", phase.length_bias)
        named |= set(phase.mixture)
    forgotten = sorted(set(data.train) - named) if data.mixture else []
    if forgotten:
        raise UserError(f"data.mixture gives {forgotten[0]} no weight; add one, 0 to leave it out")


def _check_prompts(config: RunConfig) -> None:
    if config.evaluation.prompts and tokenizer_folder(config) is None:
        raise UserError("evaluation.prompts are texts and there is no tokenizer; set data.tokenizer, or leave them out")


def _check_profile(config: RunConfig) -> None:
    steps = profiled_steps(config.profile.steps)
    if config.run.steps is not None:  # else the trainer checks, which knows how many steps make run.tokens
        check_last_step(steps, config.run.steps)
    if any(rank < 0 for rank in config.profile.ranks):
        raise UserError(f"profile.ranks={list(config.profile.ranks)} names a rank below 0; ranks count from 0")


def _check_mixture(key: str, mixture: dict[str, float], train: dict[str, str]) -> None:
    unknown = sorted(set(mixture) - set(train))
    if unknown:
        raise UserError(f"{key} names {unknown[0]}, which data.train does not; known: {sorted(train)}")
    weights = mixture.values()
    if any(not 0 <= weight < math.inf for weight in weights) or (weights and sum(weights) <= 0):
        raise UserError(f"{key}={dict(mixture)} must hold weights of at least 0, one of them above 0")


def _check_bias(key: str, bias: LengthBias) -> None:
    if bias.tokens < 1 or not 0 < bias.floor <= bias.ceiling <= 1:
        raise UserError(
            f"{key} has tokens={bias.tokens}, floor={bias.floor}, ceiling={bias.ceiling}; "
            "tokens must be at least 1, and 0 < floor <= ceiling <= 1"
        )
