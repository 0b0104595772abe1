"""A small config for plans, changed by words as on a command line; and the plans of the files in configs/."""

from functools import cache
from pathlib import Path

from trinity.config.load import OmegaConf, build_config, load_config, to_yaml
from trinity.config.run import RunConfig
from trinity.planning.plan import Plan, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"

SMALL = {
    "model": {
        "width": 64,
        "layers": 4,
        "dense_width": 64,
        "experts": 8,
        "active_experts": 2,
        "expert_width": 32,
        "vocab_size": 512,
    },
    "run": {"steps": 10},
    "data": {"sequence_length": 128},
    "batch": {"sequences": 16, "microbatch": 8},
}


def config_of(*words: str) -> RunConfig:
    """SMALL with settings `a.b=value`."""
    return build_config([("test", OmegaConf.create(SMALL)), ("test", OmegaConf.from_dotlist(list(words)))])


def reload(config: RunConfig, *words: str) -> RunConfig:
    """The config with further settings, as on a command line."""
    raw = OmegaConf.create(to_yaml(config))
    return build_config([("test", raw), ("test", OmegaConf.from_dotlist(list(words)))])


@cache
def plan_of(name: str, gpus: int, gpu: str) -> Plan:
    """The plan of configs/NAME.yaml, made once for all tests: those of the large models take seconds."""
    return make_plan(load_config(CONFIGS / f"{name}.yaml"), gpus, gpu)
