"""The model architecture, and the sizes of the report's models (ZOO)."""

from trinity.config.model import ZOO, ModelConfig
from trinity.models.param_roles import Role, parameter_roles
from trinity.models.trinity import Losses, Trinity, next_tokens

__all__ = ["ZOO", "Losses", "ModelConfig", "Role", "Trinity", "next_tokens", "parameter_roles"]
