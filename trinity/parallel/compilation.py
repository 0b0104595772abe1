"""torch.compile, block by block: one compiled graph serves every block of a kind, and compiling takes seconds.

Routing, experts and exchanges are custom operations or collectives, which compiled code calls as they are. FSDP's hooks
on the parts of a block cut its graph in pieces; so it is applied before sharding and never asks for a whole graph.
"""

import torch

from trinity.models.trinity import Trinity


def compile_blocks(model: Trinity) -> None:
    """Compile every block's forward; apply before sharding."""
    for block in model.blocks:
        # On the instance: names of parameters stay as they are. A run's shapes do not change, but for rows that have
        # travelled, which no compiled code sees; taken for changing, they cost speed (and inductor 2.13 stumbles).
        block.forward = torch.compile(block.forward, dynamic=False)
