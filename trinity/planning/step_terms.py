"""Where a microbatch goes: seconds of each part of the model, and of the copies around it, on one GPU.

Every figure is a prediction from bytes and FLOPs; none has been measured in a run. One pass of one part takes

    max(FLOPs / (share · peak), operands / rate) + elementwise / rate          rate = SHARES["memory"] · bandwidth

where `operands` are the bytes that its products read and write, and `elementwise` those of its other kernels. A part is
recomputed as far as `recompute` says; then its forward pass counts twice.

What costs time beside the model's own arithmetic is a field of Implementation: a price of the present code, which a
change to the code can remove. PRESENT is the code as it is.

Shapes: T tokens of a microbatch, L layers, M MoE layers, D width, Q and G widths of queries and of keys, F expert
width, K active of E experts, P ranks of the expert dimension, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.models.flops import flops_per_token
from trinity.planning.activations import tokens_per_microbatch
from trinity.planning.schedule_segments import RankLoad
from trinity_kernels.cross_entropy import chunk_tokens

SHARES = {"products": 0.69, "experts forward": 0.53, "experts backward": 0.51, "fp32 products": 0.75, "memory": 0.81}
"""Shares of the data sheet's rates. Not from the report. Of an H200: products 680 of 989 TFLOP/s, between the 789 that
cuBLAS was measured at on it and what published Triton kernels reach; experts 520 and 500, the goals of the kernels; in
fp32 without tensor cores 50 of 67 (assumed); memory 3.9 of 4.8 TB/s, where a copy was measured at 4.3."""

FLASH_4, FLASH_2 = (0.67, 0.50), (335e12, 322e12)
"""Attention's core in forward and backward. FlashAttention 4 (and 3): 667 and 490 of 989 TFLOP/s on an H100, published,
as shares of the peak. FlashAttention 2: 335 and 322 TFLOP/s on an H100, published; it uses no tensor-core instruction
newer than Ampere's, so the rates, not the shares, are kept for faster GPUs (assumed)."""

OLDER = (0.70, 0.60)
"""Most of the peak that FlashAttention 2 reaches, in forward and backward: on GPUs whose peak is lower."""

OTHER_ENGINES = {"flex": 0.68, "sdpa": 0.5}
"""Rates of other engines as shares of FlashAttention 4's: flex 0.6 to 0.76 (published); sdpa assumed. That sdpa also
computes the scores outside a window is not counted."""

ATOMIC = 0.2e-9
"""Seconds of one element of a scatter_add_ into few addresses. Assumed."""

EXPERT_TILE = 64
"""Rows by which an expert's last tile is incomplete, on average: half of the largest tile of the kernels."""


class Implementation(NamedTuple):
    """Costs that a run has beside the model's arithmetic. Defaults: this code's.

    router: "fp32", products in fp32 without tensor cores on a copy of x; "split": of W in three bf16 parts, on x.
    separate_statistics: sequence loss and router entropy are some fifteen torch kernels a layer, computed in any case;
        else the routing kernel computes them.
    repeats_keys: keys and values are repeated to as many heads as the queries have.
    joins_gradients: gradients of q, k, v and gate are copied into one tensor.
    adds_shared: the shared expert's output is added in a pass of its own, not while routed rows are summed.
    divides_gradients: FSDP2 divides gradients by 1 into a new tensor.
    keeps_weights: on one shard with deferred gradients, weights are copied to the compute dtype once a step.
    hands_over: gradients that one rank has alone stay where autograd leaves them, and with weights in the master dtype
        modules compute where they are.
    adds_in_place: with deferred gradients, kernels add the experts' weight gradients to the main gradient.
    waits_for_sizes: expert parallelism makes the host wait for the sizes of the exchange, once a layer.
    op_us: the host's microseconds for the autograd of one operation in forward and backward.
    """

    router: Literal["fp32", "split"] = "split"
    separate_statistics: bool = False
    repeats_keys: bool = False
    joins_gradients: bool = False
    adds_shared: bool = False
    divides_gradients: bool = False
    keeps_weights: bool = True
    hands_over: bool = True
    adds_in_place: bool = True
    waits_for_sizes: bool = True
    op_us: float = 47.0


