"""Check that a run can start on this machine, before its directory is made: engines, packages, paths, batches."""

from importlib.util import find_spec

import torch

from trinity.config.paths import check_paths, run_directory
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.io.remote import filesystem
from trinity.models.attention_backends import pick_engine
from trinity.models.fp8 import use_fp8
from trinity.models.trinity import Trinity
from trinity.parallel.deep_ep import check_deep_ep
from trinity.parallel.mesh import Ranks
from trinity.training.build import check_kernels
from trinity.training.divisibility import check_batches


def check_prerequisites(config: RunConfig, ranks: Ranks) -> None:
    """Refuse a run that cannot start here; writes no file and does not communicate.

    Raises:
        UserError: naming the setting and what to write or install.
    """
    check_batches(config, ranks.data_ranks)
    fresh = not (run_directory(config) / "config.yaml").is_file()
    check_init(config, fresh)
    check_prompts(config)
    check_paths(config, fresh)
    check_remote_paths(config)
    check_engines(config, ranks.device)
    if ranks.is_first:
        check_loggers(config)


def check_init(config: RunConfig, fresh: bool) -> None:
    """Refuse a new run with init.keep and no run to take it from: it would begin with random weights.

    Args:
        fresh: whether the run has not been started yet.
    Raises:
        UserError: what to give.
    """
    init = config.init
    if fresh and init.keep != "weights" and not init.run:
        raise UserError(
            f"init.keep={init.keep} says what to load from another run, and init.run is not given; add "
            "init.run=RUN_DIR, or leave init.keep out"
        )


def check_prompts(config: RunConfig) -> None:
    """Refuse prompts that no evaluation would continue.

    It is checked at a start, and not when a config is loaded: an older run may have such a config.

    Raises:
        UserError: what to set.
    """
    if config.evaluation.prompts and not config.evaluation.every:
        raise UserError(
            "evaluation.prompts are continued at each evaluation, and evaluation.every=0 makes none; set "
            "evaluation.every, or leave evaluation.prompts out"
        )


def check_engines(config: RunConfig, device: torch.device) -> None:
    """Refuse engines that the config names and that are not installed or cannot run on a device.

    Raises:
        UserError: naming the setting.
    """
    check_kernels(config.kernels, device)
    dtype, attention, fp8 = getattr(torch, config.precision.compute), config.kernels.attention, config.precision.fp8
    pick_engine(attention, device.type, dtype)
    if attention == "flex" and device.type != "cuda":
        raise UserError(f"kernels.attention=flex trains on an NVIDIA GPU only, not on {device.type}; use auto")
    if config.parallel.exchange == "deep_ep" and config.parallel.expert > 1:
        check_deep_ep(dtype, device.type)
    if fp8 != "none":
        with torch.device("meta"):
            use_fp8(Trinity(config.model), fp8, device)


def check_remote_paths(config: RunConfig) -> None:
    """Refuse URLs whose file system needs a package that is not installed.

    Raises:
        UserError: naming the setting.
    """
    paths: dict[str, str | None] = {f"data.train.{name}": path for name, path in config.data.train.items()}
    paths |= {f"data.validation.{name}": path for name, path in config.data.validation.items()}
    paths["checkpoint.url"] = config.checkpoint.url
    for key, path in paths.items():
        if path and "://" in path:
            try:
                filesystem(path)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None


def check_loggers(config: RunConfig) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        UserError: naming the setting and the command that installs it.
    """
    for key, package, enabled in (
        ("log.wandb", "wandb", config.log.wandb),
        ("log.tensorboard", "tensorboard", config.log.tensorboard),
    ):
        if enabled and find_spec(package) is None:
            raise UserError(f'{key} needs {package}; install it: pip install "trinity-moe[{package}]", or leave it out')
