"""The modules of a folder that are scored, and the units that are trained or frozen together.

A module is one matrix or gain of the folder, or a layer's stack of one projection of all routed experts
(`model.layers.3.mlp.experts.*.up_proj`). A unit is what training freezes as a whole. In a Trinity model that is a
parameter, in which several modules may be stacked: queries, keys, values and gate; gate and up of all experts. In
another model it is a module. Units of one type (`attention.qkvg`) are ranked against each other over the layers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from trinity.errors import UserError
from trinity.interop.weight_map import weight_map
from trinity.io.json_files import read_json
from trinity.merging.open_source import open_source
from trinity.merging.sources import FolderSource, Source
from trinity.spectrum.scores import Score

_LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(\.experts\.)\d+(?=\.)")


@dataclass
class Module:
    """One matrix, one gain, or a stack of experts' matrices.

    type: the name without the layer's number and what is before it; the whole name outside of layers.
    layer: None outside of layers. tensors: their names in the folder. shape: of one of them.
    """

    name: str
    type: str
    layer: int | None
    shape: tuple[int, ...]
    tensors: list[str] = field(default_factory=list)


@dataclass
class Unit:
    """Modules that are trained or frozen together; `name` is what train.only calls it in a Trinity model."""

    name: str
    type: str
    layer: int | None
    modules: list[Module] = field(default_factory=list)

    @property
    def is_vector(self) -> bool:
        """Whether it is a gain."""
        return len(self.modules[0].shape) == 1

    def tensors(self) -> list[str]:
        """The names of its tensors in the folder."""
        return [tensor for module in self.modules for tensor in module.tensors]


class OtherFolder(FolderSource):
    """A Hugging Face folder of another architecture: names, shapes and rows of its tensors, and no config."""

    def __init__(self, label: str, folder: Path) -> None:  # FolderSource's reads a Trinity's config.json
        self.label, self.tokenizer = label, None
        self._open_files(folder)


def open_weights(text: str) -> Source:
    """A Hugging Face folder of any architecture, a run directory, or RUN_DIR@step.

    Raises:
        UserError: there is no such model, or its weights are quantised.
    """
    folder = Path(text).expanduser()
    raw = read_json(folder / "config.json", "fetch the folder again") if (folder / "config.json").is_file() else None
    if raw is not None and raw.get("model_type") not in (None, "afmoe"):
        return OtherFolder(text, folder)
    return open_source(text)


def is_trinity(source: Source) -> bool:
    """Whether train.only can name the source's units."""
    return not isinstance(source, OtherFolder)


def find_modules(source: Source) -> list[Module]:
    """The modules of a folder, layer by layer: every `.weight` that is a vector or a matrix.

    Raises:
        UserError: there is none, or a Trinity model lacks one.
    """
    modules: dict[str, Module] = {}
    for tensor in _in_order(source):
        entry = source.entries[tensor]
        if tensor.endswith(".weight") and len(entry.shape) in (1, 2):
            name = _EXPERT.sub(r"\1*", tensor.removesuffix(".weight"))
            layer, kind = _layer_and_type(name)
            modules.setdefault(name, Module(name, kind, layer, entry.shape)).tensors.append(tensor)
    if not any(len(module.shape) == 2 for module in modules.values()):
        raise UserError(f"{source.folder} holds no matrix to score; give a Hugging Face folder with a model")
    return list(modules.values())


def _in_order(source: Source) -> list[str]:
    """The tensors in the order of the model's layers: a folder's files have them in any order."""
    if not is_trinity(source):
        return sorted(source.entries, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])
    names = [name for name, _, _ in weight_map(source.config)]
    for name in names:
        if name not in source.entries:
            raise UserError(f"{source.folder} lacks {name}, which its config.json asks for; fetch or export it again")
    return names


def find_units(source: Source, modules: list[Module]) -> list[Unit]:
    """The units of a folder: the parameters of a Trinity model, the modules of another one."""
    if not is_trinity(source):
        return [Unit(module.name, module.type, module.layer, [module]) for module in modules]
    parameter_of = {tensor: parameter for tensor, parameter, _ in weight_map(source.config)}
    units: dict[str, Unit] = {}
    for module in modules:
        name = unit_name(parameter_of[module.tensors[0]])
        layer, kind = _layer_and_type(name)
        units.setdefault(name, Unit(name, kind, layer)).modules.append(module)
    return list(units.values())


def unit_name(parameter: str) -> str:
    """The shortest name of a parameter of Trinity: its module's, if that holds nothing else."""
    return parameter.removesuffix(".weight").removesuffix(".gain")


def sampled(module: Module, sample: int | None) -> list[str]:
    """The tensors of a module to score: all, or `sample` of them at equal distances."""
    count = len(module.tensors)
    if sample is None or sample >= count:
        return module.tensors
    return [module.tensors[index * count // sample] for index in range(sample)]


def score_of(tensors: Iterable[str], scores: dict[str, Score]) -> Score:
    """The median of the tensors that have a score, each figure by itself."""
    found = [scores[tensor] for tensor in tensors if tensor in scores]
    return Score(
        median(score.spectrum for score in found),
        median(score.mp for score in found),
        round(median(score.rank for score in found)),
    )


def _layer_and_type(name: str) -> tuple[int | None, str]:
    """a.3.b.c → 3, b.c."""
    match = _LAYER.fullmatch(name)
    return (None, name) if match is None else (int(match[2]), match[3])
