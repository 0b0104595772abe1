"""Suggest existing keys for an unknown one: names of other frameworks, typing errors, keys of another section.

A key is suggested only if it is similar enough; otherwise the message lists the keys of the section.
"""

import difflib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import and_, eq

from trinity.config.run import RunConfig
from trinity.config.yaml_scalars import fields_of, is_section

_RATES = ("optim.muon.lr", "optim.adamw.lr")
_DECAYS = ("optim.muon.weight_decay", "optim.adamw.weight_decay")
_SIZES = ("parallel.shard", "parallel.replicate")
_DECAY_START = ("optim.schedule.decay_start_steps", "optim.schedule.decay_start_tokens")
_DECAY_LENGTH = ("optim.schedule.decay_steps", "optim.schedule.decay_tokens")

SYNONYMS: dict[tuple[str, ...], tuple[str, ...]] = {
    # length and identity of a run
    ("max_steps", "num_train_steps", "train_steps", "total_steps", "num_steps", "n_steps", "train_iters", "max_iters",
     "iterations", "steps", "num_iterations"): ("run.steps",),
    ("max_tokens", "total_tokens", "train_tokens", "num_tokens", "token_budget", "tokens"): ("run.tokens",),
    ("epochs", "num_epochs", "num_train_epochs", "max_epochs"): ("run.tokens", "run.steps"),
    ("output_dir", "out_dir", "save_dir", "run_dir", "workdir", "log_dir", "save_folder"): ("run.dir",),
    ("run_name", "experiment_name", "exp_name", "experiment", "name"): ("run.name",),
    ("random_seed", "manual_seed", "rng_seed", "data_seed", "seed"): ("run.seed",),
    ("num_threads", "omp_num_threads", "n_threads"): ("run.threads",),
    ("deterministic_algorithms", "use_deterministic"): ("run.deterministic",),
    # start
    ("pretrained", "from_pretrained", "model_name_or_path", "pretrained_model", "init_from", "hf_path", "hf_model",
     "base_model"): ("init.hf",),
    ("resume", "resume_from", "resume_from_checkpoint", "load_path", "load_checkpoint",
     "load"): ("init.run", "run.dir"),
    # model
    ("model_size", "model_type", "arch", "architecture", "preset"): ("model.name",),
    ("vocab", "vocabulary_size", "padded_vocab_size", "n_vocab", "num_embeddings"): ("model.vocab_size",),
    ("hidden_size", "hidden_dim", "d_model", "dim", "n_embd", "embed_dim", "embedding_dim", "model_dim",
     "emb_dim"): ("model.width",),
    ("num_layers", "num_hidden_layers", "n_layers", "n_layer", "depth", "num_blocks", "n_blocks"): ("model.layers",),
    ("num_dense_layers", "first_k_dense_replace", "n_dense_layers", "moe_layer_start"): ("model.dense_layers",),
    ("intermediate_size", "ffn_hidden_size", "ffn_dim", "mlp_dim", "d_ff", "ffn_width",
     "mlp_hidden_size"): ("model.dense_width", "model.expert_width"),
    ("moe_intermediate_size", "expert_hidden_size", "moe_ffn_hidden_size", "expert_dim", "moe_inter_dim",
     "expert_size"): ("model.expert_width",),
    ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads"): ("model.heads",),
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups", "kv_head"): ("model.kv_heads",),
    ("d_head", "head_size", "head_width", "kv_channels", "dim_head"): ("model.head_dim",),
    ("sliding_window", "window_size", "attention_window", "local_window"): ("model.window",),
    ("global_attn_every_n_layers", "global_attention_every", "full_attention_every"): ("model.global_every",),
    ("n_experts", "num_experts", "n_routed_experts", "num_local_experts", "num_routed_experts", "moe_num_experts",
     "expert_count"): ("model.experts",),
    ("top_k", "topk", "moe_top_k", "num_experts_per_tok", "num_experts_per_token", "moe_router_topk",
     "n_active_experts", "experts_per_token", "num_active_experts", "router_top_k", "moe_k"): ("model.active_experts",),
    ("num_shared_experts", "n_shared_experts", "shared_expert"): ("model.shared_experts",),
    ("routed_scaling_factor", "routing_scale", "router_scale", "moe_router_topk_scaling_factor",
     "score_scale"): ("model.route_scale",),
    ("rope_base", "rotary_base", "theta", "rope_freq_base"): ("model.rope_theta",),
    ("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_epsilon", "rmsnorm_eps"): ("model.norm_eps",),
    ("max_position_embeddings",): ("model.max_positions", "data.sequence_length"),
    # data
    ("max_seq_len", "seq_len", "seq_length", "context_length", "max_seq_length", "sequence_len", "block_size", "n_ctx",
     "max_sequence_length", "context_window", "ctx_len", "max_length", "seqlen"): ("data.sequence_length",),
    ("data_path", "train_data", "dataset", "datasets", "data_dir", "train_path", "train_files", "dataset_path",
     "dataset_name", "train_dataset", "train_data_path", "training_data"): ("data.train",),
    ("valid", "val", "eval_data", "validation_data", "val_data", "eval_dataset", "valid_data_path",
     "validation_path"): ("data.validation",),
    ("tokenizer_path", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_model", "tokenizer_dir",
     "tokenizer"): ("data.tokenizer",),
    ("text_column", "text_key", "content_field", "json_key"): ("data.text_field",),
    ("weights", "data_weights", "sampling_weights", "mix", "source_weights", "data_mixture"): ("data.mixture",),
    ("num_workers", "dataloader_num_workers", "data_workers", "loader_workers"): ("data.workers",),
    ("intra_document_mask", "document_masking", "doc_mask", "reset_attention_mask", "mask_documents",
     "block_diagonal"): ("data.document_mask",),
    ("curriculum", "stages", "data_stages"): ("data.phases",),
    # batch
    ("global_batch_size", "batch_size", "train_batch_size", "gbs", "global_batch", "total_batch_size",
     "num_sequences"): ("batch.sequences",),
    ("micro_batch_size", "per_device_batch_size", "per_device_train_batch_size", "device_batch_size", "mbs",
     "microbatch_size", "micro_batch", "local_batch_size", "rank_microbatch_size"): ("batch.microbatch",),
    ("gradient_accumulation_steps", "gradient_accumulation", "grad_accumulation_steps", "grad_accumulation",
     "grad_accum", "grad_accum_steps", "grad_acc_steps", "accumulation_steps", "accumulation", "accumulate",
     "accumulate_grad_batches"): ("batch.microbatch",),
    ("rampup_batch_size", "batch_ramp", "batch_size_rampup", "batch_warmup", "batch_size_warmup"): ("batch.ramp",),
    # optimizer
    ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr"): _RATES,
    ("muon_lr", "matrix_lr"): ("optim.muon.lr",),
    ("adam_lr", "adamw_lr", "embed_lr", "embedding_lr"): ("optim.adamw.lr",),
    ("weight_decay", "wd", "l2", "decoupled_weight_decay"): _DECAYS,
    ("beta1", "beta2", "adam_beta1", "adam_beta2", "adam_betas", "betas"): ("optim.adamw.betas",),
    ("adam_eps", "adam_epsilon", "epsilon", "eps"): ("optim.adamw.eps",),
    ("momentum", "mu"): ("optim.muon.momentum",),
    ("ns_steps", "newton_schulz_steps", "ns_iterations"): ("optim.muon.steps",),
    ("grad_clip", "max_grad_norm", "clip_grad", "clip_grad_norm", "gradient_clipping", "gradient_clip_val",
     "gradient_clip", "clip"): ("optim.clip_norm",),
    ("optimizer", "optimiser", "opt"): ("optim.muon", "optim.adamw"),
    # schedule
    ("warmup", "warmup_ratio", "warmup_iters", "num_warmup_steps", "lr_warmup_steps", "lr_warmup_iters",
     "warmup_fraction", "warmup_steps"): ("optim.schedule.warmup_steps",),
    ("lr_scheduler", "lr_scheduler_type", "lr_decay_style", "scheduler", "lr_schedule",
     "decay_type"): ("optim.schedule.decay",),
    ("min_lr", "lr_min", "final_lr", "min_lr_ratio", "end_lr", "lr_min_ratio", "final_lr_fraction",
     "alpha_f"): ("optim.schedule.final",),
    ("decay_start", "stable_steps", "lr_decay_start"): _DECAY_START,
    ("lr_decay_iters", "lr_decay_steps", "cooldown", "cooldown_steps", "decay_length", "warmdown",
     "decay_iters"): _DECAY_LENGTH,
    # balancing and losses
    ("load_balancing", "load_balance", "balance", "balancer", "moe_router_load_balancing_type",
     "balancing_type"): ("balancing.kind",),
    ("aux_loss", "aux_loss_coef", "aux_loss_coeff", "aux_loss_alpha", "router_aux_loss_coef", "moe_aux_loss_coeff",
     "load_balancing_loss", "load_balance_loss", "seq_aux_loss", "lb_loss_weight"): ("balancing.sequence_loss",),
    ("bias_update_speed", "bias_update_rate", "bias_rate", "expert_bias_rate", "moe_router_bias_update_rate",
     "load_balance_coeff"): ("balancing.gamma", "balancing.rate"),
    ("z_loss", "z_loss_coef", "zloss", "z_loss_weight", "z_loss_multiplier", "router_z_loss", "logit_z_loss",
     "lm_z_loss"): ("loss.z",),
    # mesh
    ("dp", "dp_size", "data_parallel", "data_parallel_size", "dp_shard", "fsdp", "fsdp_size", "zero", "zero_stage",
     "world_size", "num_gpus", "gpus", "data_parallel_shard_degree"): _SIZES,
    ("dp_replicate", "hsdp", "ddp", "data_parallel_replicate_degree"): ("parallel.replicate",),
    ("ep", "ep_size", "expert_parallel", "expert_parallel_size", "expert_model_parallel_size",
     "expert_parallel_degree"): ("parallel.expert",),
    ("cp", "cp_size", "context_parallel", "context_parallel_size", "sp", "sequence_parallel",
     "context_parallel_degree"): ("parallel.context",),
    ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size", "pp", "pp_size",
     "pipeline_parallel", "pipeline_parallel_size", "tensor_parallel_degree"): ("parallel.shard", "parallel.expert"),
    ("deepep", "all_to_all", "moe_token_dispatcher_type", "token_dispatcher"): ("parallel.exchange",),
    # precision, kernels, memory
    ("dtype", "bf16", "fp16", "mixed_precision", "amp", "torch_dtype", "param_dtype", "compute_dtype",
     "precision_type"): ("precision.compute",),
    ("reduce_dtype", "grad_dtype", "grad_reduce_dtype", "accumulate_allreduce_grads_in_fp32"): ("precision.reduce",),
    ("fp8", "float8", "mxfp8", "fp8_recipe"): ("precision.fp8",),
    ("attn_implementation", "attention_backend", "attn_impl", "use_flash_attn", "flash_attention", "attn_backend",
     "flash_attn"): ("kernels.attention",),
    ("moe_backend", "grouped_gemm", "moe_grouped_gemm", "expert_kernel",
     "experts_implementation"): ("kernels.experts",),
    ("gradient_checkpointing", "activation_checkpointing", "activation_checkpoint", "recompute_granularity",
     "checkpoint_activations", "selective_ac", "ac_mode", "remat"): ("recompute",),
    ("torch_compile", "use_compile", "compile_model", "jit"): ("compile",),
    # checkpoints, evaluation, logs, health
    ("save_steps", "save_interval", "checkpoint_interval", "checkpoint_every", "ckpt_every", "save_every",
     "save_freq"): ("checkpoint.every",),
    ("save_total_limit", "keep_last", "keep_checkpoints", "max_checkpoints", "keep_latest_k"): ("checkpoint.keep",),
    ("async_save", "async_checkpoint", "async_mode"): ("checkpoint.asynchronous",),
    ("checkpoint_dir", "ckpt_dir", "checkpoint_path", "remote_save_folder", "save"): ("checkpoint.url", "run.dir"),
    ("interval", "frequency", "freq"): ("checkpoint.every", "evaluation.every", "log.every"),
    ("export_every", "hf_export", "export_interval"): ("export.every",),
    ("eval_steps", "eval_interval", "eval_every", "val_check_interval", "eval_freq", "validation_interval",
     "evaluation_strategy"): ("evaluation.every",),
    ("eval_iters", "eval_batches", "max_eval_samples", "eval_samples", "limit_val_batches"): ("evaluation.sequences",),
    ("prompt", "sample_prompts", "sample_prompt"): ("evaluation.prompts",),
    ("max_new_tokens", "sample_length"): ("evaluation.sample_tokens",),
    ("logging_steps", "log_interval", "log_every", "log_freq", "log_every_n_steps"): ("log.every",),
    ("wandb", "wandb_project", "use_wandb", "report_to", "wandb_name"): ("log.wandb",),
    ("tensorboard", "tensorboard_dir", "use_tensorboard", "tb", "enable_tensorboard"): ("log.tensorboard",),
    ("profiler", "profile_steps", "enable_profiling", "profile_step_start"): ("profile.steps",),
    ("nan_tolerance", "max_nan_steps", "max_bad_steps"): ("health.bad_steps",),
    ("timeout", "watchdog", "nccl_timeout", "heartbeat_timeout", "hang_timeout"): ("health.heartbeat_seconds",),
    ("skip_spikes", "loss_spike", "spike_threshold", "rollback"): ("health.spike.action", "health.spike.sigma"),
}  # fmt: skip
"""Names of a setting in other frameworks → its keys here."""

