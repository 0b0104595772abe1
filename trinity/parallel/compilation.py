"""torch.compile, block by block: one compiled graph serves every block of a kind, and compiling takes seconds.

Routing, experts and exchanges are custom operations or collectives, which compiled code calls as they are. FSDP's hooks
on the parts of a block cut its graph in pieces; so it is applied before sharding and never asks for a whole graph.

Each kind of block (dense or sparse, local or global) is compiled for each shape of rows, with and without gradients:
phases of the data, a ramp, validation and samples multiply. torch compiles one function at most 8 times by default and
then runs it uncompiled; here it may LIMIT times, and what is beyond is said.
"""

import logging
import os

import torch
from torch._dynamo import config as dynamo

from trinity.models.trinity import Trinity
from trinity.terminal import say

LIMIT = 256
"""How often torch may compile one function: its own bound for all objects together."""


def compile_blocks(model: Trinity) -> None:
    """Compile every block's forward; apply before sharding."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, LIMIT)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(known, _Fallback) for known in logger.filters):
        logger.addFilter(_Fallback())
    for block in model.blocks:
        # On the instance: names of parameters stay as they are. A run's shapes do not change, but for rows that have
        # travelled, which no compiled code sees; taken for changing, they cost speed (and inductor 2.13 stumbles).
        block.forward = torch.compile(block.forward, dynamic=False)


class _Fallback(logging.Filter):
    """Says once, in the words of the config, that torch has given up compiling a function."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """True: torch's own lines, which name the function and the last reason, are shown too."""
        if not self.said and str(record.msg).startswith("torch._dynamo hit config."):
            self.said = True
            _, limit, function, *_ = record.args
            if os.environ.get("RANK", "0") == "0":
                say(
                    f"warning: compile=block: {function} was compiled {limit} times, for as many shapes, and runs "
                    "uncompiled and slower in others; use fewer lengths in data.phases and sizes in batch.ramp, or "
                    "compile=none"
                )
        return True
