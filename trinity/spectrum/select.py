"""Choose the units to train by their scores, and write them as train.only or as axolotl's unfrozen_parameters.

As in Spectrum's script, units of one type are ranked against each other, the best share of each type trains, and the
embedding and the head train always. A type with several units trains one at least.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import yaml

from trinity.errors import UserError
from trinity.spectrum.modules import Unit, score_of
from trinity.spectrum.scores import Score

Kind = Literal["mp", "spectrum"]

ALWAYS = ("embed", "head", "model.embed_tokens", "lm_head")
"""Names of units that always train, of Trinity models and of other folders."""

_RANGE = re.compile(r".+\[\d*(:\d*)?\]")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def choose(units: Iterable[Unit], scores: dict[str, Score], kind: Kind, top: float) -> list[Unit]:
    """The units to train, in their order.

    Args:
        kind: the score to rank by. `mp` says nothing about gains: they are frozen. `spectrum` is the same for all of
            them: as in the script, the first layers' train.
        top: percentage of each type.
    Raises:
        UserError: `top` is not between 0 and 100.
    """
    if not 0 < top < 100:
        raise UserError(f"--top {top:g} must be above 0 and below 100 (percent of the modules of each type)")
    units = list(units)
    chosen = {unit.name for unit in units if unit.name in ALWAYS}
    by_type: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.name not in ALWAYS and (kind == "spectrum" or not unit.is_vector):
            by_type.setdefault(unit.type, []).append(unit)
    for members in by_type.values():
        count = max(int(len(members) * top / 100), 1 if len(members) > 1 else 0)
        # sorted is stable: equal scores keep the order of the layers
        ranked = sorted(members, key=lambda unit: -getattr(score_of(unit.tensors(), scores), kind))
        chosen |= {unit.name for unit in ranked[:count]}
    return [unit for unit in units if unit.name in chosen]


def chosen_without_signal(trained: Iterable[Unit], scores: dict[str, Score], kind: Kind) -> dict[str, int]:
    """Type → number of units that train although their score is 0, so that their layer alone chose them.

    Embedding and head train always and do not count. `spectrum` has no score of 0 but for a matrix of zeros.
    """
    zero = (
        unit for unit in trained if unit.name not in ALWAYS and getattr(score_of(unit.tensors(), scores), kind) == 0
    )
    return dict(Counter(unit.type for unit in zero))


def train_only_yaml(units: Iterable[Unit], comment: str) -> str:
    """A config's section `train`."""
    return f"# {comment}\n" + yaml.safe_dump({"train": {"only": [unit.name for unit in units]}}, sort_keys=False)


def axolotl_yaml(units: Iterable[Unit], comment: str) -> str:
    """axolotl's unfrozen_parameters: a regular expression for each tensor, in which a dot is a dot.

    Experts are named as the folder has them, one by one, and as transformers holds them, in stacks.
    """
    patterns: dict[str, None] = {}
    for unit in units:
        for tensor in unit.tensors():
            patterns.update(dict.fromkeys(f"^{name}$" for name in _axolotl_names(tensor)))
    return f"# {comment}\n" + yaml.safe_dump({"unfrozen_parameters": list(patterns)}, sort_keys=False)


def read_axolotl(path: Path, units: Sequence[Unit]) -> list[Unit]:
    """The units that hold a tensor which axolotl's unfrozen_parameters name.

    As in axolotl, an entry is a regular expression in which a dot without + after it is a dot. It is matched whole
    here: against a tensor, its module, or a module that holds it.

    Raises:
        UserError: the file has no such list, or an entry is no expression, matches nothing, or means rows of a tensor.
    """
    chosen: set[str] = set()
    for entry in _entries(path):
        pattern = _pattern(entry, path)
        found = {unit.name for unit in units if any(_matches(pattern, tensor) for tensor in unit.tensors())}
        if not found:
            raise UserError(f"{path} names {entry}, which is nothing in this model; remove it, or correct it")
        chosen |= found
    return [unit for unit in units if unit.name in chosen]


def _entries(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give axolotl's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is no YAML file ({' '.join(str(error).split())}); give axolotl's") from None
    entries = content.get("unfrozen_parameters") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path} has no list unfrozen_parameters of texts; give axolotl's YAML file")
    return entries


def _pattern(entry: str, path: Path) -> re.Pattern:
    if _RANGE.fullmatch(entry):
        raise UserError(f"{path} names rows of a tensor ({entry}), and whole ones are trained here; remove the range")
    try:
        return re.compile(re.sub(r"\.(?!\+)", r"\\.", entry.removeprefix("^").removesuffix("$")))
    except re.error as error:
        raise UserError(f"{path} names {entry}, which is no regular expression ({error}); correct it") from None


def _matches(pattern: re.Pattern, tensor: str) -> bool:
    """Whether a pattern is the name of a tensor, of its stack, or of a module that holds it."""
    return any(
        pattern.fullmatch(".".join(parts[:length]))
        for parts in (name.split(".") for name in _all_names(tensor))
        for length in range(1, len(parts) + 1)
    )


def _all_names(tensor: str) -> list[str]:
    match = _EXPERT.fullmatch(tensor)
    return [tensor] if match is None else [tensor, f"{match[1]}.{_stack(match[2])}"]


def _axolotl_names(tensor: str) -> list[str]:
    match = _EXPERT.fullmatch(tensor)
    if match is None:
        return [tensor]
    return [f"{match[1]}.{_stack(match[2])}", f"{match[1]}.[0-9]+.{match[2]}_proj.weight"]


def _stack(projection: str) -> str:
    return "down_proj" if projection == "down" else "gate_up_proj"
