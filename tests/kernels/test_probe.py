"""Probes of what torch can do: what surrounds the first call neither sees nor changes them."""

import subprocess
import sys
from pathlib import Path

FIRST_CALLS = """
import trinity
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trinity.models import attention_blocks
from trinity_kernels.linear import has_onednn

class Seen(TorchDispatchMode):
    operations = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))

with Seen(), torch.device("meta"):
    answers = attention_blocks.can_run(), attention_blocks._flash_groups_queries(), has_onednn()
x, bias = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 1)
try:
    attention_blocks._flash(x, x, x, bias)
    runs = True
except (AttributeError, RuntimeError, TypeError):
    runs = False
assert Seen.operations == [], Seen.operations
assert answers[0] == runs, answers
"""


def test_a_first_call_within_other_contexts() -> None:
    """Under selective checkpointing the operations of a probe would be taken for the model's. In a fresh process."""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
