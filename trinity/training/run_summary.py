"""Console messages at the start and the end of a run: settings, progress, locations of files, next commands."""

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.config.paths import tokenizer_folder
from trinity.config.run import RunConfig
from trinity.data.chat.template import template_hash
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.data.stream.stream import SequenceStream
from trinity.io.remote_path import AnyPath
from trinity.monitor.console import loss_text, prefixed
from trinity.optim.build import Optimizers, ownership_table
from trinity.parallel.mesh import Ranks
from trinity.terminal import format_duration
from trinity.training.build import total_steps
from trinity.training.build_data import best_fit_notes, document_notes, length_bias_notes
from trinity.training.divisibility import context_notes, microbatch_notes, microbatch_size
from trinity.training.lr_schedule_checks import decay_ends_with_run, schedule_notes

TOOLS = Path(__file__).parents[2] / "tools"


def opening(
    config: RunConfig,
    plan: BatchPlan,
    optimizers: Optimizers,
    stream: SequenceStream,
    ranks: Ranks,
    path: Path,
    step: int,
) -> list[str]:
    """Messages at the start of a run, one at a time: notes on its settings, its optimizers, its size.

    Args:
        config: the run.
        plan: the batches of all steps.
        optimizers: of its model.
        stream: its training data.
        ranks: the mesh.
        path: the run directory.
        step: steps made so far.
    """
    total = total_steps(config, plan)
    if step >= total:
        done = f"{path} has made {step} steps of {total}; the run is complete"
        accept = " with --accept-change optim.schedule, since the decay ends with the run"
        return [f"{done} (a larger run.steps or run.tokens continues{accept if decay_ends_with_run(config) else ''})"]
    rows = plan.at(step).sequences // ranks.data_ranks
    size = (
        f"{'resuming after step ' + str(step) if step else 'starting'}: {total} steps on {ranks.world} × "
        f"{ranks.device.type}, {rows} rows a rank in microbatches of {microbatch_size(rows, config.batch.microbatch)}, "
        f"{torch.get_num_threads()} threads, into {path}"
    )
    return [
        *schedule_notes(config, total, plan),
        ownership_table(optimizers),
        *frozen_notes(optimizers),
        size,
        *microbatch_notes(config, ranks.data_ranks),
        *context_notes(config),
        *document_notes(stream),
        *best_fit_notes(stream, step),
        *length_bias_notes(config, stream.sources, plan.at(step).tokens),
    ]


def frozen_notes(optimizers: Optimizers) -> list[str]:
    """How much of the model train.only freezes; nothing if everything is trained."""
    frozen = optimizers.frozen_roles
    numel = sum(role.parameter.numel() for role in frozen)
    return [f"frozen by train.only: {len(frozen)} tensors, {numel:,} parameters"] if frozen else []


def closing(
    config: RunConfig,
    path: Path,
    saved: AnyPath,
    record: dict[str, Any],
    step: int,
    total: int,
    seconds: float,
    stop_signal: str = "",
) -> str:
    """The message at the end of a run: steps and loss, where its files are, and commands that work as printed.

    Args:
        config: the run.
        path: its directory.
        saved: the checkpoint of `step`.
        record: the last step's; empty if this start made no step.
        step, total: steps made, and the number of the run's last step.
        seconds: since the process started.
        stop_signal: name of the signal that stopped it; "" for a run that is finished.
    """
    done = f"saved at step {step} of {total}" if stop_signal else f"finished: {step} steps"
    losses = [loss_text(record), *prefixed(record, "validation_loss.")] if "loss" in record else []
    head = [f"{done} in {format_duration(seconds)}", *losses]
    if stop_signal:
        head.append(f"stopped by {stop_signal}; the same command resumes")
    places = {"run": path, "checkpoint": saved, "export": _newest_export(path)}
    lines = [", ".join(head), *(f"  {name:<10}  {place}" for name, place in places.items() if place is not None)]
    commands = [] if stop_signal else next_commands(config, path, step)
    return "\n".join([*lines, *(["next:"] if commands else []), *(f"  {command}" for command in commands)])


def next_commands(config: RunConfig, path: Path, step: int) -> list[str]:
    """Commands for a run with a checkpoint, if its files and the installed packages allow them."""
    if not TOOLS.is_dir():
        return []
    commands = []
    tokenizer = tokenizer_folder(config)
    if tokenizer is not None and template_hash(tokenizer) is not None:
        commands.append(_command("generate.py", path, "--chat"))
    elif tokenizer is not None:
        prompt = next(filter(None, config.evaluation.prompts), "Once")
        commands.append(_command("generate.py", path, "--prompt", prompt))
    export = path / "hf" / CheckpointDirectory.at(path).path_of(step).name
    if not export.exists():
        commands.append(_command("export_hf.py", path, export))
    if find_spec("plotly"):
        commands.append(_command("report.py", path))
    return commands


def _command(tool: str, *words: object) -> str:
    """A command line for this shell, with the tool's path relative if this is the project's folder."""
    script = TOOLS / tool
    if Path.cwd() == TOOLS.parent:
        script = script.relative_to(TOOLS.parent)
    on_path = shutil.which("python")
    python = "python" if on_path and Path(on_path).parent == Path(sys.executable).parent else sys.executable
    return shlex.join([python, str(script), *map(str, words)])


def _newest_export(path: Path) -> Path | None:
    return max((folder.parent for folder in path.glob("hf/step_*/config.json")), default=None)
