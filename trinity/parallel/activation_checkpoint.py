"""Activation checkpointing (config `recompute`): which activations of a block are saved, the rest being recomputed.

The routes (indices of the chosen experts, 8·K bytes per token, and the counts) are always saved. Routing again in
backward could choose other experts than forward did (a tie, another rounding): shapes would differ and counts would
double. Scores and gates are recomputed, which cannot change a saved route. The counts of the token exchange are saved
too, so that backward needs neither another collective for them nor a wait for the device.

    block      saves each block's input as well; everything else is recomputed, the token exchange included.
    selective  saves also the outputs that are expensive for their bytes: attention, experts, all-to-alls. Projections,
               norms, RoPE, gates, dense and shared FFN are recomputed.

Per token and MoE layer of Large in bf16 (D 3072, 4 experts of 256 on 8 ranks, so 3.3 ranks per token on average), by
arithmetic and not measured: matrix products at 600 TFLOP/s, attention at 450, exchanges at 400 GB/s within a node.

    saved activation                            size   recomputing it
    the block's input                           6 kB   (routing and the order of rows: 0.1 kB)
    attention: output, log-sum-exp             12 kB   180 ns, 14 ns per kB
    experts: pre-activations, weighted sums    69 kB   380 ns, 5.5 ns per kB
    exchange: tokens and sums received         41 kB   100 ns, 2.5 ns per kB in a node, 20 between nodes
    heads received by context parallelism      29 kB   in global layers alone
    not saved: q, k, v, gate                   29 kB   150 ns, 5 ns per kB: the next candidate

So `block` saves 6 kB per token and layer and `selective` about 130. Gradients have the same bits as without recompute.

`selective` and compiled blocks find operations by a dispatch mode, which runs Python code for each of them. `block` in
eager mode wraps only the calls whose results it saves (trinity_kernels.replay), in half of the host time.
"""

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trinity.models.trinity import Trinity
from trinity_kernels.replay import Results

# Operations by name: the operations of an optional package exist only once it is imported.
ALL_TO_ALL = "_c10d_functional::all_to_all_single"
ALL_REDUCE = "_c10d_functional::all_reduce"  # in a block: of the counts of rows (context parallelism)
SAVED = frozenset({"trinity::route", "trinity::route_triton", "trinity::exchanged_counts", ALL_REDUCE})
SAVED_SELECTIVE = SAVED | {
    ALL_TO_ALL,
    "trinity::expert_mlp",
    "trinity::expert_mlp_triton",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}


def recompute_blocks(model: Trinity, kind: Literal["block", "selective"] = "block", will_compile: bool = False) -> None:
    """Checkpoint every block's forward in place; apply before compiling and sharding.

    The attention backends flex and flash4 are not visible as operations: `selective` recomputes them.

    Args:
        will_compile: the blocks will be compiled. Compiled code routes without calling Python, so the routes are then
            kept by a dispatch mode, which the compiler reads as well.
    """
    saved = SAVED if kind == "block" else SAVED_SELECTIVE
    by_operation = partial(create_selective_checkpoint_contexts, partial(_policy, saved))
    contexts = by_operation if kind == "selective" or will_compile else _replay_contexts
    for block in model.blocks:
        # On the instance, without a wrapper module: parameter names stay as they are. A block draws no random numbers.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


def _replay_contexts() -> tuple[Any, Any]:
    """Contexts of one checkpointed call: no dispatch mode, so operations cost what they cost without recompute."""
    results = Results()
    return results.recording(), results.replaying()


def _policy(saved: frozenset[str], _context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # an all-to-all of integers carries counts
    counts = op.name() == ALL_TO_ALL and not args[0].is_floating_point()
    return CheckpointPolicy.MUST_SAVE if counts or op.name() in saved else CheckpointPolicy.PREFER_RECOMPUTE
