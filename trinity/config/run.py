"""One run as values: every word a config file may hold, with its unit and its default.

What the report gives is named by its equation or section; a default that the report does not give says "ours".
Token counts may be written 17e12. Fields are checked together in trinity.config.check.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trinity.config.model import ModelConfig


@dataclass
class Run:
    """What this run is and how long it goes."""

    name: str = "trinity"
    """Name shown in logs; also the run's folder under runs/ where `dir` is not given."""
    dir: str | None = None
    """Run directory; runs/<name> by default."""
    seed: int = 0
    """Initial weights and the order of data are functions of it."""
    steps: int | None = None
    """Optimizer steps in all; give this or tokens."""
    tokens: int | None = None
    """Tokens in all: the run ends at the first step that reaches them; give this or steps."""
    deterministic: bool = False
    """Refuse operations that do not give the same bits twice (CUDA; on a CPU all are)."""
    threads: int | None = None
    """CPU threads per process; the cores divided by the processes on this machine by default."""


@dataclass
class Init:
    """Where the weights come from when the run starts; freshly initialised by default."""

    hf: str | None = None
    """A Hugging Face folder of an AfMoE model."""
    run: str | None = None
    """Another run's directory."""
    step: int | None = None
    """Which checkpoint of that run; the newest complete one by default."""
    keep: Literal["weights", "optimizer", "all"] = "weights"
    """What to take from that run: weights (with balancing state), also the optimizer, also data and step."""


@dataclass
class LengthBias:
    """Longer documents are taken more often: of n tokens, with probability floor + (ceiling − floor)·min(1, n/tokens).

    The report, for context extension: 1 % to 90 % at 128k tokens. By default every document is taken.
    """

    tokens: int = 131072
    """Length from which on a document is taken with probability `ceiling`."""
    floor: float = 1.0
    """Probability of the shortest; above 0."""
    ceiling: float = 1.0
    """Probability of the longest."""


@dataclass
class DataPhase:
    """From `tokens` seen on, other data; what is not given stays as in the phase before."""

    tokens: int
    """Tokens seen before the first step of this phase."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → weight; a source that is not named has none."""
    sequence_length: int | None = None
    """Tokens of one packed row."""
    packing: Literal["sequential", "rsdb"] | None = None
    """How documents fill rows; those that are open are read on with."""
    rsdb_size: int | None = None
    """Documents a stream's buffer is asked to hold."""
    length_bias: LengthBias | None = None
    """Which documents are taken."""


@dataclass
class Data:
    """What is read, in which order, and how it becomes sequences."""

    train: dict[str, str] = field(default_factory=dict)
    """Source name → folder of token shards made by tools/prepare_data.py, or a URL of one; or text that is tokenised
    while the run reads it: a file, a folder or a pattern of .txt, .jsonl and .parquet."""
    validation: dict[str, str] = field(default_factory=dict)
    """Validation set name → folder of token shards, or a URL of one, or text."""
    text_field: str = "text"
    """Name of the text in a JSON line or Parquet row, where text is read."""
    tokenizer: str | None = None
    """Tokenizer folder; copied into the run directory and into exports, and its byte lengths give bits per byte."""
    sequence_length: int = 2048
    """Tokens of one packed row."""
    packing: Literal["sequential", "rsdb"] = "sequential"
    """How documents fill rows. sequential: the rest of a document goes on into its stream's next row. rsdb: each row
    from documents picked at random among those that the stream has open (Random Sequential Document Buffer)."""
    rsdb_size: int = 1024
    """Documents that each stream's buffer is asked to hold; it holds up to twice as many."""
    document_mask: bool = False
    """Attention never crosses a document (report: Large yes, Nano and Mini no)."""
    loss_on_document_start: bool = True
    """Whether the beginning-of-text token that follows a document is a valid target. Ours."""
    streams: int = 48
    """V: logical streams the data is dealt into; fixed for a run's life, a multiple of any number of data ranks."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source name → weight, by tokens; equal weights by default."""
    length_bias: LengthBias = field(default_factory=LengthBias)
    """Which documents are taken; all of them by default."""
    phases: list[DataPhase] = field(default_factory=list)
    """Later parts of the run that read other data, each from a token count on."""
    exhausted: Literal["repeat", "end"] = "repeat"
    """What happens when a stream has taken all of its documents of a source: they begin anew in another order, or the
    run ends with the last whole step. Ours."""
    workers: int = 1
    """Processes of each rank that make its rows ahead of training; 0: rows are made when they are needed. Ours."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Whether checksums of shards are checked at the start: auto does so below 256 MiB. Sizes always are."""


