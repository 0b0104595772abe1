"""The config of a run: its schema, the report's models, loading, checks, and which keys may change on resume."""

from trinity.config.load import load_config, save_config, to_yaml
from trinity.config.model import ZOO, ModelConfig
from trinity.config.paths import kept_tokenizer, run_directory, tokenizer_folder
from trinity.config.run import RunConfig

__all__ = [
    "ZOO",
    "ModelConfig",
    "RunConfig",
    "kept_tokenizer",
    "load_config",
    "run_directory",
    "save_config",
    "to_yaml",
    "tokenizer_folder",
]
