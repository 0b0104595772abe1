"""RunConfig, all settings of a run: every key that a config file may hold, with its type, default and meaning.

docs/config.md is made from these docstrings (trinity.config.reference). "From the report": the default is the
report's, for the model named. "Not from the report: why": the recipe needs a value that the report does not give. Token
counts may be written 17e12. Values are checked in trinity.config.check.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trinity.config.model import ModelConfig


@dataclass
class RunSection:
    """Name, directory, seed and length of the run."""

    name: str = "trinity"
    """Name of the run in logs and reports. Also names the run directory, runs/NAME, if run.dir is not given."""
    dir: str | None = None
    """Run directory, for configs, metrics, checkpoints and exports. Default: runs/NAME, with NAME from run.name."""
    seed: int = 0
    """Random seed for the initial weights and the order of the data."""
    steps: int | None = None
    """Length of the run, in optimizer steps. Give either this or run.tokens."""
    tokens: int | None = None
    """Length of the run, in tokens: it ends after the first step that reaches this number. Give either this or
    run.steps."""
    deterministic: bool = False
    """Use only deterministic CUDA operations, and fail on an operation that has no deterministic version. On a CPU all
    are deterministic."""
    threads: int | None = None
    """CPU threads per process. Default: the machine's cores divided by the number of processes on it. OMP_NUM_THREADS
    has no effect on a run."""


@dataclass
class InitConfig:
    """Initial weights: random by default, or from a Hugging Face folder (init.hf) or another run (init.run).

    init.hf and init.run also set the model's sizes, and win over model.name; a size given under `model` must equal
    the size there. With either, the first evaluation comes before the first step.
    """

    hf: str | None = None
    """Hugging Face folder of an AfMoE model, with config.json and safetensors files; also with a tokenizer, unless
    data.tokenizer is given."""
    run: str | None = None
    """Run directory of another run, to start from one of its checkpoints."""
    step: int | None = None
    """Step of the checkpoint of init.run. Default: the newest complete one."""
    keep: Literal["weights", "optimizer", "all"] = "weights"
    """What to load from init.run. weights: weights and balancing state (expert biases and their momentum);
    optimizer: also the optimizer state; all: also the position in the data, the step and the token count."""


@dataclass
class LengthBiasConfig:
    """Keep a document of n tokens with probability floor + (ceiling − floor)·min(1, n/tokens): favours long documents.

    The report uses 1 % to 90 % at 128k tokens for context extension. By default every document is kept.
    """

    tokens: int = 131072
    """Document length, in tokens, from which the probability is `ceiling`. From the report: 128k."""
    floor: float = 1.0
    """Probability of keeping the shortest documents, above 0. The report has 0.01 for context extension."""
    ceiling: float = 1.0
    """Probability of keeping the longest documents, at most 1. The report has 0.9 for context extension."""


@dataclass
class DataPhaseConfig:
    """A later phase of the data. A field that is not given keeps the value of the phase before."""

    tokens: int
    """Start of the phase, in tokens trained on before its first step."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → sampling weight, by tokens. A source that is not named is not read in this phase. Default: the
    weights of the phase before."""
    sequence_length: int | None = None
    """Sequence length, in tokens."""
    packing: Literal["sequential", "rsdb", "best_fit"] | None = None
    """Packing of documents into sequences. A document that is partly used at the start of the phase is continued.
    best_fit is for all phases of a run or none."""
    rsdb_size: int | None = None
    """Documents in the RSDB buffer of each stream (see data.rsdb_size)."""
    length_bias: LengthBiasConfig | None = None
    """Sampling of documents by length (see data.length_bias)."""


@dataclass
class DataConfig:
    """Training and validation data, tokenizer, and how documents are packed into sequences."""

    train: dict[str, str] = field(default_factory=dict)
    """Source name → training data: a folder or URL of token shards made by tools/prepare_data.py; or text, which is
    tokenised during the run: a file, a folder or a pattern, as for tools/prepare_data.py."""
    validation: dict[str, str] = field(default_factory=dict)
    """Validation set name → validation data: a folder or URL of token shards, or text, as for data.train."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, with the text. Only for sources that are text."""
    tokenizer: str | None = None
    """Tokenizer folder. It is copied into the run directory and into exports. Bits per byte are computed from the byte
    lengths of its tokens. Default: the tokenizer of init.hf."""
    sequence_length: int = 2048
    """Sequence length, in tokens. The report has 4096 for Nano and Mini, 8192 for Large."""
    packing: Literal["sequential", "rsdb", "best_fit"] = "sequential"
    """Packing of documents into sequences. sequential: a document that does not fit is continued in its stream's next
    sequence. rsdb: Random Sequential Document Buffer; each sequence takes its documents at random from the buffer of
    its stream. best_fit: whole documents only, best-fit decreasing over a window of the stream, and padding at the end
    of the sequence; for fine-tuning, with data.document_mask=true. From the report: sequential, and rsdb in Large's
    last phase."""
    rsdb_size: int = 1024
    """Documents in the RSDB buffer of each stream; up to twice this number are held. Not from the report: it counts
    documents per GPU; 1024 in each of Large's 8192 streams are 4096 per GPU on 2048 GPUs."""
    best_fit_rows: int = 16
    """Window of best_fit in each stream: documents with as many tokens as this number of sequences are packed together;
    fewer at the end of a source's epoch, so that no sequence holds a document twice.
    Not from the report, which packs greedily for fine-tuning."""
    loss: Literal["all", "masked"] = "all"
    """Tokens that are targets of the loss. all: every token; masked: only those that the mask of the shards marks
    (tools/prepare_data.py --chat), in training and validation data. Not from the report: it does not say."""
    document_mask: bool = False
    """Document masking: no attention between documents of one sequence. From the report: off for Nano and Mini, on for
    Large."""
    loss_on_document_start: bool = True
    """Whether the BOS token that begins the next document is a target of the loss. It never is with
    data.packing=best_fit or data.loss=masked. Not from the report: it does not say."""
    streams: int = 48
    """V: number of logical data streams; fixed for the run. Must be a multiple of every number of data ranks that the
    run will use. Not from the report: streams make the order of the data independent of the number of processes."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → sampling weight, by tokens. Weights need not sum to 1. Default: equal weights."""
    length_bias: LengthBiasConfig = field(default_factory=LengthBiasConfig)
    """Sampling of documents by length. Default: every document is kept."""
    phases: list[DataPhaseConfig] = field(default_factory=list)
    """Later phases of the data, each from its number of tokens on, in ascending order."""
    exhausted: Literal["repeat", "end"] = "repeat"
    """What to do when a stream has read all documents of a source. repeat: read them again in another order; end: end
    the run after the last complete step. Not from the report: it does not say."""
    workers: int = 1
    """Data loader processes per rank; 0: the training process itself makes each batch."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Verify checksums of shards at the start. auto: only for shards below 256 MiB. File sizes are always checked."""


