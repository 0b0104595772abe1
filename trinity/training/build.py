"""Build what a config describes: the model, the optimizers, the batch plan. Data: build_data.py."""

from dataclasses import fields
from typing import Literal

import torch

from trinity.config.phases import resolved_phases
from trinity.config.run import KernelsConfig, RunConfig
from trinity.data.stream.batch_schedule import BatchHistory, BatchPlan
from trinity.errors import UserError
from trinity.models.fp8 import use_fp8
from trinity.models.freeze import freeze
from trinity.models.param_roles import parameter_roles
from trinity.models.trinity import Trinity
from trinity.optim.build import Optimizers, build_optimizers
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.collectives import run_on_rank0
from trinity.parallel.compilation import compile_blocks
from trinity.parallel.fsdp import master_dtype, shard_model
from trinity.parallel.mesh import Ranks
from trinity.parallel.one_rank_groups import use_weights_in_place
from trinity_kernels.expert_engines import ENGINES, check_engine
from trinity_kernels.linear import fastest_fp32_products, has_onednn, set_fp32_products
from trinity_kernels.op import interpreted


def build_model(config: RunConfig, ranks: Ranks) -> Trinity:
    """The model, sharded over the mesh; its values are undefined until initialised or loaded.

    Raises:
        UserError: the config names a kernel or a number format that cannot run on this device, or modules to train
            that the model does not have.
    """
    will_run = ranks.device.type != "meta"  # planning builds the model of another machine
    if will_run:
        use_kernels(config.kernels, ranks.device)
    with torch.device("meta"):
        model = Trinity(config.model, config.kernels).to(master_dtype(config.precision))
    if config.precision.fp8 != "none" and will_run:
        use_fp8(model, config.precision.fp8, ranks.device)
    freeze(model, config.train)
    if config.recompute != "none":
        recompute_blocks(model, config.recompute, will_compile=config.compile != "none")
    if config.compile == "block":
        compile_blocks(model)
    shard_model(model, ranks, config.precision, config.parallel.exchange)
    model.to_empty(device=ranks.device)
    use_weights_in_place(model)
    return model


def trained_count(config: RunConfig) -> int:
    """The number of parameters that are trained.

    Raises:
        UserError: the `train` section does not fit the model.
    """
    with torch.device("meta"):
        model = Trinity(config.model)
    freeze(model, config.train)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def use_kernels(kernels: KernelsConfig, device: torch.device) -> None:
    """Refuse kernels that cannot run on a device, and take rank 0's choice of fp32 products on every rank.

    Raises:
        UserError: naming the setting.
    """
    check_kernels(kernels, device)
    set_fp32_products(run_on_rank0(fp32_products, kernels, device))


def fp32_products(kernels: KernelsConfig, device: torch.device) -> Literal["torch", "onednn"]:
    """The implementation of fp32 products that kernels.linear names, or the fastest one for `auto`."""
    if kernels.linear == "auto":
        return fastest_fp32_products() if device.type == "cpu" else "torch"
    return kernels.linear


def check_kernels(kernels: KernelsConfig, device: torch.device) -> None:
    """Refuse kernels that the config names and that cannot run on a device.

    Raises:
        UserError: naming the setting.
    """
    for name in (field.name for field in fields(kernels)):
        if getattr(kernels, name) == "triton" and device.type != "cuda" and not interpreted():
            raise UserError(f"kernels.{name}=triton needs an NVIDIA GPU; use auto or reference")
    if kernels.linear == "onednn" and not has_onednn():
        raise UserError("kernels.linear=onednn cannot be used: this torch has no product of oneDNN; use auto or torch")
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


def batch_plan(config: RunConfig, history: BatchHistory = BatchHistory()) -> BatchPlan:  # noqa: B008 (immutable)
    """The batch of each step: those of `history` are made, and the config's follow."""
    ramp = [(entry.tokens, entry.sequences) for entry in config.batch.ramp]
    phases = [(phase.tokens, phase.sequence_length) for phase in resolved_phases(config.data)[1:]]
    return BatchPlan(config.batch.sequences, ramp, config.data.sequence_length, phases, history)


def total_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Number of optimizer steps of the whole run."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.tokens is not None  # the config is refused without either
    return plan.steps_for_tokens(config.run.tokens)
