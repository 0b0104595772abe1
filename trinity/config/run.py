"""The settings of a run: every key that a config file may hold, with its type, default and meaning.

docs/config.md is made of these docstrings (trinity.config.reference). A default that is the report's says "From the
report", with the equation or model; one of the recipe's that the report does not give says "Not from the report" and
why. Token counts may be written 17e12. Fields are checked together in trinity.config.check.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trinity.config.model import ModelConfig


@dataclass
class RunSection:
    """Name, directory, seed and length of the run."""

    name: str = "trinity"
    """Name in logs and reports; also the run directory, runs/NAME, where run.dir is not given."""
    dir: str | None = None
    """Run directory: configs, metrics, checkpoints, exports. Default: runs/NAME of run.name."""
    seed: int = 0
    """Random seed of the initial weights and of the order of the data."""
    steps: int | None = None
    """Length of the run in optimizer steps. Give this or run.tokens."""
    tokens: int | None = None
    """Length of the run in tokens: it ends after the first step that reaches them. Give this or run.steps."""
    deterministic: bool = False
    """Use deterministic operations only, and fail where there is none (CUDA; on a CPU all are deterministic)."""
    threads: int | None = None
    """CPU threads per process. Default: the machine's cores divided by its processes."""


@dataclass
class InitConfig:
    """Initial weights of the run: random by default, or those of a Hugging Face folder or of another run.

    The model's sizes then come from there as well, whatever model.name says; a size given under `model` must be equal.
    The first evaluation is made before the first step.
    """

    hf: str | None = None
    """Hugging Face folder of an AfMoE model: config.json, safetensors, and a tokenizer unless data.tokenizer is
    given."""
    run: str | None = None
    """Directory of another run."""
    step: int | None = None
    """Step of the checkpoint of init.run. Default: the newest complete one."""
    keep: Literal["weights", "optimizer", "all"] = "weights"
    """What to take from init.run. weights: with the balancing state; optimizer: also its state; all: also data and
    step."""


@dataclass
class LengthBiasConfig:
    """Sample long documents more often: one of n tokens with probability floor + (ceiling − floor)·min(1, n/tokens).

    The report uses 1 % to 90 % at 128k tokens for context extension. By default every document is used.
    """

    tokens: int = 131072
    """Document length, in tokens, from which on the probability is `ceiling`. From the report: 128k."""
    floor: float = 1.0
    """Probability of the shortest documents, above 0; the report's context extension has 0.01."""
    ceiling: float = 1.0
    """Probability of the longest documents; the report's context extension has 0.9."""


@dataclass
class DataPhaseConfig:
    """A later phase of the data. A field that is not given stays as in the phase before."""

    tokens: int
    """Start of the phase, in tokens seen before its first step."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → sampling weight, by tokens. A source that is not named is not read in this phase."""
    sequence_length: int | None = None
    """Sequence length, in tokens."""
    packing: Literal["sequential", "rsdb"] | None = None
    """Packing of documents into sequences. Documents that are open at the start of the phase are continued."""
    rsdb_size: int | None = None
    """Documents in the RSDB buffer of each stream."""
    length_bias: LengthBiasConfig | None = None
    """Sampling of documents by length."""


@dataclass
class DataConfig:
    """Training and validation data, tokenizer, and how documents become sequences."""

    train: dict[str, str] = field(default_factory=dict)
    """Source name → folder or URL of token shards made by tools/prepare_data.py; or text that is tokenised while the
    run reads it: a file, a folder or a pattern, as tools/prepare_data.py takes."""
    validation: dict[str, str] = field(default_factory=dict)
    """Validation set name → folder or URL of token shards, or text."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    tokenizer: str | None = None
    """Tokenizer folder. It is copied into the run directory and into exports, and its byte lengths give bits per byte.
    Default: that of init.hf."""
    sequence_length: int = 2048
    """Sequence length, in tokens. The report has 4096 for Nano and Mini, 8192 for Large."""
    packing: Literal["sequential", "rsdb"] = "sequential"
    """Packing of documents into sequences. sequential: the rest of a document begins its stream's next sequence. rsdb:
    each sequence from documents picked at random among those that the stream has open (Random Sequential Document
    Buffer). From the report: sequential, and rsdb in Large's last phase."""
    rsdb_size: int = 1024
    """Documents in the RSDB buffer of each stream; it holds up to twice as many. Not from the report per stream: 1024
    in each of Large's 8192 streams are 4096 for each GPU."""
    document_mask: bool = False
    """Mask attention between documents. From the report: off for Nano and Mini, on for Large."""
    loss_on_document_start: bool = True
    """Whether the beginning-of-text token after a document is a target of the loss. Not from the report."""
    streams: int = 48
    """V: logical streams that the data is split into; fixed for the run, and a multiple of any number of data ranks.
    Not from the report: they make the order of the data independent of the number of processes."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → sampling weight, by tokens. Default: equal weights."""
    length_bias: LengthBiasConfig = field(default_factory=LengthBiasConfig)
    """Sampling of documents by length; all are used by default."""
    phases: list[DataPhaseConfig] = field(default_factory=list)
    """Later phases of the data, each from a number of tokens on."""
    exhausted: Literal["repeat", "end"] = "repeat"
    """At the end of a stream's documents of a source. repeat: read them again in another order; end: end the run with
    the last whole step. Not from the report."""
    workers: int = 1
    """Data loader processes per rank; 0: the training process makes each batch when it needs it."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Check the checksums of shards at the start; auto: of shards below 256 MiB. Sizes are always checked."""


