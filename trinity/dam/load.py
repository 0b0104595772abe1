"""Open the models of DAM.yaml, and load them into a merged model, sharded or not.

Shapes: N models, I input width.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trinity.config.run import KernelsConfig, PrecisionConfig
from trinity.dam.config import DamConfig
from trinity.dam.model import MergedTrinity, coefficients_of
from trinity.dam.names import bias_places, places
from trinity.errors import UserError
from trinity.interop.tensors import local_part
from trinity.io.checksum import new_hash
from trinity.merging.plan import Plan, make_plan
from trinity.merging.recipe import read_recipe
from trinity.merging.sources import Source
from trinity.merging.tensors import EMBED, HEAD, NORM
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.fsdp import master_dtype, shard_model
from trinity.parallel.mesh import Ranks
from trinity.parallel.one_rank_groups import use_weights_in_place
from trinity.training.build import use_kernels

_IDENTITY_ROWS = 8


def open_models(config: DamConfig) -> Plan:
    """Open the models and check that they fit together, as a linear merge of them would.

    Raises:
        UserError: naming what does not fit.
    """
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": each.model, "parameters": {"weight": 1.0}} for each in config.models],
    }
    if config.base_model is not None:
        recipe["base_model"] = config.base_model
    if config.out_dtype is not None:
        recipe["out_dtype"] = config.out_dtype
    labels = [each.model for each in config.models]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"models lists {twice} twice; list each model once")
    checked = read_recipe(recipe)
    plan = make_plan(replace(checked, text=config.source))
    if plan.vocabulary.rows is not None:
        raise UserError(
            "the models have different tokenizers or rows of tokens, and DAM compares their logits token by token; "
            "merge them first with tools/merge.py and tokenizer: {source: …}, or give models of one tokenizer"
        )
    return plan


def sources_of(plan: Plan, config: DamConfig) -> list[Source]:
    """All models in the order of the config: the N that are mixed, then teachers."""
    return [plan.sources[each.model] for each in config.models]


def identity(source: Source) -> str:
    """A checksum of a few rows of a model: equal for copies of it, another for any other trained model."""
    digest = new_hash()
    for name in (NORM, EMBED, HEAD):
        rows = source.read(name, 0, min(_IDENTITY_ROWS, source.rows(name)))
        digest.update(rows.float().numpy().tobytes())
    return digest.hexdigest()


def build_merged_model(plan: Plan, config: DamConfig, ranks: Ranks) -> MergedTrinity:
    """The merged model, sharded over the mesh; its values are undefined until loaded."""
    kernels, precision = KernelsConfig(), PrecisionConfig(compute=config.compute, reduce="float32")  # type: ignore[arg-type]
    use_kernels(kernels, ranks.device)
    by_column = config.granularity == "column"
    with torch.device("meta"):
        models, teachers = len(config.mixed), len(config.models) - len(config.mixed)
        model = MergedTrinity(plan.donor.config, models, teachers, by_column, config.learn, kernels)
        model = model.to(master_dtype(precision))
    if config.recompute:
        recompute_blocks(model, "block")
    shard_model(model, ranks, precision)
    model.freeze()
    model.to_empty(device=ranks.device)
    use_weights_in_place(model)
    return model


@torch.no_grad()
def load_models(model: MergedTrinity, sources: Iterable[Source]) -> None:
    """Fill the frozen weights; every coefficient becomes 1/N, the mean."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("coefficients"):
            tensor.fill_(1.0 / model.models)
        elif name.endswith((".expert_bias", ".expert_momentum")):
            tensor.zero_()  # not used: the router has all models' biases
    for number, source in enumerate(sources):
        for place in places(model.config):
            _fill(state[f"{place.module}.{place.weight}_{number}"], place.part, source, place.name)
        for name, buffer in bias_places(model.config):
            state[buffer][number].copy_(source.read(name, 0, 1)[0])


@torch.no_grad()
def set_coefficients(model: MergedTrinity, values: dict[str, Tensor]) -> None:
    """Set the coefficients of the tensors that `values` names on disk, each [N, I] or [N, 1]; the others stay."""
    parameters = coefficients_of(model)
    for place in places(model.config):
        if place.name in values:
            part = local_part(parameters[f"{place.module}.{place.coefficients}"].detach(), (place.row,))
            if part is not None:
                part[0].copy_(values[place.name].expand(part[0].shape))


def _fill(weight: Tensor, index: tuple[int | slice, ...], source: Source, name: str) -> None:
    """weight[index] = the source's tensor, for the rows of this rank's shard."""
    part = local_part(weight, index)
    if part is None:
        return
    view, where = part
    if len(where) == 1:  # a vector is one row of the source
        view.copy_(source.read(name, 0, 1)[0][where[0]])
    else:
        view.copy_(source.read(name, where[0].start, where[0].stop)[:, where[1]])
