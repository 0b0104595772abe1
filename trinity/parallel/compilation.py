"""torch.compile per block: one compiled graph serves every block of a kind, and compiling takes seconds.

Routing, experts and token exchange are custom operations or collectives, which compiled code calls unchanged. FSDP's
hooks on the parts of a block split its graph, so compile before sharding and without fullgraph.

Each kind of block (dense or sparse, local or global) is compiled for each shape of rows, with and without gradients:
data phases, batch ramp, validation and samples multiply the number. torch compiles one function at most 8 times by
default and then runs it uncompiled. Here the limit is LIMIT, and a warning is printed when it is reached.
"""

import logging
import os

import torch
from torch._dynamo import config as dynamo

import trinity_kernels
from trinity.models.trinity import Trinity
from trinity.terminal import say
from trinity_kernels.op import Op, interpreted

LIMIT = 256
"""Largest number of compilations of one function: torch's own limit over all objects."""


def compile_blocks(model: Trinity) -> None:
    """Compile every block's forward; apply before sharding."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, LIMIT)
    _import_triton()
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(present, _RecompileLimitWarning) for present in logger.filters):
        logger.addFilter(_RecompileLimitWarning())
    for block in model.blocks:
        # On the instance, without a wrapper module: parameter names stay as they are. dynamic=False: compiled code sees
        # fixed shapes only (dispatched rows vary, but pass through custom operations). Dynamic shapes would be slower,
        # and inductor 2.13 fails on them.
        block.forward = torch.compile(block.forward, dynamic=False)


def _import_triton() -> None:
    """Import the Triton ops, which happens at an op's first call otherwise: imports would break the compiled graph."""
    if torch.cuda.is_available() or interpreted():
        for op in list(vars(trinity_kernels).values()):
            if isinstance(op, Op) and op.has_triton:
                _ = op.triton


class _RecompileLimitWarning(logging.Filter):
    """Print a warning once, with config keys, when torch reaches its limit and stops compiling a function."""

    printed = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True always, so that torch's own lines (function and last reason) are shown too."""
        if not self.printed and str(record.msg).startswith("torch._dynamo hit config."):
            self.printed = True
            assert isinstance(record.args, tuple)
            _, limit, function, *_ = record.args
            if os.environ.get("RANK", "0") == "0":
                say(
                    f"warning: compile=block: {function} was compiled {limit} times, for as many shapes, and runs "
                    "uncompiled and slower in others; use fewer lengths in data.phases and sizes in batch.ramp, or "
                    "compile=none"
                )
        return True
