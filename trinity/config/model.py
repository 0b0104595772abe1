"""The shape of one model, and the report's models (table 1) as values.

A config only holds values and checks that they fit together; trinity.models builds from it.
"""

import math
from dataclasses import dataclass, replace

from trinity.errors import UserError

MOST = 1 << 16
"""Most layers, heads and features of a head: a thousand times the report's, and still quick to build."""
LARGEST = 1 << 44
"""Most elements of one tensor: thousands of times those of the report's largest."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model. Widths are numbers of features, never bytes."""

    name: str = "smoke"
    """Model whose sizes the other fields start from: smoke, nano, mini or large. init.hf and init.run win over it."""
    vocab_size: int = 8192
    """V: vocabulary size, the rows of the embedding and of the LM head."""
    width: int = 256
    """d: model width (hidden size)."""
    layers: int = 5
    """L: number of transformer blocks, dense ones included."""
    dense_layers: int = 1
    """Number of first blocks with a dense FFN in place of an MoE layer."""
    dense_width: int = 768
    """Width of the dense FFN (intermediate size)."""
    heads: int = 4
    """h_q: number of query heads."""
    kv_heads: int = 2
    """h_kv: number of key and value heads; divides h_q."""
    head_dim: int = 64
    """d_h: width of one head, even; h_q·d_h need not be d."""
    window: int = 128
    """w: sliding window of local layers, in tokens, the token itself included."""
    global_every: int = 4
    """Layer i is global where (i + 1) mod global_every = 0, else local."""
    experts: int = 16
    """N_r: number of routed experts per MoE layer."""
    active_experts: int = 4
    """K_r: routed experts per token (top-k)."""
    shared_experts: int = 1
    """Number of shared experts, which see every token; held as one FFN of this many expert widths."""
    expert_width: int = 96
    """Width of one expert (intermediate size)."""
    route_scale: float = 2.826
    """Factor on the gates after they are normalised, eq. 18."""
    rope_theta: float = 10_000.0
    """Base of RoPE, which local layers alone have."""
    norm_eps: float = 1e-5
    """ε of every RMSNorm."""
    max_positions: int = 2048
    """Context length stated in exported configs, in tokens; nothing in the model depends on it."""

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def init_std(self) -> float:
        """σ = 0.5/√d of the truncated normal, before its cut (eq. 37)."""
        return 0.5 / math.sqrt(self.width)

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return self.layers - self.dense_layers

    def is_global(self, layer: int) -> bool:
        """Whether layer (0-based) sees everything before it, without positional encoding."""
        return (layer + 1) % self.global_every == 0


def check_model(config: ModelConfig) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        UserError: naming the value and what would fit.
    """
    c = config
    for name in (
        "vocab_size",
        "width",
        "layers",
        "dense_width",
        "heads",
        "kv_heads",
        "head_dim",
        "window",
        "global_every",
        "experts",
        "active_experts",
        "shared_experts",
        "expert_width",
        "max_positions",
    ):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)} must be at least 1")
    for name in ("rope_theta", "norm_eps", "route_scale"):
        if not getattr(c, name) > 0:
            raise UserError(f"model.{name}={getattr(c, name)} must be greater than 0")
        if getattr(c, name) == math.inf:
            raise UserError(f"model.{name}={getattr(c, name)} must be finite")
    for name in ("layers", "heads", "head_dim"):
        if getattr(c, name) > MOST:
            raise UserError(f"model.{name}={getattr(c, name)} must be at most {MOST}")
    if c.heads % c.kv_heads:
        allowed = [n for n in range(1, c.heads + 1) if c.heads % n == 0]
        raise UserError(
            f"model.heads={c.heads} is not a multiple of model.kv_heads={c.kv_heads}; "
            f"use model.kv_heads={' or '.join(map(str, allowed))}"
        )
    if c.active_experts > c.experts:
        raise UserError(
            f"model.active_experts={c.active_experts} is more than model.experts={c.experts}; "
            f"use model.active_experts={c.experts} or less"
        )
    if not 0 <= c.dense_layers <= c.layers:
        raise UserError(f"model.dense_layers={c.dense_layers} is not between 0 and model.layers={c.layers}")
    if c.head_dim % 2:
        raise UserError(f"model.head_dim={c.head_dim} is odd; RoPE turns pairs, so use model.head_dim={c.head_dim + 1}")


def check_size(config: ModelConfig) -> None:
    """Refuse a model of which a single matrix, or the experts' of a layer, is larger than any machine holds.

    Raises:
        UserError: naming the sizes whose product it is.
    """
    c = config
    products = {
        "vocab_size × width": c.vocab_size * c.width,
        "heads × head_dim × width": c.heads * c.head_dim * c.width,
        "dense_width × width": c.dense_width * c.width,
        "experts × width": c.experts * c.width,
        "experts × expert_width × width": c.experts * c.expert_width * c.width,
        "shared_experts × expert_width × width": c.shared_experts * c.expert_width * c.width,
    }
    for names, numbers in products.items():
        if numbers > LARGEST:
            raise UserError(f"model.{names} makes {numbers} numbers, at most {LARGEST} can be; use smaller sizes")


_SMOKE = ModelConfig()
_NANO = ModelConfig(
    name="nano", vocab_size=200_192, width=1024, layers=56, dense_layers=2, dense_width=3072, heads=8, kv_heads=2,
    head_dim=128, window=2048, experts=128, active_experts=8, expert_width=256, max_positions=131_072,
)  # fmt: skip
_MINI = replace(
    _NANO, name="mini", width=2048, layers=32, dense_width=6144, heads=32, kv_heads=4, expert_width=1024
)  # fmt: skip
_LARGE = replace(
    _NANO, name="large", width=3072, layers=60, dense_layers=6, dense_width=12_288, heads=48, kv_heads=8, window=4096,
    experts=256, active_experts=4, expert_width=3072, route_scale=2.448, max_positions=524_288,
)  # fmt: skip

ZOO: dict[str, ModelConfig] = {"smoke": _SMOKE, "nano": _NANO, "mini": _MINI, "large": _LARGE}
"""The report's models by name, and `smoke`, a tiny one of the same shape for CPUs."""