@dataclass
class RampEntryConfig:
    """A later global batch size."""

    tokens: int
    """Start, in tokens seen before the first step of this size."""
    sequences: int
    """Global batch from there on, in sequences."""


@dataclass
class BatchConfig:
    """Global batch and microbatch."""

    sequences: int = 8
    """Global batch of one optimizer step, in sequences. The report has 4096 for Nano and Mini, 12288 for Large."""
    microbatch: int = 8
    """Largest number of sequences in one forward pass of a rank; the largest divisor of its share of the batch that is
    not larger is used."""
    ramp: list[RampEntryConfig] = field(default_factory=list)
    """Later global batches, each from a number of tokens on. The report has 8192 for Nano and Mini, 16384 for Large
    from 4.9e12 tokens on."""


@dataclass
class MuonConfig:
    """Muon, for the hidden matrices.

    The report gives the learning rates, and says that it built on the Dion repository; that repository's defaults stand
    for what the report does not give.
    """

    lr: float = 1e-3
    """Peak learning rate, before the factor √max(1, fan_out/fan_in) of eq. 41. From the report: Nano and Mini; 8e-4 for
    Large."""
    momentum: float = 0.95
    """μ: momentum. Not from the report: Dion's default."""
    nesterov: bool = True
    """Nesterov momentum. Not from the report: Dion's default."""
    weight_decay: float = 0.01
    """Decoupled weight decay, multiplied by the learning rate before eq. 41's factor. Not from the report: Dion's
    default."""
    coefficients: Literal["dion", "keller", "polar_express"] = "dion"
    """Set of Newton-Schulz coefficients. Not from the report: Dion's default."""
    steps: int = 5
    """Newton-Schulz iterations. Not from the report: Dion's default."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Data type of the Newton-Schulz iteration. Not from the report: Dion's default."""
    starved: Literal["decay", "full"] = "decay"
    """Update of an expert that had no token in this step. decay: shrinks with its momentum; full: a full step along its
    old momentum. Not from the report: it does not say; decay keeps an unused expert from drifting at full speed."""
    wire: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Data type in which matrices are sent to the rank that orthogonalises them, and results back and among replicas;
    auto: optim.muon.dtype. Not from the report."""
    share: Literal["auto", "on", "off"] = "auto"
    """Split the orthogonalisation among replicas; auto: where that saves more time than it takes. Not from the
    report."""


@dataclass
class AdamWConfig:
    """AdamW, for the embedding, the LM head and the norms' gains (and the router, where optim.router says so)."""

    lr: float = 3e-4
    """Peak learning rate. From the report: Nano; 2e-4 for Mini and Large."""
    betas: tuple[float, float] = (0.9, 0.95)
    """β₁ and β₂: decay of the first and second moment. Not from the report: the usual values of language models."""
    eps: float = 1e-8
    """ε: added to the root of the second moment. Not from the report: the usual value."""
    weight_decay: float = 0.01
    """Decoupled weight decay; the norms' gains have none. Not from the report: the same as Muon's."""


@dataclass
class ScheduleConfig:
    """Learning rate schedule, as a fraction of the peak rates: linear warm-up, constant, decay, then `final`."""

    warmup_steps: int = 2000
    """Linear warm-up, in optimizer steps; 0: none. From the report."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the decay from the peak to `final`. The report has linear for Nano and Mini, cosine for Large."""
    decay_start_tokens: int | None = None
    """Start of the decay, in tokens seen. Give this or decay_start_steps."""
    decay_start_steps: int | None = None
    """Start of the decay, in optimizer steps."""
    decay_tokens: int | None = None
    """Length of the decay, in tokens. Default: to the end of the run."""
    decay_steps: int | None = None
    """Length of the decay, in optimizer steps. Default: to the end of the run."""
    final: float = 0.0
    """Fraction of the peak rate at the end of the decay and after it. From the report: Nano and Mini; 0.1 for Large."""


