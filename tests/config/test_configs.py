"""Every config of configs/ loads; nano, mini, large and their context extensions have the report's values."""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.planning.plan_configs import plan_of
from trinity.config import ZOO, load_config, save_config
from trinity.config.load import flatten
from trinity.config.phases import resolved_phases
from trinity.planning.plan import make_plan
from trinity.planning.tables import as_text

CONFIGS = Path(__file__).parents[2] / "configs"

COMMON = {
    "optim.schedule.warmup_steps": 2000,
    "parallel.replicate": -1,
    "parallel.shard": 128,
}
NANO_AND_MINI = COMMON | {
    "run.tokens": 10 * 10**12,
    "data.sequence_length": 4096,
    "data.packing": "sequential",
    "data.document_mask": False,
    "batch.sequences": 4096,
    "optim.muon.lr": 1e-3,
    "optim.schedule.decay": "linear",
    "optim.schedule.decay_start_tokens": 88 * 10**11,
    "optim.schedule.final": 0.0,
    "balancing.kind": "sign",
    "parallel.expert": 1,
}
LENGTH_BIAS = {"data.length_bias.tokens": 131_072, "data.length_bias.floor": 0.01, "data.length_bias.ceiling": 0.9}
NANO_AND_MINI_CONTEXT = LENGTH_BIAS | {
    "optim.muon.lr": 1e-4,
    "optim.schedule.decay": "linear",
    "optim.schedule.final": 0.0,
    "balancing.kind": "sign",
    "parallel.replicate": -1,
    "parallel.shard": None,  # times context it is the report's 128
}
REPORT: dict[str, dict[str, Any]] = {
    "nano": NANO_AND_MINI | {"optim.adamw.lr": 3e-4},
    "mini": NANO_AND_MINI | {"optim.adamw.lr": 2e-4},
    "large": COMMON
    | {
        "run.tokens": 17 * 10**12,
        "data.sequence_length": 8192,
        "data.packing": "sequential",
        "data.document_mask": True,
        "batch.sequences": 12_288,
        "batch.ramp": [{"tokens": 49 * 10**11, "sequences": 16_384}],
        "optim.muon.lr": 8e-4,
        "optim.adamw.lr": 2e-4,
        "optim.schedule.decay": "cosine",
        "optim.schedule.decay_start_tokens": 141 * 10**11,
        "optim.schedule.final": 0.1,
        "balancing.kind": "smebu",
        "balancing.rate": 5e-4,
        "balancing.kappa": 2.0,
        "balancing.beta": 0.5,
        "balancing.sequence_loss": 1e-4,
        "loss.z": 1e-6,
        "parallel.expert": 8,
    },
    "nano_context": NANO_AND_MINI_CONTEXT | {"data.sequence_length": 262_144, "optim.adamw.lr": 3e-5},
    "mini_context": NANO_AND_MINI_CONTEXT | {"data.sequence_length": 131_072, "optim.adamw.lr": 2e-5},
    "large_context": LENGTH_BIAS
    | {
        "data.sequence_length": 262_144,
        "data.document_mask": True,
        "optim.muon.lr": 8e-5,
        "optim.adamw.lr": 2e-5,
        "optim.schedule.decay": "cosine",
        "optim.schedule.final": 0.5,  # 1/20 of the peak
        "balancing.kind": "smebu",
        "balancing.rate": 5e-4,
        "balancing.kappa": 2.0,
        "balancing.beta": 0.5,
        "balancing.sequence_loss": 1e-4,
        "loss.z": 1e-6,
        "parallel.replicate": -1,
        "parallel.shard": None,
        "parallel.expert": 8,
        "parallel.context": 4,
    },
}
GPUS = {"nano": 512, "mini": 512, "large": 2048}
GPUS |= {f"{name}_context": gpus for name, gpus in GPUS.items()}
GPUS |= {"sft": 8, "continue": 8}
PRETRAINED = ("nano", "mini", "large")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads(path: Path, tmp_path: Path) -> None:
    """It is the same after saving; its sources are folders under data/."""
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.data.train
    assert all(folder.startswith("data/") for folder in config.data.train.values())


