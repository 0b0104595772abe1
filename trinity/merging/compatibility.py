"""Refuse models that cannot be merged, in one sentence each, before any weight is read or anything is written."""

from collections.abc import Iterable
from itertools import islice

from trinity.config.hf_config import architecture
from trinity.errors import UserError
from trinity.merging.recipe import Recipe, Slice
from trinity.merging.sources import Source
from trinity.merging.tensors import model_tensors

_LISTED = 3


def check_tensors(source: Source) -> None:
    """Refuse a model whose tensors are not exactly those that its config asks for.

    Raises:
        UserError: naming what is missing, unexpected or of another shape.
    """
    expected = {}
    for described in model_tensors(source.config):
        if described.name not in source.entries:
            missing = (each.name for each in model_tensors(source.config) if each.name not in source.entries)
            raise UserError(f"{source.label} lacks tensors that its config.json asks for: {_listed(missing)}")
        expected[described.name] = described.shape
    if unexpected := sorted(source.entries.keys() - expected.keys()):
        raise UserError(f"{source.label} holds tensors that its config.json has no place for: {_listed(unexpected)}")
    wrong = (
        f"{name} has shape {source.entries[name].shape}, not {shape}"
        for name, shape in expected.items()
        if source.entries[name].shape != shape
    )
    if listed := _listed(wrong):
        raise UserError(f"{source.label} does not fit its config.json: {listed}")


def check_architectures(recipe: Recipe, sources: list[Source]) -> list[str]:
    """Refuse models of different architectures; the vocabulary is vocabulary.py's matter.

    Returns:
        remarks for the user.
    Raises:
        UserError: naming the values that differ.
    """
    ignored = {"vocab_size"} | ({"layers", "dense_layers"} if recipe.has_layers else set())
    first, notes = sources[0], []
    expected = architecture(first.config)
    for other in sources[1:]:
        found = architecture(other.config)
        different = [key for key in expected if key not in ignored and expected[key] != found[key]]
        if different:
            listed = ", ".join(f"{key} is {expected[key]} and {found[key]}" for key in different[:_LISTED])
            raise UserError(f"{first.label} and {other.label} are models of different architectures: {listed}")
        if other.config.max_positions != first.config.max_positions:
            notes.append(
                f"max_position_embeddings is {first.config.max_positions} in {first.label} and "
                f"{other.config.max_positions} in {other.label}"
            )
    return notes


def check_slices(slices: list[Slice], sources: dict[str, Source]) -> tuple[list[bool], list[bool]]:
    """Refuse slices that make no model.

    Returns:
        (whether each layer of the result is dense, whether each has global attention).
    Raises:
        UserError: a layer that a model does not have; a dense layer merged with an MoE layer, or a local one with a
            global one; a dense layer after an MoE layer.
    """
    dense: list[bool] = []
    is_global: list[bool] = []
    for number, part in enumerate(slices):
        for source in part.sources:
            assert source.layers is not None
            count = sources[source.model].config.layers
            if source.layers[1] > count:
                raise UserError(
                    f"slices[{number}]: layer_range {list(source.layers)} goes beyond the {count} layers of "
                    f"{source.model}"
                )
        for layer in range(_length(part)):
            kinds = [_kinds(sources[source.model], (source.layers or (0, 0))[0] + layer) for source in part.sources]
            for kind, names in enumerate((("an MoE", "a dense"), ("a local", "a global"))):
                found = {each[kind] for each in kinds}
                if len(found) > 1:
                    raise UserError(
                        f"slices[{number}]: layer {layer} of the ranges is {names[0]} layer in one model and "
                        f"{names[1]} layer in another; choose ranges whose layers are of the same kind"
                    )
            dense.append(kinds[0][0])
            is_global.append(kinds[0][1])
    if sorted(dense, reverse=True) != dense:
        raise UserError("slices put a dense layer after an MoE layer; dense layers must come first")
    return dense, is_global


def _length(part: Slice) -> int:
    first, end = part.sources[0].layers or (0, 0)
    return end - first


def _kinds(source: Source, layer: int) -> tuple[bool, bool]:
    return layer < source.config.dense_layers, source.config.is_global(layer)


def _listed(items: Iterable[str]) -> str:
    first = list(islice(items, _LISTED + 1))
    return ", ".join(first[:_LISTED]) + (" and more" if len(first) > _LISTED else "")
