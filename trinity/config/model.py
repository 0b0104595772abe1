"""ModelConfig, the sizes of one model, and ZOO: the report's models (table 1).

A ModelConfig only holds values and checks that they fit together; trinity.models builds the model.
"""

import math
from dataclasses import dataclass, replace

from trinity.errors import UserError

MOST_PER_FIELD = 1 << 16
"""Most layers, heads and features per head: a thousand times the report's, and still quick to build."""
MOST_ELEMENTS = 1 << 44
"""Most elements of one tensor: thousands of times those of the report's largest."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model. Widths are numbers of features."""

    name: str = "smoke"
    """Model of the zoo whose sizes are the defaults of the other fields: smoke, nano, mini or large. The sizes of
    init.hf or init.run win over it."""
    vocab_size: int = 8192
    """V: vocabulary size, the rows of the embedding and of the LM head."""
    width: int = 256
    """d: model width (hidden size)."""
    layers: int = 5
    """L: number of transformer blocks (layers), dense ones included."""
    dense_layers: int = 1
    """Number of blocks, from the first, with a dense FFN in place of an MoE layer."""
    dense_width: int = 768
    """Width of the dense FFN (intermediate size)."""
    heads: int = 4
    """h_q: number of query heads."""
    kv_heads: int = 2
    """h_kv: number of key and value heads; divides h_q."""
    head_dim: int = 64
    """d_h: width of one attention head, even; h_q·d_h may differ from d."""
    window: int = 128
    """w: sliding attention window of local layers, in tokens, including the token itself."""
    global_every: int = 4
    """Period of global attention: layer i (from 0) is global if (i + 1) mod global_every = 0, else local."""
    experts: int = 16
    """N_r: number of routed experts per MoE layer."""
    active_experts: int = 4
    """K_r: routed experts per token (top-k)."""
    shared_experts: int = 1
    """Number of shared experts, which process every token; stored as one FFN of shared_experts · expert_width."""
    expert_width: int = 96
    """Width of one expert (intermediate size)."""
    route_scale: float = 2.826
    """Factor on the normalised gates of the routed experts, eq. 18."""
    rope_theta: float = 10_000.0
    """Base θ of RoPE, which only local layers have."""
    norm_eps: float = 1e-5
    """ε of every RMSNorm."""
    max_positions: int = 2048
    """Context length in exported configs, in tokens; it does not change the model."""

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def init_std(self) -> float:
        """σ = 0.5/√d of the normal distribution before truncation (eq. 37)."""
        return 0.5 / math.sqrt(self.width)

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return self.layers - self.dense_layers

    def is_global(self, layer: int) -> bool:
        """Whether layer `layer`, from 0, has global attention, without positional encoding."""
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
        if getattr(c, name) > MOST_PER_FIELD:
            raise UserError(f"model.{name}={getattr(c, name)} must be at most {MOST_PER_FIELD}")
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
    """Refuse a model with a matrix, or a layer's stacked expert matrices, larger than any machine holds.

    Raises:
        UserError: naming the sizes whose product is too large.
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
        if numbers > MOST_ELEMENTS:
            raise UserError(f"model.{names} makes {numbers} numbers, at most {MOST_ELEMENTS} can be; use smaller sizes")


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
