"""Where each tensor on disk is in the merged model: its frozen weights and its coefficients.

Made from trinity/interop/weight_map.py, so that there is one table of names.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from trinity.config.model import ModelConfig
from trinity.interop.weight_map import Index, weight_map


class Place(NamedTuple):
    """One tensor on disk.

    name: on disk.
    module: path of its merged layer.
    weight: name of its frozen weights, before _0 …
    part: its part of each of them.
    coefficients: name of the parameter with its coefficients, and `row`, their number in it.
    """

    name: str
    module: str
    weight: str
    part: Index
    coefficients: str
    row: int


def places(config: ModelConfig) -> Iterator[Place]:
    """Every tensor on disk that has coefficients: all but the expert biases."""
    rows: Counter[str] = Counter()
    for name, parameter, index in weight_map(config):
        module, _, attribute = parameter.rpartition(".")
        if attribute == "expert_bias":
            continue
        if module.endswith(".experts"):
            expert, *half = index
            assert isinstance(expert, int)
            matrix = ("gate", "up")[int(half[0])] if half else "down"  # type: ignore[arg-type]
            yield Place(name, module, matrix, (expert,), f"{matrix}_coefficients", expert)
        else:
            yield Place(name, module, "weight", index, "coefficients", rows[parameter])
            rows[parameter] += 1


def bias_places(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(name on disk, name of the buffer with all models' values) of the expert biases."""
    for name, parameter, _ in weight_map(config):
        if parameter.endswith(".expert_bias"):
            yield name, parameter.replace(".expert_bias", ".router.biases")
