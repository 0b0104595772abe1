"""The value that a refusal suggests is accepted, by the check that refused and by the later ones."""

import re
import shlex
from functools import reduce
from pathlib import Path

import pytest

from trinity.config import RunConfig, load_config
from trinity.config.check import BOUNDS, check_run
from trinity.config.run import RunSection
from trinity.errors import UserError
from trinity.training.divisibility import check_batches, check_mesh, context_notes, process_counts

CONFIGS = Path(__file__).parents[2] / "configs"


def refusal(config: str, words: list[str]) -> str:
    """The refusal of a config with these overrides."""
    with pytest.raises(UserError) as refused:
        load_config(CONFIGS / f"{config}.yaml", words)
    return str(refused.value)


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        (["model.heads=6", "model.kv_heads=4"], [f"model.kv_heads={n}" for n in (1, 2, 3, 6)]),
        (["model.active_experts=17"], ["model.active_experts=16"]),
        (["model.head_dim=63"], ["model.head_dim=64"]),
        (["compile=block", "recompute=block"], ["compile=none", "recompute=none"]),
        (["precision.compute=float64", "optim.muon.dtype=bfloat16"], ["optim.muon.dtype=float64"]),
        (["precision.compute=float32", "precision.fp8=torchao"], ["precision.compute=bfloat16", "precision.fp8=none"]),
        (["checkpoint.average={every: 30, window: 2}", "checkpoint.every=20"], ["checkpoint.average.every=40"]),
        (["checkpoint.average={every: 30, window: 2}", "checkpoint.every=0"], ["checkpoint.every=30"]),
    ],
)
def test_named_settings(words: list[str], advised: list[str]) -> None:
    """Each suggested setting alone is enough."""
    sentence = refusal("smoke", words).rpartition("use ")[2]
    first, *others = re.split(" or (?!less)", sentence.removesuffix(" or less"))
    key = first.partition("=")[0]
    suggestions = [first, *(other if "=" in other else f"{key}={other}" for other in others)]
    assert suggestions == advised
    for word in suggestions:
        load_config(CONFIGS / "smoke.yaml", [*words, word])


@pytest.mark.parametrize("key", list(BOUNDS))
def test_bounds(key: str) -> None:
    """The bound in a refusal is accepted."""
    least, most = BOUNDS[key]
    for beyond, bound in ((least - 1, least), *([(most + 1, most)] if most is not None else [])):
        config = RunConfig(run=RunSection(tokens=5) if key == "run.tokens" else RunSection(steps=1))
        if key == "checkpoint.average.every":  # an average needs evaluations, and a run as long as its window
            config.run.steps, config.checkpoint.every, config.evaluation.every = 8, 1, 1
            config.data.validation = {"a": "x"}
        *sections, name = key.split(".")
        setattr(reduce(getattr, sections, config), name, beyond)
        with pytest.raises(UserError) as refused:
            check_run(config)
        assert str(refused.value) == f"{key}={beyond} must be at {'least' if bound == least else 'most'} {bound}"
        setattr(reduce(getattr, sections, config), name, bound)
        check_run(config)


@pytest.mark.parametrize(
    ("config", "words", "worlds"),
    [
        ("nano", [], (1, 48, 64, 200)),
        ("large", ["batch.sequences=1000", "data.streams=96"], (7, 8, 64, 100)),
        ("smoke", ["batch.ramp=[{tokens: 5000, sequences: 10}, {tokens: 9000, sequences: 15}]"], (1, 2, 3, 5, 32)),
        ("smoke", ["parallel.shard=4", "parallel.expert=3"], (2, 4, 6)),
        ("nano_1gpu", ["parallel.replicate=3", "batch.sequences=20"], (1, 5, 8, 12)),
        ("smoke", ["parallel.context=2", "parallel.expert=2"], (1, 2, 3, 6, 8, 12)),
        ("smoke", ["parallel.context=3"], (1, 3, 9)),
        ("smoke", ["parallel.context=2", "batch.sequences=6"], (2, 5, 8, 20)),
    ],
)
def test_mesh_and_batches(config: str, words: list[str], worlds: tuple[int, ...]) -> None:
    """The suggested settings, added to the command line, pass both checks; so do the suggested numbers of processes."""
    path = CONFIGS / f"{config}.yaml"
    before = load_config(path, words)
    counts = process_counts(before)
    for count in counts:
        check_batches(before, count // check_mesh(before, count).context)
    refused = 0
    for world in worlds:
        try:
            check_batches(before, world // check_mesh(before, world).context)
        except UserError as error:
            advice, _, processes = str(error).rpartition("; use ")[2].partition(", or start ")
            after = load_config(path, [*words, *shlex.split(advice)])
            sizes = check_mesh(after, world)
            check_batches(after, world // sizes.context)
            assert sizes.replicate * sizes.shard == world
            named = [int(number) for number in re.findall(r"\d+", processes)]
            assert set(named) <= set(counts)
            assert bool(named) == bool(counts)
            refused += 1
    assert refused == len(set(worlds) - set(counts)) > 0


@pytest.mark.parametrize(
    ("words", "world", "sentence"),
    [
        (
            ["parallel.context=3", "batch.sequences=12"],
            12,
            "parallel.context=3 does not divide data.sequence_length=256; use parallel.context=1 or 2 or 4",
        ),
        (
            ["parallel.context=8", "data.phases=[{tokens: 1000, sequence_length: 260}]"],
            8,
            "parallel.context=8 does not divide data.phases[0].sequence_length=260; use parallel.context=1 or 2 or 4",
        ),
        (  # no other number makes a mesh
            ["parallel.context=3", "parallel.shard=2", "parallel.expert=2"],
            6,
            "parallel.context=3 does not divide data.sequence_length=256; use parallel.context=1 parallel.shard=6 "
            "batch.sequences=6",
        ),
    ],
)
def test_context_that_does_not_divide_a_row(words: list[str], world: int, sentence: str) -> None:
    """A token lost by rounding was reported of others (TransformerEngine#1930, Megatron-LM#4495): here it is refused.

    Each number that is named can be used.
    """
    with pytest.raises(UserError) as refused:
        check_mesh(load_config(CONFIGS / "smoke.yaml", words), world)
    assert str(refused.value) == sentence
    advice = sentence.rpartition("; use ")[2]
    first, *others = advice.split(" or ")
    for word in [first, *(f"parallel.context={number}" for number in others)]:
        after = load_config(CONFIGS / "smoke.yaml", [*words, *word.split()])
        check_batches(after, world // check_mesh(after, world).context)


@pytest.mark.parametrize(("context", "noted"), [(1, False), (2, False), (4, False), (3, True), (8, True)])
def test_a_note_where_heads_cannot_be_split(context: int, noted: bool) -> None:
    """smoke has 4 query and 2 key/value heads; the numbers that the note names need no note."""
    config = load_config(CONFIGS / "smoke.yaml", [f"parallel.context={context}"])
    notes = context_notes(config)
    assert bool(notes) == noted
    for number in re.findall(r"\d+", notes[0].rpartition("; ")[2]) if noted else []:
        assert not context_notes(load_config(CONFIGS / "smoke.yaml", [f"parallel.context={number}"]))