@dataclass
class RampEntryConfig:
    """A later size of the global batch."""

    tokens: int
    """Start, in tokens trained on before the first step with this size."""
    sequences: int
    """Size of the global batch, in sequences."""


@dataclass
class BatchConfig:
    """Global batch and microbatch."""

    sequences: int = 8
    """Global batch: sequences per optimizer step, over all ranks. The report has 4096 for Nano and Mini, 12288 for
    Large."""
    microbatch: int = 8
    """Microbatch: most sequences in one forward pass of a rank. The rank uses the largest divisor of its share of the
    global batch up to this number, and accumulates gradients."""
    ramp: list[RampEntryConfig] = field(default_factory=list)
    """Later sizes of the global batch, each from its number of tokens on. The report has 8192 for Nano and Mini, 16384
    for Large from 4.9e12 tokens on."""


@dataclass
class MuonConfig:
    """Muon, the optimizer of the hidden matrices.

    The report gives the learning rates and says that its Muon builds on the Dion repository; values that the report
    does not give are that repository's defaults.
    """

    lr: float = 1e-3
    """Peak learning rate, before the factor √max(1, fan_out/fan_in) of eq. 41. From the report: Nano and Mini; 8e-4 for
    Large."""
    momentum: float = 0.95
    """μ: momentum. Not from the report: Dion's default."""
    nesterov: bool = True
    """Nesterov momentum. Not from the report: Dion's default."""
    weight_decay: float = 0.01
    """Decoupled weight decay; it is multiplied by the learning rate, without the factor of eq. 41. Not from the report:
    Dion's default."""
    coefficients: Literal["dion", "keller", "polar_express"] = "dion"
    """Set of Newton-Schulz coefficients. Not from the report: Dion's default."""
    steps: int = 5
    """Newton-Schulz iterations. Not from the report: Dion's default."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Data type of the Newton-Schulz iteration. Not from the report: Dion's default."""
    starved: Literal["decay", "full"] = "decay"
    """Update of an expert that got no token in this step. decay: scaled down as its momentum decays; full: a full step
    along its old momentum. Not from the report: it does not say; decay keeps an unused expert from moving at full
    speed."""
    wire: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Communication data type: for sending matrices to the rank that orthogonalises them, and the results back and
    between replicas. auto: optim.muon.dtype. Not from the report: it does not say."""
    share: Literal["auto", "on", "off"] = "auto"
    """Divide the orthogonalisation among the HSDP replicas. auto: if that saves more time than its communication takes.
    Not from the report."""


@dataclass
class AdamWConfig:
    """AdamW, the optimizer of the embedding, the LM head and the norms' gains; also of the router with
    optim.router=adamw."""

    lr: float = 3e-4
    """Peak learning rate. From the report: Nano; 2e-4 for Mini and Large."""
    betas: tuple[float, float] = (0.9, 0.95)
    """β₁ and β₂: decay of the first and second moment. Not from the report: the usual values for language models."""
    eps: float = 1e-8
    """ε: added to the square root of the second moment. Not from the report: the usual value."""
    weight_decay: float = 0.01
    """Decoupled weight decay, for all but the norms' gains. Not from the report: the same as Muon's."""


@dataclass
class ScheduleConfig:
    """Learning rate schedule, as a fraction of the peak rates: linear warm-up, constant, decay, constant `final`."""

    warmup_steps: int = 2000
    """Length of the linear warm-up from 0, in optimizer steps; 0: none. From the report."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the decay from the peak to `final`. The report has linear for Nano and Mini, cosine for Large."""
    decay_start_tokens: int | None = None
    """Start of the decay, in tokens trained on. Give either this or decay_start_steps."""
    decay_start_steps: int | None = None
    """Start of the decay, in optimizer steps. Give either this or decay_start_tokens."""
    decay_tokens: int | None = None
    """Length of the decay, in tokens, with decay_start_tokens. Default: to the end of the run."""
    decay_steps: int | None = None
    """Length of the decay, in optimizer steps, with decay_start_steps. Default: to the end of the run."""
    final: float = 0.0
    """Fraction of the peak rate from the end of the decay on. From the report: Nano and Mini; 0.1 for Large."""