@pytest.mark.parametrize("name", list(REPORT))
def test_values_of_the_report(name: str) -> None:
    """Against values copied here from the report; the model sizes are those of table 1."""
    config = load_config(CONFIGS / f"{name}.yaml")
    flat = flatten(config)
    expected = {key: value for key, value in REPORT[name].items() if value is not None}
    assert {key: flat[key] for key in expected} == expected
    assert config.parallel.shard * config.parallel.context == 128
    assert config.model == ZOO[name.removesuffix("_context")]


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_batch_ramp_of_nano_and_mini(name: str) -> None:
    """One ramp entry, to 8192, within the run."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert [entry.sequences for entry in config.batch.ramp] == [8192]
    assert 0 < config.batch.ramp[0].tokens < config.run.tokens


@pytest.mark.parametrize("name", PRETRAINED)
def test_batches_and_streams_divide_by_the_gpus(name: str) -> None:
    """Every GPU is a data rank: its share of each batch is whole and fits the microbatch; streams divide evenly."""
    config, gpus = load_config(CONFIGS / f"{name}.yaml"), GPUS[name]
    assert config.data.streams % gpus == 0
    assert gpus % (config.parallel.shard * config.parallel.context) == 0
    assert config.parallel.shard % config.parallel.expert == 0
    sizes = [config.batch.sequences, *(entry.sequences for entry in config.batch.ramp)]
    assert [size % gpus for size in sizes] == [0] * len(sizes)
    shares = [size // gpus for size in sizes]
    assert shares == ([6, 8] if name == "large" else [8, 16])
    assert all(share % min(share, config.batch.microbatch) == 0 for share in shares)


@pytest.mark.parametrize("name", PRETRAINED)
def test_context_extension_continues_the_run(name: str) -> None:
    """A row for each data rank; as many tokens a step as at the end of the run that it extends; a tenth of its rates.

    Nano's and Mini's rates fell to 0 and rise again; Large's go on where they ended. All else of the recipe is equal.
    """
    before, config = (load_config(CONFIGS / f"{file}.yaml") for file in (name, f"{name}_context"))
    data_ranks = GPUS[name] // config.parallel.context
    assert config.batch.sequences == data_ranks
    assert config.data.streams % data_ranks == 0
    step_tokens = before.batch.ramp[-1].sequences * before.data.sequence_length
    assert config.batch.sequences * config.data.sequence_length == step_tokens
    assert config.optim.muon.lr == pytest.approx(before.optim.muon.lr / 10)
    assert config.optim.adamw.lr == pytest.approx(before.optim.adamw.lr / 10)
    warmup, ends_at = config.optim.schedule.warmup_steps, before.optim.schedule.final
    assert (warmup > 0) == (ends_at == 0)
    assert warmup or ends_at == pytest.approx(1 / 10)
    schedule = replace(before.optim.schedule, **asdict(config.optim.schedule))
    rates = replace(before.optim, muon=config.optim.muon, adamw=config.optim.adamw, schedule=schedule)
    assert config.optim == rates
    assert replace(config.optim.muon, lr=before.optim.muon.lr) == before.optim.muon
    assert replace(config.optim.adamw, lr=before.optim.adamw.lr) == before.optim.adamw
    assert (config.balancing, config.loss) == (before.balancing, before.loss)
    assert config.data.document_mask == before.data.document_mask
    assert max(config.evaluation.needles.lengths) == config.model.max_positions


def settings(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key and line (from 0) of every setting; a mapping in braces is one setting."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from settings(value, f"{name}.")
        else:
            yield name, key.start_mark.line


@pytest.mark.parametrize("name", list(REPORT))
def test_values_not_from_the_report_are_commented(name: str) -> None:
    """A setting that is not in REPORT, except model.name, has a comment that says "not from the" report or text."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    for key, line in settings(yaml.compose(text)):
        from_report = any(f"{report}.".startswith(f"{key}.") for report in REPORT[name])
        if not from_report and key != "model.name":
            assert re.search("not from the (report|text)", lines[line].partition("#")[2]), lines[line]


