"""A worker of the GPU check whose parts take no time, or misbehave as the environment's STUB says: part → behaviour.

It differs from the real one in what a part does, and in that it imports nothing ahead.
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from gpu_check import worker


def record(case: str, figures: dict[str, Any]) -> None:
    """As benchmarks.timing.record, which would import torch."""
    with open(os.environ["BENCH_RECORD"], "a") as file:
        file.write(json.dumps({"part": os.environ["BENCH_PART"], "case": case} | figures) + "\n")


def run(function: str, options: dict[str, Any], needs_gpu: bool) -> int:
    """Record a case, behave, record a second one."""
    behaviour = json.loads(os.environ.get("STUB", "{}")).get(os.environ["BENCH_PART"], "")
    if not function:  # the look for a GPU
        if behaviour == "hang":
            time.sleep(300)
        return worker.NO_GPU if behaviour == "no gpu" else 0
    if behaviour.startswith("only "):  # every case failed with this reason, and no error
        record("first", {"failed": behaviour.removeprefix("only ")})
        return 0
    record("first", {"seconds": 1.0, "pid": os.getpid()})
    if behaviour == "no gpu":
        return worker.NO_GPU
    if behaviour == "fail":
        record("the part", {"failed": "out of memory"})
        return 1
    if behaviour == "die":
        with open(os.environ["BENCH_RECORD"], "a") as file:
            file.write('{"part": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        record("child", {"pid": child.pid})
        time.sleep(300)
    record("second", {"seconds": 2.0})
    return 0


worker.run = run
worker._import_ahead = lambda: None
sys.exit(worker.main())