@dataclass
class RampEntry:
    """From `tokens` seen on, a global batch of `sequences`."""

    tokens: int
    """Tokens seen before the first step of this size."""
    sequences: int
    """Global batch from there on, in sequences."""


@dataclass
class Batch:
    """How many sequences make a step."""

    sequences: int = 8
    """Global batch, in sequences."""
    microbatch: int = 8
    """The most sequences one rank takes at once: the largest divisor of its share that is no larger is used."""
    ramp: list[RampEntry] = field(default_factory=list)
    """Later, larger global batches, each from a token count on."""


@dataclass
class Muon:
    """Muon, for hidden matrices. The report gives the rates; the rest are the Dion repository's defaults, ours here."""

    lr: float = 1e-3
    """Peak learning rate, before the factor √max(1, fan_out/fan_in) of eq. 41."""
    momentum: float = 0.95
    """μ: the share of the momentum that is kept."""
    nesterov: bool = True
    """Look ahead by one momentum step."""
    weight_decay: float = 0.01
    """Decoupled, on the unadjusted rate."""
    coefficients: Literal["dion", "keller", "polar_express"] = "dion"
    """Named set of Newton-Schulz coefficients."""
    steps: int = 5
    """Newton-Schulz iterations."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Newton-Schulz's arithmetic."""
    starved: Literal["decay", "full"] = "decay"
    """An expert without a token this step: its update dies away, or is a full step along its old momentum. Ours."""
    wire: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Number format in which matrices travel to the rank that orthogonalises them and back, and results among replicas;
    auto: that of `dtype`. Ours."""
    share: Literal["auto", "on", "off"] = "auto"
    """Whether replicas share the work of orthogonalising; auto: where that saves more time than it takes. Ours."""


@dataclass
class AdamW:
    """AdamW, for embedding, head and gains (and the router where optim.router says so)."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Ours."""
    eps: float = 1e-8
    """Ours."""
    weight_decay: float = 0.01
    """Decoupled; gains have none. Ours."""


@dataclass
class Schedule:
    """Fraction of the peak rates: warm-up, constant, decay, then `final`."""

    warmup_steps: int = 2000
    """Steps of linear warm-up; 0 for none."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the way from the peak to `final`."""
    decay_start_tokens: int | None = None
    """Where decay begins, in tokens seen; or in steps with decay_start_steps."""
    decay_start_steps: int | None = None
    """Where decay begins, in optimizer steps."""
    decay_tokens: int | None = None
    """How long decay takes; to the end of the run by default."""
    decay_steps: int | None = None
    """How long decay takes, in optimizer steps."""
    final: float = 0.0
    """Fraction of the peak at the end of decay and after it."""


@dataclass
class Optim:
    """Optimizers, their rates and clipping."""

    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    router: Literal["muon", "adamw"] = "muon"
    """Who owns the router; muon by the report's words ("hidden layers")."""
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip. Ours."""


@dataclass
class Balancing:
    """Expert balancing, once per optimizer step on counts of the whole global batch."""

    kind: Literal["smebu", "sign", "none"] = "smebu"
    """smebu: eq. 23-28 (Large); sign: aux-loss-free with re-centring, eq. 19-22 (Nano, Mini)."""
    rate: float = 5e-4
    """λ of SMEBU."""
    kappa: float = 2.0
    """κ of SMEBU."""
    beta: float = 0.5
    """β of SMEBU."""
    gamma: float = 1e-3
    """γ of sign. The report does not give it; this is DeepSeek-V3's."""
    sequence_loss: float = 0.0
    """α of the sequence-wise loss (eq. 29-32)."""


