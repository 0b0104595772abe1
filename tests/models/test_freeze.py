"""train.only: which parameters its names stand for, and what is refused."""

import pytest
import torch

from trinity.config.run import TrainConfig
from trinity.errors import UserError
from trinity.models import ZOO, Trinity
from trinity.models.freeze import freeze, matching, trained_parameters

with torch.device("meta"):
    MODEL = Trinity(ZOO["smoke"])
NAMES = [name for name, _ in MODEL.named_parameters()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed", ["embed.weight"]),
        ("head.weight", ["head.weight"]),
        ("norm", ["norm.gain"]),  # and no attention_norm
        ("blocks.1.attention.qkvg", ["blocks.1.attention.qkvg.weight"]),
        ("blocks.*.ffn.router", [name for name in NAMES if name.endswith(".router.weight")]),
        ("blocks.1.ffn.experts", ["blocks.1.ffn.experts.down", "blocks.1.ffn.experts.gate_up"]),
        ("blocks.1.ffn.experts.gate*", ["blocks.1.ffn.experts.gate_up"]),
        ("blocks.1", [name for name in NAMES if name.startswith("blocks.1.")]),
        ("*", NAMES),
        # prefixes of names, which are no names
        ("blocks.1.ffn.shared.gate", []),
        ("blocks.1.ffn.experts.gate", []),
        ("block", []),
        ("blocks.1.", []),
        (".", []),
        ("blocks.1.*", [name for name in NAMES if name.startswith("blocks.1.")]),
        ("*.router", []),  # three parts are no one part
        ("blocks.[12]", []),
        ("blocks.1|embed", []),
    ],
)
def test_names_are_matched_whole(name: str, expected: list[str]) -> None:
    """Against names written out, or found by their last part."""
    assert matching(NAMES, name) == set(expected)


def test_a_layer_is_no_prefix_of_another() -> None:
    """blocks.1 of a model with twelve layers."""
    names = [f"blocks.{layer}.attention.out.weight" for layer in range(12)]
    assert matching(names, "blocks.1") == {"blocks.1.attention.out.weight"}
    assert matching(names, "blocks.1*") == {f"blocks.{layer}.attention.out.weight" for layer in (1, 10, 11)}


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        (
            ["blocks.1.atention"],
            r"train.only names 'blocks.1.atention', which is nothing .* did you mean blocks.1.atte",
        ),
        (["embed", ""], r"train.only names '', which is nothing"),
        (["model.layers.1.self_attn.q_proj"], r"looks like a Hugging Face name, which tools/spectrum.py --axolotl"),
        (["*"], r"matches all \d+ parameters and freezes none; name fewer modules"),
        (["blocks", "embed", "norm", "head"], r"matches all \d+ parameters"),
    ],
)
def test_wrong_names_are_refused(only: list[str], sentence: str) -> None:
    """Nothing and everything; the sentence says what to write."""
    with pytest.raises(UserError, match=sentence):
        trained_parameters(NAMES, only)


def test_router_and_bias() -> None:
    """The bias of a layer moves with its router; to ask for more is refused."""
    model = Trinity(ZOO["smoke"])
    sparse = [index for index, block in enumerate(model.blocks) if block.sparse]
    freeze(model, TrainConfig([f"blocks.{sparse[0]}.ffn.router"]))
    assert [model.blocks[index].ffn.bias_moves for index in sparse] == [True, *[False] * (len(sparse) - 1)]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{sparse[0]}.ffn.router.weight"
    ]
    with pytest.raises(UserError, match=rf"freezes the router blocks.{sparse[1]}.ffn.router, whose bias .* add blocks"):
        freeze(model, TrainConfig([f"blocks.{sparse[0]}.ffn.router"], "move"))
    freeze(model, TrainConfig(["blocks.*.ffn.router", "head"], "move"))
    assert all(model.blocks[index].ffn.bias_moves for index in sparse)
