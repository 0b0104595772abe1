"""Recompute of blocks in backward: what is kept instead of being computed again.

The choice of experts is kept always, 8·K bytes a token and the counts. Choosing anew in backward may choose others than
the forward did (a tie, another rounding): shapes would differ and counts would double. Scores and gates are made again;
with the choice kept that cannot change a route. The counts of an exchange are kept with it, so that backward
neither asks the other ranks for them nor waits for the device.

    block      keeps each block's input besides; everything else, the exchange of tokens included, is done again.
    selective  keeps also what takes long to make for its bytes: attention, experts, exchanges. Projections, norms,
               RoPE, gates, dense and shared FFN are computed again.

Per token and MoE layer of Large in bf16 (D 3072, 4 experts of 256 on 8 ranks, so 3.3 ranks a token on average), by
arithmetic and not measured: matrix products at 600 TFLOP/s, attention at 450, exchanges at 400 GB/s within a node.

    the block's input                           6 kB   (routing, and which row went where: 0.1)
    attention: output, log-sum-exp             12 kB   180 ns to make again, 14 a kB
    experts: pre-activations, weighted sums    69 kB   380 ns, 5.5 a kB
    exchange: tokens there, sums back          41 kB   100 ns, 2.5 a kB in a node, 20 between nodes
    not kept: q, k, v, gate                    29 kB   150 ns, 5 a kB: the next to keep, were there memory

So `block` holds 6 kB a token and layer and `selective` some 130. Gradients have the same bits as without recompute.
"""

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trinity.models.trinity import Trinity

# Operations by name, since those of a package exist only once it is imported.
ALL_TO_ALL = "_c10d_functional::all_to_all_single"
KEPT = frozenset({"trinity::route", "trinity::route_triton", "trinity::exchanged_counts"})
KEPT_SELECTIVELY = KEPT | {
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


def recompute_blocks(model: Trinity, kind: Literal["block", "selective"] = "block") -> None:
    """Make every block keep only what the kind says; apply before sharding.

    The engines flex and flash4 are no operations that can be seen here: `selective` computes them again.
    """
    kept = KEPT if kind == "block" else KEPT_SELECTIVELY
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    for block in model.blocks:
        # on the instance: names of parameters stay as they are
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _policy(kept: frozenset[str], _context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # what an exchange sends as integers are its counts
    counts = op.name() == ALL_TO_ALL and not args[0].is_floating_point()
    return CheckpointPolicy.MUST_SAVE if counts or op.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE
