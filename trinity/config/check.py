"""Check the values of a run: bounds of single values, and combinations that do not fit together.

Each refusal names the value and what to write instead. Types are checked before, while loading (trinity.config.load).
"""

import math
from operator import attrgetter
from typing import Any

from trinity.config.model import check_size
from trinity.config.paths import kept_tokenizer, run_directory, tokenizer_folder
from trinity.config.run import LengthBiasConfig, RunConfig
from trinity.errors import UserError

BOUNDS: dict[str, tuple[float, float | None]] = {
    "run.steps": (0, None),
    "run.tokens": (1, None),
    "run.threads": (1, 4096),
    "init.step": (1, None),
    "data.sequence_length": (1, 1 << 27),
    "data.streams": (1, 1 << 24),
    "data.rsdb_size": (1, 1 << 24),
    "data.best_fit_rows": (1, 1 << 16),
    "data.workers": (0, 1024),
    "batch.sequences": (1, 1 << 24),
    "batch.microbatch": (1, 1 << 24),
    "optim.muon.lr": (0, None),
    "optim.muon.steps": (1, 100),
    "optim.muon.weight_decay": (0, None),
    "optim.adamw.lr": (0, None),
    "optim.adamw.eps": (0, None),
    "optim.adamw.weight_decay": (0, None),
    "optim.clip_norm": (0, None),
    "optim.schedule.warmup_steps": (0, None),
    "optim.schedule.decay_start_tokens": (0, None),
    "optim.schedule.decay_start_steps": (0, None),
    "optim.schedule.decay_tokens": (0, None),
    "optim.schedule.decay_steps": (0, None),
    "optim.schedule.final": (0, None),
    "balancing.rate": (0, None),
    "balancing.kappa": (0, None),
    "balancing.gamma": (0, None),
    "balancing.sequence_loss": (0, None),
    "loss.z": (0, None),
    "checkpoint.every": (0, None),
    "checkpoint.keep": (1, None),
    "checkpoint.keep_every": (0, None),
    "checkpoint.average.every": (1, None),
    "checkpoint.average.window": (2, 1024),
    "export.every": (0, None),
    "evaluation.every": (0, None),
    "evaluation.sequences": (1, None),
    "evaluation.sample_tokens": (1, 1 << 20),
    "evaluation.needles.samples": (1, 1 << 20),
    "log.every": (1, None),
    "log.het_sequences": (1, None),
    "log.router_every": (0, None),
    "log.norms_every": (0, None),
    "log.probe_every": (0, None),
    "health.bad_steps": (1, None),
    "health.heartbeat_seconds": (0, 10**7),
    "health.spike.sigma": (1, None),
    "health.spike.window": (2, 1024),
    "health.rollbacks": (0, None),
    "health.violation_factor": (0, None),
    "health.dead_steps": (0, None),
    "health.slow_factor": (0, None),
}
"""Key → smallest and largest allowed value; None: no largest one. NaN is refused. The largest values are far above
any real run: they refuse typing errors that would take all memory or never end."""

MOST_PROFILED = 1000
"""Most steps in one range of profile.steps: each makes a trace of megabytes, so a longer range is a typing error."""


def check_run(config: RunConfig) -> None:
    """Refuse values that are out of bounds or do not fit together.

    Raises:
        UserError: naming the value and what to write instead.
    """
    _check_entries(config)
    _check_bounds(config)
    check_size(config.model)
    _check_length(config)
    _check_schedule(config)
    _check_data(config)
    _check_prompts(config)
    _check_needles(config)
    _check_average(config)
    _check_forgetting(config)
    _check_profile(config)
    if config.init.hf and config.init.run:
        raise UserError("init.hf and init.run are both given; keep the one the run should start from")
    if config.compile != "none" and config.recompute != "none":
        raise UserError(
            f"compile={config.compile} with recompute={config.recompute} would compile nothing, because compiled code "
            "cannot say what recompute keeps; use compile=none or recompute=none"
        )
    if config.precision.compute == "float64" and config.optim.muon.dtype == "bfloat16":
        raise UserError(
            "precision.compute=float64 with optim.muon.dtype=bfloat16 is not a float64 run; "
            "use optim.muon.dtype=float64"
        )
    if config.precision.fp8 != "none" and config.precision.compute != "bfloat16":
        raise UserError(
            f"precision.fp8={config.precision.fp8} rounds bfloat16 to 8 bits and precision.compute="
            f"{config.precision.compute}; use precision.compute=bfloat16 or precision.fp8=none"
        )


def _check_bounds(config: RunConfig) -> None:
    for key, (least, most) in BOUNDS.items():
        value: float | None = attrgetter(key)(config)
        if value is None:
            continue
        if not value >= least:
            raise UserError(f"{key}={value} must be at least {least}")
        if value == math.inf:
            raise UserError(f"{key}={value} must be finite")
        if most is not None and value > most:
            raise UserError(f"{key}={value} must be at most {most}")
    decays = {"optim.muon.momentum": config.optim.muon.momentum, "balancing.beta": config.balancing.beta}
    decays |= {f"optim.adamw.betas[{index}]": beta for index, beta in enumerate(config.optim.adamw.betas)}
    for key, decay in decays.items():
        if not 0 <= decay < 1:
            raise UserError(f"{key}={decay} must be at least 0 and less than 1")


def _check_entries(config: RunConfig) -> None:
    """Refuse what omegaconf accepts: lists and maps in place of a single entry, and empty names."""
    data = config.data
    lists: dict[str, Any] = {
        "evaluation.prompts": config.evaluation.prompts,
        "evaluation.needles.lengths": config.evaluation.needles.lengths,
        "evaluation.needles.kinds": config.evaluation.needles.kinds,
        "profile.ranks": config.profile.ranks,
        "optim.adamw.betas": config.optim.adamw.betas,
        "train.only": config.train.only,
    }
    maps: dict[str, Any] = {"data.train": data.train, "data.validation": data.validation, "data.mixture": data.mixture}
    maps["health.forgetting"] = config.health.forgetting
    maps |= {f"data.phases[{index}].mixture": phase.mixture for index, phase in enumerate(data.phases)}
    entries = [(f"{key}[{index}]", value) for key, values in lists.items() for index, value in enumerate(values)]
    entries += [(f"{key}.{name}", value) for key, values in maps.items() for name, value in values.items()]
    for key, value in entries:
        if isinstance(value, list | dict):
            raise UserError(f"{key}={value} is a {type(value).__name__}; write a single value")
    for key, folders in {"data.train": data.train, "data.validation": data.validation}.items():
        for name, folder in folders.items():
            if not name or not folder:
                raise UserError(f"{key} has {name!r}: {folder!r}, and neither may be empty; write NAME: FOLDER")
    if not config.run.dir and not config.run.name.strip("./ "):
        raise UserError(
            f"run.name={config.run.name!r} names no folder below runs/; give the run a name, or set run.dir"
        )


def _check_length(config: RunConfig) -> None:
    steps, tokens = config.run.steps, config.run.tokens
    if (steps is None) == (tokens is None):
        given = "neither is" if steps is None else "both are"
        raise UserError(f"the length of the run is run.steps or run.tokens, and {given} given; set exactly one")
    last, (least, most) = 0, _both_bounds("batch.sequences")
    for entry in config.batch.ramp:
        if entry.tokens <= last or not least <= entry.sequences <= most:
            raise UserError(
                f"batch.ramp has {{tokens: {entry.tokens}, sequences: {entry.sequences}}} after {last} tokens; "
                f"each entry must begin later than the one before it and have at least 1 sequence, at most {most}"
            )
        last = entry.tokens


def _both_bounds(key: str) -> tuple[float, float]:
    least, most = BOUNDS[key]
    return least, math.inf if most is None else most


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
    has_start = schedule.decay_start_tokens is not None or schedule.decay_start_steps is not None
    if schedule.decay != "none" and not has_start:
        raise UserError(
            f"optim.schedule.decay={schedule.decay} has no start; set decay_start_tokens or decay_start_steps"
        )
    length = schedule.decay_tokens if schedule.decay_start_tokens is not None else schedule.decay_steps
    run_length = config.run.tokens if schedule.decay_start_tokens is not None else config.run.steps
    if schedule.decay != "none" and length is None and run_length is None:
        raise UserError(
            "optim.schedule gives no length of decay and the run's length is in another unit; "
            "set decay_tokens or decay_steps"
        )


def _check_data(config: RunConfig) -> None:
    data, weighted = config.data, set(config.data.mixture)
    _check_mixture("data.mixture", data.mixture, data.train)
    _check_length_bias("data.length_bias", data.length_bias)
    last = 0
    for index, phase in enumerate(data.phases):
        key = f"data.phases[{index}]"
        if phase.tokens <= last:
            raise UserError(f"{key}.tokens={phase.tokens} does not come after {last}; a phase must begin later")
        last = phase.tokens
        for name in ("sequence_length", "rsdb_size"):
            value, (least, most) = getattr(phase, name), _both_bounds(f"data.{name}")
            if value is not None and not least <= value <= most:
                bound = f"least {least}" if value < least else f"most {most}"
                raise UserError(f"{key}.{name}={value} must be at {bound}")
        _check_mixture(f"{key}.mixture", phase.mixture, data.train)
        if phase.length_bias is not None:
            _check_length_bias(f"{key}.length_bias", phase.length_bias)
        weighted |= set(phase.mixture)
    missing = sorted(set(data.train) - weighted) if data.mixture else []
    if missing:
        raise UserError(f"data.mixture gives {missing[0]} no weight; add one, 0 to leave it out")
    _check_best_fit(config)


def _check_best_fit(config: RunConfig) -> None:
    data = config.data
    packings = {"data.packing": data.packing}
    packings |= {
        f"data.phases[{index}].packing": phase.packing or data.packing for index, phase in enumerate(data.phases)
    }
    other = next((key for key, packing in packings.items() if packing != "best_fit"), None)
    if "best_fit" in packings.values() and other is not None:
        raise UserError(
            f"{other}={packings[other]}, and another phase of the run packs by best_fit, which takes whole documents; "
            "use best_fit in all phases or in none"
        )
    if data.packing == "best_fit" and not data.document_mask:
        raise UserError(
            "data.packing=best_fit puts examples side by side that must not see each other; set data.document_mask=true"
        )
    if config.loss.per == "example" and data.packing != "best_fit":
        raise UserError(
            f"loss.per=example is a mean over whole examples, and data.packing={data.packing} splits them; "
            "use data.packing=best_fit or loss.per=token"
        )


def _check_prompts(config: RunConfig) -> None:
    if config.evaluation.prompts and not _has_tokenizer(config):
        raise UserError("evaluation.prompts are texts and there is no tokenizer; set data.tokenizer, or leave them out")


def _has_tokenizer(config: RunConfig) -> bool:
    # the tokenizer of init.run is looked up when the run starts
    return bool(tokenizer_folder(config) or config.init.run or kept_tokenizer(run_directory(config)))


def _check_needles(config: RunConfig) -> None:
    needles, validation = config.evaluation.needles, config.data.validation
    if not needles.lengths:
        return
    if not config.evaluation.every:
        raise UserError(
            "evaluation.needles.lengths are scored at each evaluation, and evaluation.every=0 makes none; set "
            "evaluation.every, or evaluation.needles.lengths=[]"
        )
    if not _has_tokenizer(config):
        raise UserError("evaluation.needles are texts and there is no tokenizer; set data.tokenizer, or leave them out")
    if unknown := sorted(set(needles.kinds) - {1, 2, 3}):
        raise UserError(f"evaluation.needles.kinds names {unknown[0]}, which is no kind of needles; use 1, 2 or 3")
    if not needles.kinds:
        raise UserError("evaluation.needles.kinds is empty; use [1], [2] or [3], or several of them")
    for length in needles.lengths:
        if not 1 <= length <= config.model.max_positions:
            raise UserError(
                f"evaluation.needles.lengths has {length}, and the model has {config.model.max_positions} positions "
                "(model.max_positions); use lengths from 1 up to that"
            )
    for name, values in {"lengths": needles.lengths, "kinds": needles.kinds}.items():
        if len(set(values)) < len(values):
            raise UserError(f"evaluation.needles.{name}={list(values)} repeats a value; name each once")
    if needles.haystack is not None and needles.haystack not in validation:
        raise UserError(
            f"evaluation.needles.haystack={needles.haystack} is no set of data.validation (known: "
            f"{sorted(validation)}); name one of them"
        )
    if 1 in needles.kinds and not validation:
        raise UserError(
            "evaluation.needles of kind 1 are hidden in the text of a set of data.validation, which has none; add one, "
            "or set evaluation.needles.kinds=[2,3]"
        )


def _check_average(config: RunConfig) -> None:
    average, saved = config.checkpoint.average, config.checkpoint.every
    if average.every is None:
        return
    if not saved or average.every % saved:
        raise UserError(
            f"checkpoint.average.every={average.every} is not a multiple of checkpoint.every={saved}, and the average "
            f"is made of checkpoints; use {_multiple(average.every, saved)}"
        )
    if not config.evaluation.every or not config.data.validation:
        lacking = "data.validation is empty" if config.evaluation.every else "evaluation.every=0"
        raise UserError(
            f"checkpoint.average is for evaluations on data.validation, and {lacking}; set it, or leave "
            "checkpoint.average.every out"
        )
    first = average.every * average.window
    if config.run.steps is not None and first > config.run.steps:
        raise UserError(
            f"checkpoint.average.every={average.every} × window={average.window} is step {first}, before which there "
            f"is no average, and the run ends at run.steps={config.run.steps}; lower checkpoint.average.every or "
            "checkpoint.average.window"
        )


def _multiple(every: int, saved: int) -> str:
    """The setting that makes checkpoint.average.every a multiple of checkpoint.every."""
    if not saved:
        return f"checkpoint.every={every}"
    return f"checkpoint.average.every={math.ceil(every / saved) * saved}"


def _check_forgetting(config: RunConfig) -> None:
    budgets, validation = config.health.forgetting, config.data.validation
    if not budgets:
        return
    if not (config.init.hf or config.init.run):
        raise UserError(
            "health.forgetting is for a model that init continues, and neither init.hf nor init.run is given; set one, "
            "or leave health.forgetting out"
        )
    if not config.evaluation.every:
        raise UserError(
            "health.forgetting is checked at each evaluation, and evaluation.every=0 makes none; set evaluation.every, "
            "or leave health.forgetting out"
        )
    for name, budget in budgets.items():
        if name not in validation:
            raise UserError(
                f"health.forgetting names {name}, which is no set of data.validation (known: {sorted(validation)}); "
                "name one of them"
            )
        if not 0 < budget < math.inf:
            raise UserError(
                f"health.forgetting.{name}={budget} must be above 0 and finite: it is the nats per token by which the "
                "loss may rise, such as 0.1"
            )


def _check_profile(config: RunConfig) -> None:
    steps = profiled_steps(config.profile.steps)
    if config.run.steps is not None:  # with run.tokens the trainer checks: it knows the number of steps
        check_last_step(steps, config.run.steps)
    if any(rank < 0 for rank in config.profile.ranks):
        raise UserError(f"profile.ranks={list(config.profile.ranks)} names a rank below 0; ranks count from 0")


def _check_mixture(key: str, mixture: dict[str, float], train: dict[str, str]) -> None:
    unknown = sorted(set(mixture) - set(train))
    if unknown:
        weights = f"{{{', '.join(f'{name}: 1' for name in sorted(train))}}}"
        setting = f"mixture: {weights}" if "[" in key else f"'{key}={weights}'"  # an entry of a list, or a setting
        mend = f"; write {setting}" if train else ""
        raise UserError(f"{key} names {unknown[0]}, which data.train does not (known: {sorted(train)}){mend}")
    valid = all(0 <= weight < math.inf for weight in mixture.values())
    if not valid or (mixture and not 0 < sum(mixture.values()) < math.inf):
        raise UserError(f"{key}={dict(mixture)} must hold weights of at least 0, one of them above 0")


def _check_length_bias(key: str, bias: LengthBiasConfig) -> None:
    if bias.tokens < 1 or not 0 < bias.floor <= bias.ceiling <= 1:
        raise UserError(
            f"{key} has tokens={bias.tokens}, floor={bias.floor}, ceiling={bias.ceiling}; "
            "tokens must be at least 1, and 0 < floor <= ceiling <= 1"
        )


def profiled_steps(value: Any) -> list[int]:
    """The steps that profile.steps names, each once, ascending, counted from 1; empty for None.

    Args:
        value: 10, "10-12" (first to last), or a list of either.
    Raises:
        UserError: any other value, or a step below 1.
    """
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return sorted({step for part in parts for step in _step_range(part)})


def check_last_step(steps: list[int], total: int) -> None:
    """Refuse steps to profile beyond the run's last one, `total`.

    Raises:
        UserError: naming the first of them.
    """
    late = [step for step in steps if step > total]
    if late:
        raise UserError(f"profile.steps names step {late[0]} and the run ends with step {total}; name earlier ones")


def _step_range(part: Any) -> range:
    first, dash, last = str(part).partition("-")
    if (
        isinstance(part, bool)
        or len(str(part)) > 40
        or not first.strip().isdecimal()
        or (dash and not last.strip().isdecimal())
    ):
        raise UserError(f"profile.steps={part} is not a step; write 10, 10-12, or a list such as [10, 20-22]")
    begin, end = int(first), int(last if dash else first)
    if not 1 <= begin <= end:
        raise UserError(f"profile.steps={part} names no step; steps count from 1, the first one first")
    if end - begin >= MOST_PROFILED:
        raise UserError(f"profile.steps={part} is {end - begin + 1} steps; ask for at most {MOST_PROFILED}")
    return range(begin, end + 1)