@dataclass
class OptimConfig:
    """Optimizers, learning rate schedule and gradient clipping."""

    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    router: Literal["muon", "adamw"] = "muon"
    """Optimizer of the router. From the report, as far as it says: Muon for "hidden layers"."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip_norm: float = 1.0
    """Clip gradients to this global norm; 0: no clipping. Not from the report: the usual value."""


@dataclass
class BalancingConfig:
    """Load balancing of the experts: once per optimizer step, by the token counts of the whole global batch."""

    kind: Literal["smebu", "sign", "none"] = "smebu"
    """smebu: eq. 23-28; sign: auxiliary-loss-free with re-centring, eq. 19-22. From the report: smebu for Large, sign
    for Nano and Mini."""
    rate: float = 5e-4
    """λ of SMEBU: step size of the expert bias. From the report: Large."""
    kappa: float = 2.0
    """κ of SMEBU: slope of the tanh. From the report: Large."""
    beta: float = 0.5
    """β of SMEBU: momentum. From the report: Large."""
    gamma: float = 1e-3
    """γ of sign: step size of the expert bias. Not from the report: DeepSeek-V3's value."""
    sequence_loss: float = 0.0
    """α: coefficient of the sequence-wise balance loss, eq. 29-32; 0: none. The report has 1e-4 for Large."""


@dataclass
class LossConfig:
    """Terms of the loss beside cross-entropy."""

    z: float = 0.0
    """z-loss: coefficient of lse² of the LM head's logits; 0: none. The report has 1e-6 for Large."""


@dataclass
class ParallelConfig:
    """Mesh: processes = replicate · shard · context; `expert` divides shard · context."""

    replicate: int = 1
    """HSDP replicas: copies of the model; −1: what is left of the processes."""
    shard: int = -1
    """FSDP: ranks that one copy is sharded over; −1: what is left of the processes. The report has 128."""
    expert: int = 1
    """Expert parallelism: neighbouring ranks that split the experts among them. The report has 8 for Large."""
    context: int = 1
    """Context parallelism: ranks that split a sequence. Not built yet: 1 is the only value."""
    exchange: Literal["auto", "all_to_all", "deep_ep"] = "auto"
    """How tokens are sent to experts on other ranks; auto: all_to_all, of torch.distributed. deep_ep needs that
    package."""
    defer_reduce: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients after the step's last microbatch only, which saves traffic and costs memory for whole gradients;
    auto: where these take at most a quarter of the device's memory."""


@dataclass
class KernelsConfig:
    """Implementation of each operation; auto: the fastest that is installed and runs on the device."""

    attention: Literal["auto", "sdpa", "varlen", "flex", "flash4", "flash2"] = "auto"
    """Softmax attention. auto: flash4, flash2 (packages) or varlen (torch) on a GPU in 16 bits, else sdpa."""
    experts: Literal["auto", "triton", "reference", "grouped_mm", "megablocks", "transformer_engine"] = "auto"
    """Routed experts. The last three are other packages', to measure against. Here and below, auto: triton on a GPU,
    for the sizes that it takes, else reference (torch)."""
    experts_recompute: bool = False
    """Recompute the experts' pre-activations in backward (triton): 4·F bytes per row less memory, a ninth more
    arithmetic. F: expert width."""
    routing: Literal["auto", "triton", "reference"] = "auto"
    """Router: scores, top-k and gates."""
    head: Literal["auto", "triton", "reference"] = "auto"
    """LM head with the cross-entropy loss."""
    norms: Literal["auto", "triton", "reference"] = "auto"
    """RMSNorm, alone and fused with the residual."""
    qk_norm: Literal["auto", "triton", "reference"] = "auto"
    """RMSNorm of queries and keys, fused with RoPE."""
    gate: Literal["auto", "triton", "reference"] = "auto"
    """Sigmoid gate of the attention output, and SwiGLU."""
    newton_schulz: Literal["auto", "triton", "reference"] = "auto"
    """Newton-Schulz iteration of Muon."""


AUTOMATIC = KernelsConfig()
"""The defaults, shared; nobody writes to it."""


@dataclass
class PrecisionConfig:
    """Data types. Parameters and optimizer state are float32, or float64 where precision.compute is."""

    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Matrix products and the residual stream; router, norms and losses are float32 at least. From the report:
    bfloat16."""
    reduce: Literal["bfloat16", "float32", "float64"] = "float32"
    """Gradient reduction between ranks."""
    fp8: Literal["none", "torchao", "transformer_engine"] = "none"
    """Library of the 8-bit products of attention, dense FFN and shared experts (trinity.models.fp8). From the report:
    none; it turned MXFP8 off in Large's run, as one of six changes for stability."""