PRESENT = Implementation()


class Term(NamedTuple):
    """Seconds of one part in one microbatch.

    kind: "products", "attention" or "memory": what StepSeconds counts it as.
    forward, backward: of the passes. again: of what activation checkpointing recomputes.
    """

    name: str
    kind: Literal["products", "attention", "memory"]
    forward: float
    backward: float
    again: float = 0.0

    @property
    def seconds(self) -> float:
        """All passes."""
        return self.forward + self.backward + self.again


class Pass(NamedTuple):
    """One pass of one part: FLOPs and their rate in FLOP/s, bytes of the products and of other kernels (see above)."""

    flops: float = 0.0
    rate: float = 1.0
    operands: float = 0.0
    elementwise: float = 0.0

    def seconds(self, bandwidth: float) -> float:
        """Seconds at `bandwidth` bytes/s."""
        return max(self.flops / self.rate, self.operands / bandwidth) + self.elementwise / bandwidth


def memory_rate(gpu: GPU) -> float:
    """Bytes/s that memory-bound kernels reach."""
    return SHARES["memory"] * gpu.bandwidth


def attention_engine(config: RunConfig) -> str:
    """The engine that a run takes; auto: torch's FlashAttention 2 (varlen) in 16 bits, as packages may be missing."""
    named = config.kernels.attention
    return named if named != "auto" else "varlen" if config.precision.compute == "bfloat16" else "sdpa"


def attention_rates(engine: str, peak: float, gpu: GPU) -> tuple[float, float]:
    """FLOP/s of attention's core in forward and backward."""
    if engine in ("varlen", "flash2") and gpu.name != "cpu":
        return min(FLASH_2[0], OLDER[0] * peak), min(FLASH_2[1], OLDER[1] * peak)
    share = 1.0 if gpu.name == "cpu" else OTHER_ENGINES.get(engine, 1.0)
    return share * FLASH_4[0] * peak, share * FLASH_4[1] * peak


def recomputed_parts(config: RunConfig) -> set[str]:
    """Parts of flops_per_token whose forward pass runs again in backward."""
    cheap = {"attention projections", "dense FFN", "router", "shared experts"}
    kinds = {"none": set(), "selective": cheap, "block": cheap | {"attention core", "routed experts"}}
    parts = kinds[config.recompute]
    # selective checkpointing sees no operation of these engines (trinity.parallel.activation_checkpoint)
    hidden = config.recompute == "selective" and attention_engine(config) in ("flex", "flash4")
    return parts | {"attention core"} if hidden else parts


def model_terms(
    config: RunConfig,
    load: RankLoad,
    expert_ranks: int,
    deferred: bool,
    gpu: GPU,
    implementation: Implementation = PRESENT,
) -> list[Term]:
    """Terms of the model's parts for one microbatch; a prediction.

    Args:
        config: at the segment's sequence length.
        expert_ranks: P.
        deferred: whether gradients are reduced once a step.
    """
    parts = _Parts(config, load, expert_ranks, deferred, gpu, implementation)
    again, bandwidth = recomputed_parts(config), memory_rate(gpu)
    up = 2 / 3 if config.kernels.experts_recompute else 0.0  # of the experts' three products in forward
    kept = config.recompute == "none"
    rows: list[tuple[str, Literal["products", "attention", "memory"], tuple[Pass, Pass], float]] = [
        ("embedding", "memory", parts.embedding(), 0.0),
        ("attention, projections", "products", parts.projections(), "attention projections" in again),
        (f"attention, core: {attention_engine(config)}", "attention", parts.core(), "attention core" in again),
        ("norms, RoPE, gates", "memory", parts.norms(), not kept),
        ("dense and shared FFN", "products", parts.ffn(), "dense FFN" in again),
        ("router", "products", parts.router(), "router" in again),
        ("routed experts, products", "products", parts.experts(), ("routed experts" in again) + up),
        ("routed experts, sums of rows", "memory", parts.sums(), "routed experts" in again),
        ("head and loss", "products", parts.head(), 0.0),
    ]
    terms = []
    for name, kind, (forward, backward), times in rows:
        seconds = forward.seconds(bandwidth)
        terms.append(Term(name, kind, seconds, backward.seconds(bandwidth), times * seconds))
    return [term for term in terms if term.seconds > 0]


