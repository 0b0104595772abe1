"""One process of the GPU check: import what the parts need, wait for a part on stdin, run it, end.

The supervisor starts the next worker while a part still runs, so that a part does not wait for imports (ten seconds).
Until its part arrives a worker does not touch the GPU. If the supervisor dies, stdin closes, and the worker ends itself
and every process that it started.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from typing import Any

NO_GPU = 3
"""Exit code: torch finds no GPU."""


def main() -> int:
    """Prepare, wait, run one part; returns the exit code."""
    _import_ahead()
    line = sys.stdin.readline()
    if not line:
        return 0
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    task: dict[str, Any] = json.loads(line)
    # the clock began when the supervisor wrote the line, perhaps before the imports were done
    os.environ |= task["environment"] | {"BENCH_SECONDS": f"{task['ends'] - time.time():.1f}"}
    return run(task["function"], task["options"], needs_gpu=task["gpu"])


def run(function: str, options: dict[str, Any], needs_gpu: bool) -> int:
    """Call "module:function" of this package; an error is recorded as a row of the part.

    Args:
        function: "": only look for the GPU.
    Returns:
        What the function returned (None: 0), 1 after an error, NO_GPU without the GPU that is needed.
    """
    from benchmarks import timing

    timing.start_clock()
    try:
        import torch

        if needs_gpu and not torch.cuda.is_available():
            return NO_GPU
        if not function:
            return 0
        module, name = function.split(":")
        return getattr(import_module(f"gpu_check.{module}"), name)(**options) or 0
    except Exception as error:  # any error is this part's result, and the next part runs
        traceback.print_exc()
        timing.record("the part", {"failed": timing.one_line(error)})
        return 1


def _import_ahead() -> None:
    """What most parts import; none of it may touch the GPU. An error is left to the part, which meets it again."""
    try:
        for module in ("torch", "trinity.training.build", "trinity.training.train_step", "trinity_kernels"):
            import_module(module)
    except Exception:
        traceback.print_exc()


def _end_with_supervisor() -> None:
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the minutes that a broken device may take to be torn down