@dataclass
class OptimConfig:
    """Optimizers, learning rate schedule and gradient clipping."""

    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    router: Literal["muon", "adamw"] = "muon"
    """Optimizer of the router. From the report, which names Muon for "hidden layers" and not the router itself."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip_norm: float = 1.0
    """Gradient clipping: largest global norm of the gradients; 0: no clipping. Not from the report: the usual value."""


@dataclass
class BalancingConfig:
    """Load balancing of the experts. The expert biases change once per optimizer step, by the token counts of the whole
    global batch."""

    kind: Literal["smebu", "sign", "none"] = "smebu"
    """Rule that updates the expert biases. smebu: SMEBU, eq. 23-28; sign: auxiliary-loss-free balancing with
    re-centring, eq. 19-22. From the report: smebu for Large, sign for Nano and Mini."""
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
    """Terms of the loss in addition to the cross-entropy."""

    z: float = 0.0
    """Coefficient of the z-loss, logsumexp² of the LM head's logits; 0: none. The report has 1e-6 for Large."""
    per: Literal["token", "example"] = "token"
    """What the loss is a mean over. token: all targets of the global batch; example: all examples, each the mean over
    its own targets, with data.packing=best_fit. Not from the report: it does not say."""


@dataclass
class ParallelConfig:
    """Device mesh: processes = replicate · shard · context; `expert` divides shard · context."""

    replicate: int = 1
    """HSDP: number of replicas (copies of the model); −1: the number of processes divided by shard · context."""
    shard: int = -1
    """FSDP: ranks that one copy of the model is sharded over, context times as many in all; −1: the number of processes
    divided by replicate · context. The report has 128."""
    expert: int = 1
    """Expert parallelism: neighbouring ranks that divide the experts among themselves. The report has 8 for Large."""
    context: int = 1
    """Context parallelism: neighbouring ranks that divide the tokens of the same rows among themselves, for rows whose
    activations are too large for one. It divides every sequence length of the run; best a number that splits the heads:
    model.heads / context is a multiple of the query heads of one key/value head, or divides it. The report has 4 for
    Large's context extension."""
    exchange: Literal["auto", "all_to_all", "deep_ep"] = "auto"
    """Token dispatch to experts on other ranks. all_to_all: by torch.distributed; deep_ep: by the package DeepEP. auto:
    all_to_all."""
    defer_reduce: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients only after the step's last microbatch. Saves communication, but holds unsharded gradients.
    auto: on if these take at most a quarter of the device's memory more than reduced ones; on one rank they take no
    more, and FSDP then copies neither."""


@dataclass
class KernelsConfig:
    """Implementation of each operation. auto: the fastest one that is installed and runs on the device."""

    attention: Literal["auto", "sdpa", "blocks", "varlen", "flex", "flash4", "flash2"] = "auto"
    """Softmax attention. auto: on a GPU in 16 bits flash4 or flash2 (packages) or varlen (torch), on a CPU blocks
    (torch, in blocks of queries that read only the keys in their window), else sdpa (torch)."""
    experts: Literal["auto", "triton", "reference", "grouped_mm", "megablocks", "transformer_engine"] = "auto"
    """Routed experts. grouped_mm (torch), megablocks and transformer_engine (packages) are for comparison. Here and
    below, auto: triton on a GPU, for the sizes that it supports, else reference (torch)."""
    experts_recompute: bool = False
    """Recompute the experts' pre-activations in backward (triton only). Saves 4·F bytes per routed row, F the expert
    width, for a ninth more arithmetic."""
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
    linear: Literal["auto", "torch", "onednn"] = "auto"
    """Matrix products in fp32 on a CPU, in all of these and in the linear layers; their last bits differ. auto: the
    choice of the run's last start; at first onednn where torch multiplies by MKL on AMD's Zen 5 or later, else
    torch."""


AUTOMATIC = KernelsConfig()
"""The defaults, as one shared object; read only."""


@dataclass
class PrecisionConfig:
    """Data types. Parameters and optimizer state are float32, or float64 with precision.compute=float64."""

    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Data type of matrix products and of the residual stream; router, norms and losses are at least float32. From the
    report: bfloat16."""
    reduce: Literal["bfloat16", "float32", "float64"] = "float32"
    """Data type of the gradient reduction between ranks. Gradients that are on one rank only are not reduced; they have
    the parameters' data type."""
    fp8: Literal["none", "torchao", "transformer_engine"] = "none"
    """Library for 8-bit matrix products in attention, dense FFN and shared experts (trinity.models.fp8). From the
    report: none; MXFP8 was turned off during Large's run, as one of six changes for stability."""