@pytest.mark.parametrize(("name", "layers", "gpu"), [("nano_1gpu", 56, "h200"), ("nano_80gb", 28, "h100")])
def test_nano_on_one_gpu_fits(name: str, layers: int, gpu: str) -> None:
    """Its memory table is the plan's count for one rank, to the last digit that it prints."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.model == replace(ZOO["nano"], layers=layers)
    assert config.batch.sequences * config.data.sequence_length == 524_288
    assert config.batch.sequences % config.batch.microbatch == 0
    plan = plan_of(name, 1, gpu)
    assert plan.fits
    parts = plan.state | plan.memory.parts | {"state": sum(plan.state.values()), "in all": plan.memory.total}
    memory = {part: size / 1e9 for part, size in parts.items()}
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    rows = {
        "parameters, fp32": memory["parameters"],
        "gradients, fp32": memory["gradients"],
        "Muon momentum, fp32": memory["Muon momentum"],
        "AdamW moments, fp32": memory["AdamW moments"],
        "state  ": memory["state"],
        "copies in bf16": memory["gathered weights"],
        "in all": memory["in all"],
    }
    for label, size in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"#   {label}"))
        printed = re.findall(r"(?<= )\d+\.\d(?= |$)", line)[0]
        assert printed == f"{size:.1f}", line
    assert "38,147" in as_text(plan)
    assert "tokens: 20e9 # 38,147 steps" in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_plans(path: Path) -> None:
    """On the number of GPUs that its comments name, it fits a GPU of 141 GB or, Large, of 288; nano_80gb one of 80."""
    gpu = {"large": "b300", "large_context": "b300", "nano_80gb": "h100"}.get(path.stem, "h200")
    plan = plan_of(path.stem, GPUS.get(path.stem, 1), gpu)
    assert plan.fits
    assert all(step.seconds.step > 0 for step in plan.steps)
    if path.stem.endswith("_context"):
        assert memory_table(path)[plan.config.parallel.context] == f"{plan.memory.total / 1e9:.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_memory_of_context_extension(name: str) -> None:
    """The other columns of the memory tables: a row for each data rank, FSDP groups of 128."""
    path = CONFIGS / f"{name}_context.yaml"
    table = memory_table(path)
    assert list(table) == [1, 2, 4, 8]
    for context, total in table.items():
        config = load_config(path, [f"parallel.context={context}", f"parallel.shard={128 // context}"])
        plan = make_plan(config, config.batch.sequences * context, "b300" if name == "large" else "h200")
        assert total == f"{plan.memory.total / 1e9:.1f}", context


def memory_table(path: Path) -> dict[int, str]:
    """parallel.context → GB in all, from the comment of a config."""
    rows = [line.removeprefix("#").split() for line in path.read_text(encoding="utf-8").splitlines()]
    (contexts,) = (row[1:] for row in rows if row[:1] == ["parallel.context"])
    (totals,) = (row[2:] for row in rows if row[:2] == ["in", "all"])
    return dict(zip(map(int, contexts), totals, strict=True))


@pytest.mark.parametrize(
    ("name", "shares"), [("nano", (7, 1.8, 1.2)), ("mini", (7, 1.8, 1.2)), ("large", (11.05, 3.05, 2.9))]
)
def test_phases_of_the_report(name: str, shares: tuple) -> None:
    """In 10¹² tokens. Large's last phase starts with the decay, by the report's figure; its text has a later start."""
    config = load_config(CONFIGS / f"{name}.yaml")
    begins = [phase.tokens for phase in resolved_phases(config.data)]
    assert [end - begin for begin, end in pairwise([*begins, config.run.tokens])] == [int(t * 1e12) for t in shares]
    last = resolved_phases(config.data)[-1]
    assert (last.packing, last.rsdb_size) == (("rsdb", 1024) if name == "large" else ("sequential", 1024))
    assert begins[-1] == config.optim.schedule.decay_start_tokens


@pytest.mark.parametrize(
    ("name", "first_run", "old"), [("continue", "nano", "general"), ("continue_smoke", "smoke", "code")]
)
def test_continued_pretraining(name: str, first_run: str, old: str) -> None:
    """From a folder's weights: 5 % replay, rates of 10 to 100 % of the first run's peak that decay to 0, a budget."""
    path = CONFIGS / f"{name}.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["init"]["hf"]
    config, first = load_config(path), load_config(CONFIGS / f"{first_run}.yaml")
    new = next(iter(config.data.train))
    shares = config.data.mixture
    assert shares[new] / sum(shares.values()) == pytest.approx(0.95)
    assert {new, old} <= config.data.validation.keys()
    for key in ("muon", "adamw"):
        assert 0.1 <= getattr(config.optim, key).lr / getattr(first.optim, key).lr <= 1
    assert config.optim.schedule.warmup_steps > 0
    assert (config.optim.schedule.decay, config.optim.schedule.final) == ("linear", 0)
    assert config.evaluation.every % config.checkpoint.every == 0  # each evaluated model can be loaded
    assert (list(config.health.forgetting), config.health.forgetting_action) == ([old], "warn")


@pytest.mark.parametrize("name", ["sft", "sft_smoke"])
def test_fine_tuning(name: str) -> None:
    """It starts from a base model's weights alone, trains masked tokens of whole examples, and ends at a rate of 0."""
    path = CONFIGS / f"{name}.yaml"
    init = yaml.safe_load(path.read_text(encoding="utf-8"))["init"]
    config = load_config(path)
    assert init["hf" if name == "sft" else "run"]
    assert config.init.keep == "weights"
    assert (config.data.loss, config.data.packing, config.data.document_mask) == ("masked", "best_fit", True)
    assert (config.optim.schedule.decay, config.optim.schedule.final) == ("linear", 0)
    if name == "sft":
        assert config.data.sequence_length == 65_536
        base = load_config(CONFIGS / "nano.yaml")
        assert config.optim.muon.lr == pytest.approx(base.optim.muon.lr / 10)
        assert config.optim.adamw.lr == pytest.approx(base.optim.adamw.lr / 10)
