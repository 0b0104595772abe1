"""The tests marked gpu, in parallel: one pytest process for each file, and a row for each as soon as it ends.

Triton's compiler takes most of the time and uses one core.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.timing import record, time_left

ROOT = Path(__file__).parents[2]
PROCESSES = 8
NO_TEST = 5
"""pytest's exit code if the selection finds no test."""

COUNTS = re.compile(r"(\d+) (passed|failed|skipped|deselected|error)")


def run(select: str, files: Iterable[str] | None = None) -> int:
    """Run the tests that pytest's -k selects by the expression `select`; returns 1 if one fails.

    Args:
        files: test files, relative to the repository; by default those with tests for a GPU.
    """
    gpu = files is None  # files named here are for a machine without one, where no test is marked gpu
    marks = ["-m", "gpu and not slow"] if gpu else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-v", "-rf", *marks, "-k", select]
    # determinism, which the tests of kernels check, needs a fixed workspace
    return _each_file(command, files or gpu_files(), {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})


def sanitizer() -> int:
    """One test of each operation under compute-sanitizer; returns 1 if it finds an invalid access."""
    if shutil.which("compute-sanitizer") is None:
        record("compute-sanitizer", {"skipped": "compute-sanitizer is not on PATH"})
        return 0
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-v", "-rf", "-m", "gpu and not slow", "-k", "repetition"]
    # without torch's memory cache every tensor is an allocation of its own, so that overruns are detected
    files = [file for file in gpu_files() if file.endswith("_triton.py")]
    return _each_file(command, files, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def gpu_files() -> list[str]:
    """Files with tests for a GPU: of Triton kernels (marked by tests/kernels/conftest.py), and any with a mark.

    The longest first: they take longest, and all cores have work until the end.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda file: (-file.stat().st_size, file))
    found = [f for f in files if f.name.endswith("_triton.py") or "mark.gpu" in f.read_text(encoding="utf-8")]
    return [str(file.relative_to(ROOT)) for file in found]


def _each_file(command: list[str], files: Iterable[str], environment: dict[str, str]) -> int:
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = list(pool.map(lambda file: _one_file(command, file, environment), files))
    return int(any(row["code"] not in (0, NO_TEST) for row in rows))


def _one_file(command: list[str], file: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run one file and record its row; its log is complete up to a kill."""
    began = time.monotonic()
    path = Path(os.environ["CHECK_LOGS"]) / f"{os.environ['BENCH_PART']}.{Path(file).stem}.log"
    with open(path, "w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                [*command, file], cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, timeout=max(1.0, min(time_left(), 3600)),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 124
    row = {"code": code, "seconds": time.monotonic() - began, **outcome(path.read_text(errors="replace"))}
    if code == 124:
        row["failed"] = "not at its end when the part's time was up"
    elif code not in (0, NO_TEST):
        row["failed"] = ", ".join(row["failures"]) or f"exit code {code}"
    record(file, row)
    return row


def outcome(output: str) -> dict[str, Any]:
    """Counts of pytest's last line, or of the lines so far, and the names of the failed tests."""
    lines = output.splitlines()
    counts = {word: int(number) for number, word in COUNTS.findall(lines[-1] if lines else "")}
    if not counts:
        counts = {"passed": output.count(" PASSED"), "failed": output.count(" FAILED")}
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    return {"tests": counts, "failures": [line.split()[1].partition("::")[2] for line in failures]}