@dataclass
class AverageConfig:
    """The average of the run's last checkpoints, which predicts what a decay of the learning rate would give. Each
    evaluation evaluates it too (validation_loss_average.SET); training does not change.
    """

    every: int | None = None
    """Optimizer steps between the checkpoints that are averaged: a multiple of checkpoint.every. Default: no
    average."""
    window: int = 8
    """Number of checkpoints that are averaged, the newest ones; they stay on disk whatever checkpoint.keep says. There
    is no average until the run has all of them."""
    decay: Literal["linear", "1-sqrt", "cosine", "equal"] = "linear"
    """Decay of the learning rate over the window that the weights of the checkpoints stand for. linear and equal: the
    plain mean."""


@dataclass
class TrainConfig:
    """What is trained of the model: all of it by default (docs/train_some_modules.md)."""

    only: list[str] = field(default_factory=list)
    """Names of the modules or parameters to train, such as blocks.3.attention; all others are frozen: no gradient, no
    optimizer state, no weight decay. A name is matched whole, and * is any part of it between two dots, as in
    blocks.*.ffn.experts. tools/spectrum.py chooses some. Default: everything is trained. Not from the report: it trains
    everything."""
    expert_bias: Literal["auto", "move"] = "auto"
    """Expert biases of layers whose router train.only freezes. auto: they hold still with it, and those of the other
    layers move as balancing says; move: refuse to freeze a router. Not from the report: it trains everything."""