_BY_NAME = {name: keys for names, keys in SYNONYMS.items() for name in names}
_SIMILAR_HERE, _TYPING_ERROR, _SIMILAR_ANYWHERE = 0.65, 0.8, 0.84
"""Lowest similarity (difflib's ratio) of a key in the same section; of one that comes before the same name in another
section; and of a key in another section."""
_OTHER_SECTIONS = ("training", "trainer")
"""Sections of other frameworks with settings of all kinds: none is the section `train`, and their keys are compared."""
_MOST = 3
"""Most keys that are suggested."""


def all_keys(section: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; a section comes before its keys."""
    for name, kind in fields_of(section).items():
        yield f"{prefix}{name}"
        if is_section(kind):
            yield from all_keys(kind, f"{prefix}{name}.")


def nearest_keys(key: str, known: list[str]) -> list[str]:
    """Existing keys that an unknown key may mean, the likeliest first; empty if none is similar.

    Args:
        key: the unknown key, dotted.
        known: the existing keys, dotted.
    """
    if key in _OTHER_SECTIONS:
        return []
    section, _, name = key.rpartition(".")
    name = name.lower().replace("-", "_")
    here = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    if name in here:
        return [here[name]]
    if joined := _BY_NAME.get(f"{section.rpartition('.')[2].lower()}_{name}"):  # batch.size is batch_size
        return list(joined)
    synonyms = list(_BY_NAME.get(name, ()))
    same_name = [other for other in known if f".{other}".endswith(f".{name}")]
    likely = _closest(section, dict.fromkeys(synonyms + same_name)) or synonyms
    likely = likely or (same_name if len(same_name) <= _MOST else [])
    if section and not set(likely) & set(here.values()):
        # a typing error in the right section comes before the right name in another section
        typos = difflib.get_close_matches(name, here, n=1, cutoff=_TYPING_ERROR)
        likely = list(dict.fromkeys([here[typo] for typo in typos] + likely))
    if likely:
        return likely if likely == synonyms else likely[:_MOST]
    if similar := difflib.get_close_matches(name, here, n=1, cutoff=_SIMILAR_HERE):
        return [here[similar[0]]]
    names: dict[str, list[str]] = {}
    for other in known:
        names.setdefault(other.rpartition(".")[2], []).append(other)
    keys_by_name = {synonym: list(keys) for synonym, keys in _BY_NAME.items()} | names
    similar = difflib.get_close_matches(name, keys_by_name, n=1, cutoff=_SIMILAR_ANYWHERE)
    if not similar:
        return []
    keys = keys_by_name[similar[0]]
    return (_closest(section, keys) or keys)[:_MOST]


def unknown_key_hint(key: str) -> str:
    """The end of the message for an unknown key: the suggestions, or the keys of its section."""
    known = list(all_keys())
    if near := nearest_keys(key, known):
        return f"did you mean {' or '.join(near)}?"
    section = key.rpartition(".")[0]
    names = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return f"{section} has {', '.join(names)}" if section else f"it must begin with one of {', '.join(names)}"


def _closest(section: str, keys: Iterable[str]) -> list[str]:
    """The keys that share the most leading sections with `section`; empty if none shares the first one."""
    parts = section.split(".")
    shared = {key: sum(accumulate(map(eq, parts, key.split(".")), and_)) for key in keys}
    most = max(shared.values(), default=0)
    return [key for key, count in shared.items() if count == most > 0]