@dataclass
class CheckpointConfig:
    """Checkpoints: the whole state of the run."""

    every: int = 500
    """Optimizer steps between checkpoints; 0: only at the end and when asked to stop."""
    keep: int = 2
    """Newest complete checkpoints that are kept."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this, for ever; 0: none."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in host memory, while training goes on."""
    url: str | None = None
    """Folder, or URL that fsspec can write such as s3://bucket/run, for this run's checkpoints alone. Default:
    checkpoints/ of the run directory."""


@dataclass
class ExportConfig:
    """Export to Hugging Face folders during the run."""

    every: int = 0
    """Optimizer steps between exports into hf/ of the run directory; 0: only by tools/export_hf.py."""


@dataclass
class EvaluationConfig:
    """Validation loss and samples during the run."""

    every: int = 0
    """Optimizer steps between evaluations; 0: none. Otherwise the last step is evaluated as well, and a model that init
    continues before its first step."""
    sequences: int = 64
    """Most sequences of each validation set that are read."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that every evaluation continues greedily, into samples.jsonl; needs a tokenizer."""
    sample_tokens: int = 64
    """Most tokens generated for each prompt; fewer where the document ends."""


@dataclass
class ProfileConfig:
    """torch.profiler on some steps, into profile/ of the run directory."""

    steps: Any = None
    """Steps to profile: 10, 10-12 (first to last), or a list of either. Default: none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""
    memory: bool = False
    """Also profile memory: a column of the table and, on a GPU, a snapshot for pytorch.org/memory_viz."""


@dataclass
class LogConfig:
    """Console, experiment trackers, and how often costlier figures are taken."""

    every: int = 1
    """Optimizer steps between lines on the console; metrics.jsonl has every step."""
    wandb: str | None = None
    """Weights & Biases project; offline where there is no API key. Default: off."""
    tensorboard: bool = False
    """Write TensorBoard events into tensorboard/ of the run directory."""
    router_every: int = 50
    """Optimizer steps between lines of router.jsonl: load and bias of every expert; 0: none."""
    norms_every: int = 100
    """Optimizer steps between weight and update norms by parameter group; 0: none. Takes a copy of the rank's weights
    in host memory during the step."""
    probe_every: int = 100
    """Optimizer steps between probes: the largest attention logit (sampled), and how far the ranks' speeds differ; 0:
    none. Takes one more forward pass of one sequence per rank."""
    het_sequences: int = 1
    """Group size of BatchHet (eq. 40), in sequences in stream order, so that it does not depend on the microbatch. Not
    from the report."""


@dataclass
class SpikeConfig:
    """Loss spikes: a step whose loss or gradient norm is far above those of the last steps (OLMo's rule)."""

    action: Literal["none", "warn", "skip", "rollback"] = "warn"
    """warn: log an event; skip: skip the update; rollback: load the last checkpoint, and go on past the data since
    then. Not from the report: OLMo's rule."""
    sigma: float = 6.0
    """Standard deviations above the mean that make a spike. Not from the report: OLMo's value."""
    window: int = 128
    """Ordinary steps that mean and deviation are taken over. Not from the report: OLMo's value."""


@dataclass
class HealthConfig:
    """When the run warns, rolls back or stops by itself."""

    bad_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite, after which the run stops with exit code 3. Not
    from the report."""
    heartbeat_seconds: float = 180
    """Watchdog: seconds without progress after which a process ends with code 1, ten times as long until the first step
    is done; 0: never. From the report: an alarm after 3 minutes."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Reaction to loss spikes."""
    rollbacks: int = 10
    """Most rollbacks after spikes; then the run stops with exit code 3. Not from the report."""
    violation_factor: float = 3.0
    """Warn of a layer whose MaxVio is this many times its lowest so far, and above 1; 0: never. Not from the report."""
    dead_steps: int = 200
    """Warn of an expert without a token for this many consecutive steps; 0: never. Not from the report."""
    slow_factor: float = 1.5
    """Straggler detection: warn of a rank whose attention takes this many times as long as the median rank's, in three
    consecutive probes (log.probe_every); 0: never. Not from the report."""


@dataclass
class RunConfig:
    """All settings of a run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: Literal["none", "block", "selective"] = "none"
    """Activation checkpointing. block: recompute each block in backward, but for its routing; selective: recompute what
    is cheap, and keep attention, experts and exchanges."""
    compile: Literal["none", "block"] = "none"
    """torch.compile of each block, without the routed experts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