class _Parts:
    """Forward and backward pass of each part of the model."""

    def __init__(
        self,
        config: RunConfig,
        load: RankLoad,
        expert_ranks: int,
        deferred: bool,
        gpu: GPU,
        implementation: Implementation,
    ) -> None:
        self.model, self.gpu, self.has, self.deferred = config.model, gpu, implementation, deferred
        self.tokens = T = tokens_per_microbatch(config, load.microbatch)
        length = config.data.sequence_length
        self.flops = {part: T * flops for part, flops in flops_per_token(config.model, length).items()}
        self.size = getattr(torch, config.precision.compute).itemsize
        self.bf16 = config.precision.compute == "bfloat16"
        self.peak = gpu.bf16 if self.bf16 else gpu.fp32
        self.rate = SHARES["products"] * self.peak
        self.core_rates = attention_rates(attention_engine(config), self.peak, gpu)
        self.query_width = self.model.heads * self.model.head_dim
        self.key_width = self.model.kv_heads * self.model.head_dim
        self.expert_ranks = expert_ranks
        self.sequence_loss = config.balancing.sequence_loss

    def _bytes(self, widths: float) -> float:
        """Bytes of `widths` numbers a token in the compute dtype."""
        return self.tokens * self.size * widths

    def embedding(self) -> tuple[Pass, Pass]:
        """Gather, then scale; backward scales, and adds to a dense gradient."""
        D, V = self.model.width, self.model.vocab_size
        return Pass(elementwise=self._bytes(4 * D)), Pass(elementwise=self._bytes(4 * D) + V * D * self.size)

    def projections(self) -> tuple[Pass, Pass]:
        """q, k, v, gate in one product, and the output; backward has two products for each of them."""
        L, D, Q, G = self.model.layers, self.model.width, self.query_width, self.key_width
        flops, operands = self.flops["attention projections"], L * self._bytes(2 * D + 3 * Q + 2 * G)
        joined = L * self._bytes(2 * (2 * Q + 2 * G)) if self.has.joins_gradients else 0.0
        return Pass(flops, self.rate, operands), Pass(2 * flops, self.rate, 2 * operands, joined)

    def core(self) -> tuple[Pass, Pass]:
        """Two products in forward, five in backward; repeated keys and values are written, their gradients summed."""
        flops, (forward, backward) = self.flops["attention core"], self.core_rates
        Q, G = self.query_width, self.key_width
        repeated = self.model.layers * self._bytes(2 * Q + 2 * G) if self.has.repeats_keys else 0.0
        return Pass(flops, forward, 0, repeated), Pass(2.5 * flops, backward, 0, repeated)

    def norms(self) -> tuple[Pass, Pass]:
        """rms_norm reads and writes 2 and 4 rows of D in forward and backward, add_norm 4 and 6, norm_add 3 and 3;
        qk_norm 2 and 3 of Q + G; the gate 3 and 5 of Q."""
        L, D, Q, G = self.model.layers, self.model.width, self.query_width, self.key_width
        forward, backward = 9 * D + 2 * (Q + G) + 3 * Q, 13 * D + 3 * (Q + G) + 5 * Q
        return Pass(elementwise=L * self._bytes(forward)), Pass(elementwise=L * self._bytes(backward))

    def ffn(self) -> tuple[Pass, Pass]:
        """Three products a layer, and SwiGLU, which moves 3 rows of the hidden width in forward and 5 in backward."""
        model = self.model
        hidden = model.dense_layers * model.dense_width + model.moe_layers * model.shared_experts * model.expert_width
        flops = self.flops["dense FFN"] + self.flops["shared experts"]
        operands = self._bytes(2 * model.layers * model.width + 3 * hidden)
        forward = Pass(flops, self.rate, operands, self._bytes(3 * hidden))
        return forward, Pass(2 * flops, self.rate, 2 * operands, self._bytes(5 * hidden))

    def router(self) -> tuple[Pass, Pass]:
        """The product with W, and three passes over the scores in fp32 in forward, three in backward.

        In fp32, x is copied to 4 bytes in forward and its gradient from 4 bytes in backward. In three parts there are
        three bf16 products for each one. Separate statistics pass ten times over the scores, and six times in backward
        if the loss has them.
        """
        M, D, E, K = self.model.moe_layers, self.model.width, self.model.experts, self.model.active_experts
        flops, scores = self.flops["router"], 4.0 * M * self.tokens * E
        forward, backward = 3 * scores, 3 * scores
        if self.has.separate_statistics:
            forward += 10 * scores + M * self.tokens * K * ATOMIC * memory_rate(self.gpu)
            backward += 6 * scores if self.sequence_loss else 0.0
        if self.bf16 and self.has.router == "split":
            operands = M * self._bytes(D) + scores
            return Pass(3 * flops, self.rate, operands, forward), Pass(6 * flops, self.rate, 2 * operands, backward)
        rate = SHARES["fp32 products"] * self.gpu.fp32
        copied = M * self.tokens * D * (4 + self.size) if self.bf16 else 0.0
        operands = M * self.tokens * 4 * D + scores
        return Pass(flops, rate, operands, forward + copied), Pass(2 * flops, rate, 2 * operands, backward + copied)

    def experts(self) -> tuple[Pass, Pass]:
        """The grouped products, with incomplete tiles; kept for backward: X and H.

        Forward: X, H, A, A again, Y. Backward: dO, H, dH, A'; dO, A', dH, X; dH, dX; and the weight gradients, written
        once or, in place, read and written in fp32.
        """
        model, share = self.model, self.model.experts / self.expert_ranks
        M, D, F = model.moe_layers, model.width, model.expert_width
        rows = self.tokens * model.active_experts
        weights = M * share * 3 * F * D
        added = 8 if self.deferred and self.has.adds_in_place else self.size
        flops = self.flops["routed experts"] * (1 + (share * EXPERT_TILE / rows if rows else 0.0))
        forward = M * rows * self.size * (2 * D + 4 * F) + weights * self.size
        backward = M * rows * self.size * (4 * D + 10 * F) + weights * (2 * self.size + added)
        up, down = SHARES["experts forward"] * self.peak, SHARES["experts backward"] * self.peak
        return Pass(flops, up, forward), Pass(2 * flops, down, backward)

    def sums(self) -> tuple[Pass, Pass]:
        """Each token reads K rows and writes their sum, forward and backward; the shared expert's output is added."""
        M, D, K = self.model.moe_layers, self.model.width, self.model.active_experts
        shared = 3 if self.has.adds_shared else 1
        return Pass(elementwise=M * self._bytes((K + 1 + shared) * D)), Pass(elementwise=M * self._bytes((K + 1) * D))

    def head(self) -> tuple[Pass, Pass]:
        """All three products in forward, in chunks of tokens: logits are read twice and written once, and the weight's
        gradient is read and written in fp32 for each chunk; backward scales both gradients."""
        V, D = self.model.vocab_size, self.model.width
        chunks = -(-self.tokens // chunk_tokens(self.tokens, V, self.size, "cuda"))
        forward = self._bytes(3 * V) + 8 * V * D * chunks
        return Pass(3 * self.flops["head"], self.rate, 0, forward), Pass(elementwise=self._bytes(2 * D) + 6 * V * D)
