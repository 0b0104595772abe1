"""Load a source of a merge, a folder or a run's checkpoint, as a model to evaluate."""

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.interop.weight_map import weight_map
from trinity.merging.sources import Source
from trinity.models.trinity import Trinity


def load_model(source: Source) -> Trinity:
    """The model of a source, in fp32 on the CPU; its expert_momentum is 0.

    The tensors are those that load_hf reads from the source's export; experts may be stored as stacks, too.

    Raises:
        UserError: a file changed since the source was opened.
    """
    model = empty_model(source.config)
    for name, part in parts_of(model).items():
        part.copy_(source.read(name, 0, source.rows(name)).view(part.shape))
    return model


def empty_model(config: ModelConfig) -> Trinity:
    """A model in fp32 on the CPU whose weights are not set; its expert_momentum is 0."""
    with torch.device("meta"):
        empty = Trinity(config)
    model = empty.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if name.endswith(".expert_momentum"):
            tensor.zero_()
    return model


def parts_of(model: Trinity) -> dict[str, Tensor]:
    """Name on disk → view of its part of a parameter or buffer, for every tensor of a model."""
    state = model.state_dict()
    return {name: state[parameter][index] for name, parameter, index in weight_map(model.config)}
