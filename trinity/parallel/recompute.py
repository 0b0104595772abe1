"""Recompute of blocks in backward, with the routing kept.

Routing anew in backward may choose other experts than the forward did (a tie, another rounding): shapes would differ
and counts would double. So the routing op's outputs are saved and everything else is computed again.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trinity.models.trinity import Trinity


def recompute_blocks(model: Trinity) -> None:
    """Make every block keep its input and its routing alone; apply before sharding."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_routing)
    for block in model.blocks:
        # on the instance: names of parameters stay as they are
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _keep_routing(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = op == torch.ops.trinity.route.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
