"""Load a source of a merge, a folder or a run's checkpoint, as a model to evaluate."""

import torch

from trinity.interop.weight_map import weight_map
from trinity.merging.sources import Source
from trinity.models.trinity import Trinity


def load_model(source: Source) -> Trinity:
    """The model of a source, in fp32 on the CPU; its expert_momentum is 0.

    The tensors are those that load_hf reads from the source's export; experts may be stored as stacks, too.

    Raises:
        UserError: a file changed since the source was opened.
    """
    with torch.device("meta"):
        empty = Trinity(source.config)
    model = empty.to_empty(device="cpu")
    state = model.state_dict()
    for name, parameter, index in weight_map(source.config):
        part = state[parameter][index]
        part.copy_(source.read(name, 0, source.rows(name)).view(part.shape))
    for name, tensor in state.items():
        if name.endswith(".expert_momentum"):
            tensor.zero_()
    return model
