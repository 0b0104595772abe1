"""A small config for plans, changed by words as on a command line."""

from trinity.config.load import OmegaConf, build_config, to_yaml
from trinity.config.run import RunConfig

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
