"""Every kernel compiles for Hopper with every tile of its table, without spills and within the shared memory.

One process per module of cases, because kernels must not be interpreted there. Modules with the most sizes take most of
the time; they are slow tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("cases_*.py"))
MOST_SIZES = ("cases_norm", "cases_newton_schulz", "cases_experts", "cases_routing", "cases_cross_entropy")
SHARED = 227 * 1024
"""Bytes of shared memory that one block may have on sm_90."""

SPILLS_ALLOWED: dict[str, tuple[int, str]] = {}
"""Kernel → (bytes of stack at most, why)."""


@pytest.fixture(
    scope="module", params=[pytest.param(m, marks=pytest.mark.slow) if m in MOST_SIZES else m for m in MODULES]
)
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The reports of one module's kernels."""
    command = [sys.executable, "-m", "tests.kernels.compiled", f"tests.kernels.{request.param}"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parents[1],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_no_spills_and_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    """A spilled register costs a round trip to memory in the innermost loop."""
    assert compiled
    for kernel in compiled:
        assert kernel["spills"] <= SPILLS_ALLOWED.get(kernel["kernel"], (0, ""))[0], kernel
        assert kernel["shared"] <= SHARED, kernel


def test_products_use_hoppers_matrix_instruction(compiled: list[dict[str, Any]]) -> None:
    """A kernel with BLOCK_K multiplies matrices: HGMMA, never HMMA, which runs at half the rate. fp32 has neither."""
    for kernel in compiled:
        if "BLOCK_K" in kernel["constants"] and kernel["constants"].get("PRECISION") != "ieee":
            assert kernel["hgmma"] > 0, kernel
        assert kernel["hmma"] == 0, kernel