@dataclass
class Loss:
    """Terms beside cross-entropy."""

    z: float = 0.0
    """Coefficient of lse² on the head's logits."""


@dataclass
class Parallel:
    """Mesh sizes: processes = replicate · shard · context; expert divides shard · context."""

    replicate: int = 1
    """Copies of the model; −1: what is left."""
    shard: int = -1
    """Ranks that one copy is sharded over; −1: what is left."""
    expert: int = 1
    """Neighbouring ranks that split the experts among them."""
    context: int = 1
    """Ranks that split a sequence; 1 until that is built."""
    exchange: Literal["auto", "all_to_all", "deep_ep"] = "auto"
    """How tokens travel to experts on other ranks; auto: all_to_all, of torch.distributed. deep_ep is a package."""
    defer_reduce: Literal["auto", "on", "off"] = "auto"
    """Gradients stay whole on each rank until the step's last microbatch, which saves traffic and costs memory; auto:
    where they take at most a quarter of the device."""


@dataclass
class Kernels:
    """Which implementation of each operation; auto takes the best that is there."""

    attention: Literal["auto", "sdpa", "varlen", "flex", "flash4", "flash2"] = "auto"
    """Engine of softmax attention (trinity.models.backends); auto: flash4, flash2 or varlen on a GPU, else sdpa."""
    experts: Literal["auto", "triton", "reference", "grouped_mm", "megablocks", "transformer_engine"] = "auto"
    """The routed experts; the last three are other packages' (trinity_kernels.expert_engines), to measure against. Here
    and below, auto: Triton on a GPU where it takes such sizes, else torch."""
    experts_recompute: bool = False
    """Triton makes the experts' pre-activations again in backward: 4·F bytes a row less to keep, a ninth more work."""
    routing: Literal["auto", "triton", "reference"] = "auto"
    """Scores, choice of experts and gates."""
    head: Literal["auto", "triton", "reference"] = "auto"
    """The LM head with its loss."""
    norms: Literal["auto", "triton", "reference"] = "auto"
    """RMSNorm, alone and with the residual."""
    qk_norm: Literal["auto", "triton", "reference"] = "auto"
    """RMSNorm of queries and keys with RoPE."""
    gate: Literal["auto", "triton", "reference"] = "auto"
    """What stands between projections: the sigmoid gate on attention's output, and SwiGLU."""
    newton_schulz: Literal["auto", "triton", "reference"] = "auto"
    """Muon's orthogonalisation."""


AUTOMATIC = Kernels()
"""The best of each that is there; nobody writes to it."""


@dataclass
class Precision:
    """Number formats. Parameters and optimizer state are fp32, or float64 where compute is."""

    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Matrix products and the residual stream; router, norms and losses are fp32 in any case."""
    reduce: Literal["bfloat16", "float32", "float64"] = "float32"
    """Gradients between ranks."""
    fp8: Literal["none", "torchao", "transformer_engine"] = "none"
    """Whose 8-bit products the projections of attention, dense FFN and shared experts use (trinity.models.fp8). None:
    the report turned MXFP8 off in Large's run, back to bf16, as one of six changes for stability."""


@dataclass
class Checkpoint:
    """Saving the state of the run."""

    every: int = 500
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep: int = 2
    """How many of the newest complete ones stay."""
    keep_every: int = 0
    """Those of every so many steps stay for ever; 0: none."""
    asynchronous: bool = True
    """Training goes on while a copy of its state, in host memory, is being written."""
    url: str | None = None
    """Where the step_… folders go: a folder, or a URL of any kind that fsspec writes, such as s3://bucket/run; none:
    checkpoints/ of the run directory. One place is for one run."""


