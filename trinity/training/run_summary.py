"""The last words of a run on the console: how far it is, where its files are, and what to do next."""

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trinity.checkpoint.directory import step_folder
from trinity.config.paths import tokenizer_folder
from trinity.config.run import RunConfig
from trinity.io.remote_path import AnyPath
from trinity.monitor.console import loss_text, prefixed
from trinity.terminal import format_duration

TOOLS = Path(__file__).parents[2] / "tools"


def closing(
    config: RunConfig,
    path: Path,
    saved: AnyPath,
    record: dict[str, Any],
    step: int,
    total: int,
    seconds: float,
    saved_by: str = "",
) -> str:
    """What the end of a run says: how far it is, where its files are, and commands that work as printed.

    Args:
        config: the run.
        path: its directory.
        saved: the checkpoint of `step`.
        record: the last step's; empty where this start made none.
        step, total: how many steps are made, and the run's last one.
        seconds: since the process started.
        saved_by: the signal that stopped it; "" for a run that is finished.
    """
    done = f"saved at step {step} of {total}" if saved_by else f"finished: {step} steps"
    known = [loss_text(record), *prefixed(record, "validation_loss.")] if "loss" in record else []
    head = [f"{done} in {format_duration(seconds)}", *known]
    if saved_by:
        head.append(f"stopped by {saved_by}; the same command resumes")
    export = _newest_export(path)
    places = {"run": path, "checkpoint": saved, "export": export}
    lines = [", ".join(head), *(f"  {name:<10}  {place}" for name, place in places.items() if place is not None)]
    following = [] if saved_by else next_commands(config, path, step)
    return "\n".join([*lines, *(["next:"] if following else []), *(f"  {command}" for command in following)])


def next_commands(config: RunConfig, path: Path, step: int) -> list[str]:
    """Commands for a run with a checkpoint, without those that its files or installed packages do not allow."""
    if not TOOLS.is_dir():
        return []
    found = []
    if tokenizer_folder(config) is not None:
        prompt = next(filter(None, config.evaluation.prompts), "Once")
        found.append(_command("generate.py", path, "--prompt", prompt))
    export = path / "hf" / step_folder(path, step).name
    if not export.exists():
        found.append(_command("export_hf.py", path, export))
    if find_spec("plotly"):
        found.append(_command("report.py", path))
    return found


def _command(tool: str, *words: object) -> str:
    """A command line for this shell: relative paths in the project's folder, whole ones elsewhere."""
    place = TOOLS / tool
    if Path.cwd() == TOOLS.parent:
        place = place.relative_to(TOOLS.parent)
    on_path = shutil.which("python")
    python = "python" if on_path and Path(on_path).parent == Path(sys.executable).parent else sys.executable
    return shlex.join([python, str(place), *map(str, words)])


def _newest_export(path: Path) -> Path | None:
    return max((folder.parent for folder in path.glob("hf/step_*/config.json")), default=None)
