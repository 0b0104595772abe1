"""Coefficients as files: coefficients.safetensors by the tensors' names on disk, coefficients.json as a summary.

A tensor has [N, I] coefficients, or [N, 1] with one per model. Tensors that were not learned are not in the file: they
have the coefficients that they started with, 1/N or those of `start`.

Shapes: N models, I input width.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.dam.config import DamConfig
from trinity.dam.model import MergedTrinity, coefficients_of, merged_layers
from trinity.dam.names import places
from trinity.errors import UserError
from trinity.interop.tensors import gather_part
from trinity.io.json_files import to_json
from trinity.io.local import atomic_path

_ORIGIN = "dam"
FILE, SUMMARY = "coefficients.safetensors", "coefficients.json"


def gather_coefficients(model: MergedTrinity) -> dict[str, Tensor]:
    """Name on disk → its coefficients, fp32 on the CPU, of every tensor; on rank 0, elsewhere empty. Collective."""
    whole = {}
    for name, parameter in coefficients_of(model).items():
        gathered = gather_part(parameter, ())
        if gathered is not None:
            whole[name] = gathered.float().cpu()
    if not whole:
        return {}
    return {place.name: whole[f"{place.module}.{place.coefficients}"][place.row] for place in places(model.config)}


def parts_of(model: MergedTrinity) -> dict[str, str]:
    """Name on disk → part of the model, one of PARTS."""
    layers = merged_layers(model)
    return {place.name: layers[place.module].part for place in places(model.config)}


def save_coefficients(path: Path, values: dict[str, Tensor], config: DamConfig, identities: list[str]) -> None:
    """Write coefficients with the models they are of."""
    origin = {"models": config.mixed, "identities": identities, "granularity": config.granularity}
    with atomic_path(path) as temporary:
        # one entry: the library writes several in a random order
        save_file({name: value.contiguous() for name, value in values.items()}, temporary, {_ORIGIN: to_json(origin)})


def read_coefficients(folder: str, config: DamConfig, identities: list[str], model: ModelConfig) -> dict[str, Tensor]:
    """Coefficients to start from, of an earlier result or a file.

    Raises:
        UserError: there are none, they are of other models, or one per feature where one per model is wanted.
    """
    path = Path(folder).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            origin = json.loads((file.metadata() or {}).get(_ORIGIN, "{}"))
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"start: {folder} holds no coefficients ({' '.join(str(error).split())}); give the result of an earlier "
            f"tools/dam.py, or leave start out"
        ) from None
    if not isinstance(origin, dict) or origin.get("identities") != identities:
        named = ", ".join(map(str, origin.get("models", []))) if isinstance(origin, dict) else ""
        raise UserError(
            f"start: {folder} has coefficients of other models ({named or 'unnamed'}); list the same "
            "models in the same order, or leave start out"
        )
    _check_shapes(folder, values, config, model)
    return values


def _check_shapes(folder: str, values: dict[str, Tensor], config: DamConfig, model: ModelConfig) -> None:
    known = {place.name for place in places(model)}
    for name, value in values.items():
        if name not in known or value.dim() != 2 or len(value) != len(config.mixed):
            raise UserError(f"start: {folder} does not fit the models ({name}); leave start out")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"start: {folder} has NaN or infinity in {name}; leave start out")
        if value.shape[1] > 1 and config.granularity != "column":
            raise UserError(
                f"start: {folder} has a coefficient per column, and granularity is {config.granularity}; write "
                "granularity: column"
            )


def summary(values: dict[str, Tensor], parts: dict[str, str], config: DamConfig) -> dict[str, Any]:
    """Mean, least and largest coefficient of each model, by layer and part, and the models' mean pairwise cosine."""
    rows: dict[tuple[int, str], list[str]] = {}
    for name in values:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        rows.setdefault((int(found[1]) if found else -1, parts[name]), []).append(name)
    entries = []
    for (layer, part), names in sorted(rows.items()):
        all_NX = torch.cat([values[name] for name in names], dim=1).double()
        entries.append(
            {
                "layer": None if layer < 0 else layer,
                "part": part,
                "learned": part in config.learn,
                "tensors": len(names),
                "mean": all_NX.mean(dim=1).tolist(),
                "least": all_NX.amin(dim=1).tolist(),
                "largest": all_NX.amax(dim=1).tolist(),
                "cosine": _mean_cosine([values[name] for name in names]),
            }
        )
    return {"models": config.mixed, "granularity": config.granularity, "parts": entries}


def _mean_cosine(values: list[Tensor]) -> float | None:
    """Mean over tensors and pairs of models; None where a tensor has one coefficient per model, or there is no pair."""
    cosines = []
    for value_NI in values:
        count, width = value_NI.shape
        if width > 1:
            pairs = [(a, b) for a in range(count) for b in range(a)]
            cosines += [F.cosine_similarity(value_NI[a], value_NI[b], dim=0).item() for a, b in pairs]
    return math.fsum(cosines) / len(cosines) if cosines else None
