"""A fake torch whose torchrun ends with given exit codes, to test launch/node.py without processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TORCHRUN = """
import json, os
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, Failure

def main(arguments):
    plan = json.loads(os.environ["PLAN"])
    run = Path(next(word for word in arguments if word.startswith("--log-dir=")).split("=")[1]).parents[1]
    (run / "arguments.json").write_text(json.dumps(arguments))
    for name, text in plan["files"].items():
        (run / "new").write_text(text)
        (run / "new").replace(run / name)
    if plan["torchrun_fails"]:
        raise ConnectionError("the head is gone")
    if plan["exits"]:
        raise ChildFailedError({rank: Failure(code) for rank, code in enumerate(plan["exits"])})
"""

ERRORS = """
class Failure:
    def __init__(self, exitcode): self.exitcode = exitcode

class ChildFailedError(Exception):
    def __init__(self, failures): self.failures = failures
"""


def fake_torch(folder: Path) -> Path:
    """A folder for PYTHONPATH whose torch.distributed.run.main follows $PLAN (see `node`) and records its arguments."""
    errors = folder / "torch/distributed/elastic/multiprocessing"
    errors.mkdir(parents=True)
    (errors / "errors.py").write_text(ERRORS)
    (folder / "torch/distributed/run.py").write_text(TORCHRUN)
    (folder / "torch/__init__.py").touch()  # a namespace package would come after the installed torch
    return folder


def node(
    torch: Path,
    run: Path,
    words: list[str] | None = None,
    exits: list[int] | None = None,
    files: dict[str, str] | None = None,
    torchrun_fails: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run launch/node.py with a fake torchrun.

    Args:
        torch: from fake_torch.
        run: the run directory.
        words: command line; default: --run-dir and a script.
        exits: exit codes of the processes that failed; none: all finished.
        files: name → text of the files that the processes write into the run directory.
        torchrun_fails: torchrun itself raises an error.
    """
    plan = {"exits": exits or [], "files": files or {}, "torchrun_fails": torchrun_fails}
    return subprocess.run(
        [sys.executable, "launch/node.py", *(words or ["--run-dir", str(run), "a_script.py"])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{torch}:{ROOT}", "PLAN": json.dumps(plan), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def status(code: int | None) -> dict[str, str]:
    """status.json as a run writes it, as `files` for `node`."""
    return {"status.json": json.dumps({"state": "some", "code": code, "step": 3, "reason": 'not "code": 5'})}
