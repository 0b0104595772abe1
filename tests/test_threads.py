"""The policy of idle OpenMP threads that importing trinity sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, ["PASSIVE", "3000"]),
        ({"GOMP_SPINCOUNT": "100000"}, ["PASSIVE", "100000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, ["PASSIVE", "None"]),
    ],
)
def test_environment_of_the_user_wins(given: dict[str, str], policy: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    code = f"import trinity, os; print(*(os.environ.get(name) for name in {NAMES}))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == policy
