"""Load a Hugging Face AfMoE folder into a Trinity model, without trusting the folder.

Only safetensors files are read, never a pickle, and only files in the folder itself or in the blobs of the Hugging Face
cache that it belongs to. All names and shapes are compared with the config before memory is allocated or weights are
read. Tensors are then streamed; a rank of a sharded model reads only the rows of its shard.
"""

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.config.hf_config import architecture, read_hf_config
from trinity.config.model import ModelConfig, check_size
from trinity.errors import UserError
from trinity.interop.tensors import local_part, part_shape, storage_dtypes
from trinity.interop.weight_files import weight_files
from trinity.interop.weight_map import Index, weight_map
from trinity.models.trinity import Trinity

_FLOATING = ("F64", "F32", "BF16", "F16")
_LISTED = 3  # most tensors that a message names

_Sources = dict[str, Any]
"""Name on disk → the tensor's slice in an open file: shape and data type are known, the values still on disk."""


def load_hf(directory: str | Path, into: Trinity | None = None, dtype: torch.dtype = torch.float32) -> Trinity:
    """Load the model of a Hugging Face folder. Its expert_momentum is 0.

    Args:
        directory: folder with config.json and safetensors: one file, or several with an index.
        into: model to load into, of the same architecture, sharded by FSDP2 or not. Default: make one on the CPU.
        dtype: data type of a new model's matrices; gains and routers are at least fp32, buffers fp32. Not for `into`.
    Returns:
        the model.
    Raises:
        UserError: naming what is missing, unexpected, misshaped or not floating point; or the model is not a Trinity
            model, or not of the architecture of `into`.
    """
    directory = Path(directory)
    config = read_hf_config(directory)
    if into is not None:
        _check_architecture(directory, architecture(config), architecture(into.config))
    with ExitStack() as open_files:
        sources = _open_tensors(directory, open_files)
        _check_names(directory, sources, config)
        _check_size(directory, config)
        with torch.device("meta"):
            empty = Trinity(config)
        _check_shapes_and_dtypes(directory, sources, empty)
        model = _materialize(empty, dtype) if into is None else into
        _fill(model, sources)
    return model


def _check_architecture(directory: Path, in_folder: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [f"{key}={value}, not {expected[key]}" for key, value in in_folder.items() if value != expected[key]]
    if different:
        raise UserError(f"{directory} is not the model that the config describes: model.{'; model.'.join(different)}")


def _open_tensors(directory: Path, open_files: ExitStack) -> _Sources:
    sources: _Sources = {}
    for path in weight_files(directory):
        try:
            file = open_files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
            if name in sources:
                raise UserError(f"{directory} holds {name} in two files; export it again")
            sources[name] = file.get_slice(name)
    return sources


def _check_names(directory: Path, sources: _Sources, config: ModelConfig) -> None:
    missing = (name for name, _, _ in weight_map(config) if name not in sources)
    if first := list(islice(missing, _LISTED + 1)):  # a malicious config may have any number of layers
        raise UserError(f"{directory} lacks tensors that its config.json asks for: {_listed(first)}")
    unexpected = sorted(sources.keys() - {name for name, _, _ in weight_map(config)})
    if unexpected:
        raise UserError(f"{directory} holds tensors that its config.json has no place for: {_listed(unexpected)}")


def _check_size(directory: Path, config: ModelConfig) -> None:
    try:
        check_size(config)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None


def _check_shapes_and_dtypes(directory: Path, sources: _Sources, empty: Trinity) -> None:
    state, wrong = empty.state_dict(), []
    for name, parameter, index in weight_map(empty.config):
        shape, expected = tuple(sources[name].get_shape()), part_shape(state[parameter].shape, index)
        if shape != expected:
            wrong.append(f"{name} has shape {shape}, not {expected}")
        elif sources[name].get_dtype() not in _FLOATING:
            wrong.append(f"{name} is {sources[name].get_dtype()}, not one of {'/'.join(_FLOATING)}")
    if wrong:
        raise UserError(f"{directory} does not fit its config.json: {_listed(wrong)}")


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_LISTED]) + (" and more" if len(items) > _LISTED else "")


def _materialize(empty: Trinity, dtype: torch.dtype) -> Trinity:
    for name, stored in storage_dtypes(empty, dtype).items():
        parameter = empty.get_parameter(name)
        parameter.data = parameter.data.to(stored)  # on the meta device: takes no memory
    return empty.to_empty(device="cpu")


def _fill(model: Trinity, sources: _Sources) -> None:
    state = model.state_dict()  # FSDP2's sharded parameters, also between forward and backward
    for name, parameter, index in weight_map(model.config):
        _copy(state[parameter], index, sources[name])
    for name, tensor in state.items():
        if name.endswith(".expert_momentum"):
            tensor.zero_()


def _copy(tensor: Tensor, index: Index, source: Any) -> None:
    """tensor[index] = source, for the rows of this rank's shard."""
    local = local_part(tensor, index)
    if local is not None:
        view, where = local
        view.copy_(source[where])
