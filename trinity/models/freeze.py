"""Freeze every parameter but those that train.only names.

A name is that of a parameter (`blocks.3.attention.qkvg.weight`) or of a module with all that is in it (`blocks.3`,
`blocks.3.ffn.experts`). It is matched whole, part by part between its dots, never by prefix: `blocks.1` is not
`blocks.12`, and `ffn.shared.gate` is not `ffn.shared.gate_up`. `*` stands for any characters within one part:
`blocks.*.ffn.experts`, `blocks.1*.attention`. The smallest unit is a parameter: the experts' stack of a layer, or the
stacked projections of attention (`qkvg`).

The expert biases are no parameters. Those of a layer move as long as its router is trained: a frozen router with a
moving bias would change the routing of a part that is to stay as it is.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from trinity.config.run import TrainConfig
from trinity.errors import UserError

_WHAT_TO_WRITE = "write whole names of modules or parameters, such as blocks.3.attention or blocks.*.ffn.experts"


def freeze(model: nn.Module, config: TrainConfig) -> None:
    """Take gradients away from all parameters that train.only does not name; before sharding and optimizers.

    Args:
        model: a Trinity, on any device.
        config: without names everything is trained, and nothing changes here.
    Raises:
        UserError: as trained_parameters; or train.expert_bias=move with a frozen router.
    """
    if not config.only:
        return
    trained = trained_parameters([name for name, _ in model.named_parameters()], config.only)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, module in model.named_modules():
        if hasattr(module, "bias_moves"):
            module.bias_moves = f"{name}.router.weight" in trained
            if config.expert_bias == "move" and not module.bias_moves:
                raise UserError(
                    f"train.expert_bias=move, and train.only freezes the router {name}.router, whose bias holds still "
                    f"with it; add {name}.router to train.only, or use train.expert_bias=auto"
                )


def trained_parameters(parameters: Sequence[str], only: Sequence[str]) -> set[str]:
    """The parameters that the names in train.only stand for.

    Args:
        parameters: names of all parameters of the model.
        only: names and patterns; see above.
    Raises:
        UserError: a name that matches nothing, or names that match everything.
    """
    trained: set[str] = set()
    for name in only:
        matched = matching(parameters, name)
        if not matched:
            raise UserError(f"train.only names {name!r}, which is nothing in this model; {_hint(parameters, name)}")
        trained |= matched
    if len(trained) == len(parameters):
        raise UserError(
            f"train.only={list(only)} matches all {len(parameters)} parameters and freezes none; name fewer modules, "
            "or leave train.only out to train everything"
        )
    return trained


def matching(parameters: Iterable[str], name: str) -> set[str]:
    """The parameters whose name, or that of a module which holds them, is `name`; `*` is any part of a name."""
    pattern = re.compile("[^.]*".join(map(re.escape, name.split("*"))))
    return {parameter for parameter in parameters if any(map(pattern.fullmatch, _self_and_parents(parameter)))}


def _self_and_parents(name: str) -> list[str]:
    """a.b.c → a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _hint(parameters: Sequence[str], name: str) -> str:
    if name.startswith(("model.", "lm_head")):
        return f"it looks like a Hugging Face name, which tools/spectrum.py --axolotl translates; {_WHAT_TO_WRITE}"
    known = dict.fromkeys(part for parameter in parameters for part in _self_and_parents(parameter))
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else _WHAT_TO_WRITE
