"""Reads a Hugging Face AfMoE folder into our model, trusting nothing in it.

Only safetensors are read, never a pickle; only files in the folder itself, or in the blobs of the Hugging Face cache
that it is part of; and all names and shapes are compared with the config's before memory is taken or a number is read.
Then tensors are streamed, and a rank of a sharded model reads just the rows that it owns.
"""

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.config.hf_config import architecture, read_hf_config
from trinity.config.model import ModelConfig, check_size
from trinity.errors import UserError
from trinity.interop.tensors import local_part, part_shape, storage_dtypes
from trinity.interop.weight_map import Index, correspondence
from trinity.io.json_files import read_json
from trinity.models.trinity import Trinity

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOATING = ("F64", "F32", "BF16", "F16")
_NAMED = 3  # how many tensors a message names

_Sources = dict[str, Any]
"""Tensor's name → its slice in an open file: shape and format are known, its numbers still on disk."""


def load_hf(directory: str | Path, into: Trinity | None = None, dtype: torch.dtype = torch.float32) -> Trinity:
    """The model of a Hugging Face folder; its expert_momentum is 0.

    Args:
        directory: config.json and safetensors, one file or an index of several.
        into: fill this model, sharded by FSDP2 or not, of the same architecture, instead of making one on the CPU.
        dtype: format of a new model's matrices; gains and routers are at least fp32, buffers fp32. Not for `into`.
    Returns:
        the model.
    Raises:
        UserError: naming what is missing, unexpected, misshaped, not floating point, not a model of ours, or not this
            model (`into`).
    """
    directory = Path(directory)
    config = read_hf_config(directory)
    if into is not None:
        _refuse_other_model(directory, architecture(config), architecture(into.config))
    with ExitStack() as open_files:
        sources = _open(directory, open_files)
        _refuse_other_names(directory, sources, config)
        _refuse_size(directory, config)
        with torch.device("meta"):
            empty = Trinity(config)
        _refuse_other_tensors(directory, sources, empty)
        model = _materialize(empty, dtype) if into is None else into
        _fill(model, sources)
    return model


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder written by transformers or by tools/export_hf.py")
    return read_json(path, "fetch or export it again") or {}


def _refuse_other_model(directory: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [f"{key}={value}, not {ours[key]}" for key, value in theirs.items() if value != ours[key]]
    if different:
        raise UserError(f"{directory} is not the model that the config describes: model.{'; model.'.join(different)}")


def _open(directory: Path, open_files: ExitStack) -> _Sources:
    sources: _Sources = {}
    for path in _weight_files(directory):
        try:
            file = open_files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from None
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
            if name in sources:
                raise UserError(f"{directory} holds {name} in two files; export it again")
            sources[name] = file.get_slice(name)
    return sources


def _weight_files(directory: Path) -> list[Path]:
    """The files with tensors: the single one, else those of the index; each a file of this folder itself."""
    names = {_SINGLE}
    if not (directory / _SINGLE).exists():
        if not (directory / _INDEX).exists():
            raise UserError(
                f"{directory} has neither {_SINGLE} nor {_INDEX}; pickled weights are not read: "
                "load such a folder with transformers and save_pretrained it"
            )
        weight_map = _read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / _INDEX} has no weight_map; fetch or export it again")
        names = set(map(str, weight_map.values()))
    return [_inside(directory, name) for name in sorted(names)]


def _inside(directory: Path, name: str) -> Path:
    path = directory / name
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(f"{directory / _INDEX} names {name!r}; only names of safetensors files in the folder are read")
    if not path.is_file():
        raise UserError(f"{path} is missing or no file, though the folder must have it; fetch or export it again")
    target = path.resolve()
    if target.parent not in (directory.resolve(), _blobs(directory)):
        copy = f"cp --remove-destination {quote(str(target))} {quote(str(path))}"
        raise UserError(f"{path} is a link out of the folder; put the file itself in its place: {copy}")
    return path


def _blobs(directory: Path) -> Path | None:
    """Where the cache of huggingface_hub keeps the files of MODEL/snapshots/REVISION: MODEL/blobs. None elsewhere."""
    snapshots = directory.resolve().parent
    return snapshots.parent / "blobs" if snapshots.name == "snapshots" else None


def _refuse_other_names(directory: Path, sources: _Sources, config: ModelConfig) -> None:
    missing = (name for name, _, _ in correspondence(config) if name not in sources)
    if first := list(islice(missing, _NAMED + 1)):  # no more: a config may speak of any number of layers
        raise UserError(f"{directory} lacks tensors that its config.json asks for: {_some(first)}")
    unexpected = sorted(sources.keys() - {name for name, _, _ in correspondence(config)})
    if unexpected:
        raise UserError(f"{directory} holds tensors that its config.json has no place for: {_some(unexpected)}")


def _refuse_size(directory: Path, config: ModelConfig) -> None:
    try:
        check_size(config)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None


def _refuse_other_tensors(directory: Path, sources: _Sources, empty: Trinity) -> None:
    state, wrong = empty.state_dict(), []
    for name, ours, index in correspondence(empty.config):
        shape, wanted = tuple(sources[name].get_shape()), part_shape(state[ours].shape, index)
        if shape != wanted:
            wrong.append(f"{name} has shape {shape}, not {wanted}")
        elif sources[name].get_dtype() not in _FLOATING:
            wrong.append(f"{name} is {sources[name].get_dtype()}, not one of {'/'.join(_FLOATING)}")
    if wrong:
        raise UserError(f"{directory} does not fit its config.json: {_some(wrong)}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:_NAMED]) + (" and more" if len(items) > _NAMED else "")


def _materialize(empty: Trinity, dtype: torch.dtype) -> Trinity:
    for name, stored in storage_dtypes(empty, dtype).items():
        parameter = empty.get_parameter(name)
        parameter.data = parameter.data.to(stored)  # while it takes no memory
    return empty.to_empty(device="cpu")


def _fill(model: Trinity, sources: _Sources) -> None:
    state = model.state_dict()  # of FSDP2 the sharded parameters, whatever it shows between forward and backward
    for name, ours, index in correspondence(model.config):
        _copy(state[ours], index, sources[name])
    for name, tensor in state.items():
        if name.endswith(".expert_momentum"):
            tensor.zero_()


def _copy(tensor: Tensor, index: Index, source: Any) -> None:
    """tensor[index] = source, as far as this rank owns it."""
    owned = local_part(tensor, index)
    if owned is not None:
        mine, there = owned
        mine.copy_(source[there])
