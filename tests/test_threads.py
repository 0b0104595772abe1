"""The policy of idle OpenMP threads that importing trinity sets."""

import ast
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


PROGRAMS = [
    path
    for folder in ("tools", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if "__main__" in path.read_text() or path.stem == "rsdb_arms"
]


@pytest.mark.parametrize("path", [*PROGRAMS, ROOT / "tests/conftest.py"], ids=lambda path: path.stem)
def test_programs_import_trinity_before_torch(path: Path) -> None:
    """OpenMP reads its environment when torch is loaded."""
    packages = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            packages += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            packages.append((node.module or "").split(".")[0])
    assert next((name for name in packages if name in ("torch", "trinity")), "trinity") == "trinity"