@dataclass
class Export:
    """Writing Hugging Face folders."""

    every: int = 0
    """Steps between exports into hf/; 0: only by tools/export_hf.py."""


@dataclass
class Evaluation:
    """Validation loss in the loop."""

    every: int = 0
    """Steps between evaluations; 0: none. The last step is evaluated where it is not 0."""
    sequences: int = 64
    """At most this many rows of each validation set."""
    prompts: list[str] = field(default_factory=list)
    """Texts that every evaluation continues, always by the likeliest token, into samples.jsonl; needs a tokenizer."""
    sample_tokens: int = 64
    """Tokens that are made for each prompt; the text ends earlier where a document ends."""


@dataclass
class Profile:
    """A close look at some steps with torch's profiler, into profile/ of the run directory. All ours."""

    steps: Any = None
    """Which steps: 10, 10-12 (first to last), or a list of either; none by default."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Processes that are looked at."""
    memory: bool = False
    """Also who takes memory: a column of the table and, on a GPU, a snapshot for pytorch.org/memory_viz."""


@dataclass
class Log:
    """What is shown and where."""

    every: int = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    wandb: str | None = None
    """Weights & Biases project; offline where there is no key."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory."""
    router_every: int = 50
    """Steps between lines of router.jsonl: load and bias of every expert; 0: none."""
    norms_every: int = 100
    """Steps between figures of weight and update norms by group, for which a copy of the rank's weights lies in host
    memory during the step; 0: none."""
    probe_every: int = 100
    """Steps between probes, for which one row of each rank goes through the model once more: the largest attention
    logit (sampled), and how far the ranks' speeds differ; 0: none."""
    het_sequences: int = 1
    """Sequences in a group of BatchHet (eq. 40), in stream order, so that it does not depend on the microbatch."""


@dataclass
class Spike:
    """What is done about a step whose loss or gradient norm stands far above the last ones (OLMo's rule)."""

    action: Literal["none", "warn", "skip", "rollback"] = "warn"
    """warn: note it; skip: change nothing in that step; rollback: load the last checkpoint, and on past its data."""
    sigma: float = 6.0
    """Standard deviations above the mean from which on it is a spike. OLMo's."""
    window: int = 128
    """Ordinary steps that mean and deviation are taken over; at most 1024. OLMo's."""


@dataclass
class Health:
    """When a run warns, goes back or ends by itself."""

    bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops with exit code 3."""
    heartbeat_seconds: float = 180
    """A process that makes no progress for so long ends with code 1 (report: alarm after 3 minutes), ten times as long
    until the first step is done; 0 never."""
    spike: Spike = field(default_factory=Spike)
    """Loss spikes."""
    rollbacks: int = 10
    """How often a run goes back after spikes before it stops with exit code 3. Ours."""
    violation_factor: float = 3.0
    """Warn of a layer whose MaxVio has climbed to so many times its lowest, and above 1; 0 never. Ours."""
    dead_steps: int = 200
    """Warn of a layer where an expert had no token for so many steps in a row; 0 never. Ours."""
    slow_factor: float = 1.5
    """Warn of a rank on which attention took so many times as long as on the median one, in three probes in a row
    (log.probe_every); 0 never. Ours."""


@dataclass
class RunConfig:
    """Everything."""

    run: Run = field(default_factory=Run)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: Init = field(default_factory=Init)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    balancing: Balancing = field(default_factory=Balancing)
    loss: Loss = field(default_factory=Loss)
    parallel: Parallel = field(default_factory=Parallel)
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = field(default_factory=Precision)
    recompute: Literal["none", "block", "selective"] = "none"
    """What backward computes again instead of keeping: nothing; each block but for its routing; or what is cheap in it,
    keeping attention, experts and exchanges."""
    compile: Literal["none", "block"] = "none"
    """torch.compile of each block, which the expert path passes unseen. Ours."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    evaluation: Evaluation = field(default_factory=Evaluation)
    profile: Profile = field(default_factory=Profile)
    log: Log = field(default_factory=Log)
    health: Health = field(default_factory=Health)