@dataclass
class CheckpointConfig:
    """Checkpoints: the complete state of the run."""

    every: int = 500
    """Optimizer steps between checkpoints; 0: only at the end of the run and when it is asked to stop."""
    keep: int = 2
    """Number of newest complete checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this number, forever; 0: none."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a copy of the state in host memory, while training continues."""
    url: str | None = None
    """Folder or fsspec URL, such as s3://bucket/run, for the checkpoints of this run only. Default: checkpoints/ in the
    run directory."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """The average of the last checkpoints."""


@dataclass
class ExportConfig:
    """Exports to Hugging Face folders during the run."""

    every: int = 0
    """Optimizer steps between exports into hf/ in the run directory; 0: only by tools/export_hf.py."""


@dataclass
class NeedlesConfig:
    """Needles in a haystack (RULER's MK-NIAH, trinity.evaluation.needle) at every evaluation, scored by forced
    decoding. Needs a tokenizer."""

    lengths: list[int] = field(default_factory=list)
    """Lengths of the samples, in tokens, at most model.max_positions. Default: no needles."""
    samples: int = 50
    """Samples of each length and kind. A multiple of 10 gives each depth equally many."""
    kinds: list[int] = field(default_factory=lambda: [1])
    """Kinds of MK-NIAH: 1 (four needles in text), 2 (numbers among other needles), 3 (UUIDs among other needles). The
    report says "MK-NIAH" and not which."""
    haystack: str | None = None
    """Validation set whose text hides the needles of kind 1. Default: the first of data.validation."""


@dataclass
class EvaluationConfig:
    """Validation loss, needles and samples during the run."""

    every: int = 0
    """Optimizer steps between evaluations; 0: none. If not 0, the last step is evaluated as well; with init, also the
    model before its first step."""
    sequences: int = 64
    """Most sequences to read from each validation set."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that each evaluation continues by greedy decoding, into samples.jsonl. Needs a tokenizer."""
    sample_tokens: int = 64
    """Most tokens to generate per prompt; fewer if the document ends."""
    needles: NeedlesConfig = field(default_factory=NeedlesConfig)
    """Needles in a haystack."""
    by_position: bool = False
    """Also record the validation loss by the tokens' context, in ranges that double (validation_loss_at.CONTEXT.SET):
    it must fall as the context grows."""


@dataclass
class ProfileConfig:
    """Profiling of some steps with torch.profiler, into profile/ in the run directory."""

    steps: Any = None
    """Steps to profile, counted from 1: 10, 10-12 (first to last), or a list of either. Default: none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks to profile, counted from 0."""
    memory: bool = False
    """Profile memory as well: a column in the table and, on a GPU, a snapshot for pytorch.org/memory_viz."""


@dataclass
class LogConfig:
    """Console output, experiment trackers, and intervals of the costlier measurements."""

    every: int = 1
    """Optimizer steps between lines on the console. metrics.jsonl records every step."""
    wandb: str | None = None
    """Weights & Biases project; offline if there is no API key. Default: no logging to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard events into tensorboard/ in the run directory."""
    router_every: int = 50
    """Optimizer steps between lines of router.jsonl, with load and bias of every expert; 0: none."""
    norms_every: int = 100
    """Optimizer steps between measurements of weight and update norms per parameter group; 0: none. Each takes a copy
    of the rank's weights in host memory during the step."""
    probe_every: int = 100
    """Optimizer steps between probes of the largest attention logit (sampled) and of straggler ranks; 0: none. Each
    takes one more forward pass of one sequence per rank."""
    het_sequences: int = 1
    """Group size of BatchHet (eq. 40), in sequences in stream order. Not from the report: fixed groups make the value
    independent of the microbatch."""


@dataclass
class SpikeConfig:
    """Loss spikes: steps whose loss or gradient norm is far above that of the steps before (OLMo's rule)."""

    action: Literal["none", "warn", "skip", "rollback"] = "warn"
    """Reaction to a spike. warn: log an event; skip: skip the optimizer update; rollback: load the last checkpoint and
    skip the data read since then. Not from the report: OLMo's rule."""
    sigma: float = 6.0
    """Threshold of a spike, in standard deviations above the mean. Not from the report: OLMo's value."""
    window: int = 128
    """Number of steps without a spike over which mean and deviation are taken. Not from the report: OLMo's value."""


@dataclass
class HealthConfig:
    """Monitoring: when the run warns, rolls back or stops."""

    bad_steps: int = 10
    """Stop with exit code 3 after this many consecutive steps with a loss or gradient that is not finite. Not from the
    report: it does not say."""
    heartbeat_seconds: float = 180
    """Watchdog timeout, in seconds: a process without progress for this long exits with code 1; 0: off. The timeout is
    ten times as long until the first step is done. From the report: an alarm after 3 minutes."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Detection of loss spikes, and the reaction to them."""
    forgetting: dict[str, float] = field(default_factory=dict)
    """Forgetting budget of a model that init continues: validation set name → nats per token by which its loss may
    rise above that of step 0, before the first update. It is checked at each evaluation. Default: no budget."""
    forgetting_action: Literal["warn", "end"] = "warn"
    """Reaction to a set of health.forgetting above its budget. warn: log an event; end: also save a checkpoint and stop
    the run with exit code 3."""
    rollbacks: int = 10
    """Most rollbacks after loss spikes; the next spike stops the run with exit code 3. Not from the report: it does not
    say."""
    violation_factor: float = 3.0
    """Warn of a layer whose MaxVio is above 1 and at least this many times its lowest value so far; 0: never. Not from
    the report: it does not say."""
    dead_steps: int = 200
    """Warn of an expert that got no token for this many consecutive steps; 0: never. Not from the report: it does not
    say."""
    slow_factor: float = 1.5
    """Straggler detection: warn of a rank whose attention time is this many times the median of the ranks, in three
    consecutive probes (log.probe_every); 0: never. Not from the report: it does not say."""


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
    """Activation checkpointing: activations to recompute in backward. block: all of each block but its routing;
    selective: only cheap operations, keeping the outputs of attention, experts and communication."""
    compile: Literal["none", "block"] = "none"
    """torch.compile. block: compile each block, without its routed experts."""
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
