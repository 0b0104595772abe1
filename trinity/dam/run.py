"""`adaptive_merge`: from DAM.yaml to a merged folder, with checkpoints on the way.

    check ─► read texts ─► mesh ─► build, load ─► [resume] ─► steps, checkpoints ─► coefficients ─► write ─► rename

Until the folder is whole, everything is in .NAME.dam beside it: checkpoints/, metrics.jsonl, and the folder that is
being written. The same command continues there. Only rank 0 writes, but for its share of checkpoints of each rank.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import load
from trinity.checkpoint.save import save
from trinity.dam.coefficients import (
    FILE,
    SUMMARY,
    gather_coefficients,
    parts_of,
    read_coefficients,
    save_coefficients,
    summary,
)
from trinity.dam.config import DamConfig
from trinity.dam.data import TextRows, read_texts
from trinity.dam.load import build_merged_model, identity, load_models, open_models, set_coefficients, sources_of
from trinity.dam.model import PARTS
from trinity.dam.step import Learner
from trinity.dam.write import write_merged
from trinity.errors import UserError
from trinity.interop.output_folder import check_replaceable, replace_folder
from trinity.io.json_files import read_json, write_json
from trinity.io.local import copy_atomically, file_lock, make_folder, resolve_path
from trinity.merging.merge_models import check_apart
from trinity.merging.plan import Plan
from trinity.monitor.loggers import JsonLines
from trinity.parallel import mesh
from trinity.parallel.collectives import all_reduce_max, run_on_all_ranks, run_on_rank0
from trinity.parallel.mesh import Ranks
from trinity.terminal import Progress, say
from trinity.training.signals import SAVED, StopRequest

KEPT = 2
"""Checkpoints that are kept."""
_MARK, METRICS = "dam.json", "metrics.jsonl"
_FREE = ("parallel", "save_every", "recompute", "microbatch", "threads", "source")
"""Settings that an unfinished run may change: they do not change what is learned."""


@dataclass(frozen=True)
class Prepared:
    """A checked run, before anything is written.

    directory: the folder to make. work: where everything is until then.
    identities: checksums of the models.
    start: coefficients to start from, by the tensors' names.
    """

    config: DamConfig
    plan: Plan
    texts: dict[int, TextRows]
    directory: Path
    identities: list[str]
    start: dict[str, Any]

    @property
    def work(self) -> Path:
        """Where everything is until the result is whole."""
        return self.directory.parent / f".{self.directory.name}.dam"

    def mark(self) -> dict[str, Any]:
        """What an unfinished run must have in common with this one."""
        settings = {name: value for name, value in vars(self.config).items() if name not in _FREE}
        settings["models"] = [[each.model, each.text, each.weights] for each in self.config.models]
        texts = [rows.checksum() for rows in self.texts.values()]
        settings["learn"] = list(self.config.learn)
        return {"identities": self.identities, "settings": settings, "texts": texts}


def prepare(config: DamConfig, directory: str | Path, overwrite: bool = False) -> Prepared:
    """Check everything and read the texts; nothing is written.

    Raises:
        UserError: naming what is wrong.
    """
    directory = resolve_path(directory)
    check_replaceable(directory, overwrite)
    plan = open_models(config)
    check_apart(plan, directory)
    _check_learn(plan, config)
    sizes = mesh.check_parallel(config.parallel, plan.donor.config, mesh.world_size())
    if sizes.experts_by == "width":
        raise UserError(
            f"{sizes.expert_shard} ranks would divide each expert's width, which its coefficients do not have; set "
            "parallel.expert or parallel.replicate so that the experts of a share divide by the ranks that shard it"
        )
    ranks = mesh.world_size()
    if config.sequences % ranks:
        raise UserError(
            f"sequences: {config.sequences} does not divide by {ranks} data ranks; write sequences: "
            f"{-(-config.sequences // ranks) * ranks}"
        )
    identities = [identity(source) for source in sources_of(plan, config)]
    mixed = identities[: len(config.mixed)]
    start = {} if config.start is None else read_coefficients(config.start, config, mixed, plan.donor.config)
    prepared = Prepared(config, plan, read_texts(plan, config), directory, identities, start)
    _check_unfinished(prepared)
    return prepared


def _check_learn(plan: Plan, config: DamConfig) -> None:
    """Refuse parts to learn that a model without MoE layers does not have."""
    if all(plan.dense) and set(config.learn) <= {"router", "experts"}:
        raise UserError(
            f"learn names {', '.join(config.learn)}, and the models have no MoE layer; write a list of "
            f"{', '.join(part for part in PARTS if part not in ('router', 'experts'))}"
        )


def adaptive_merge(config: DamConfig, directory: str | Path, overwrite: bool = False, progress: bool = False) -> int:
    """Learn the coefficients and write the merged folder; every process of a launch calls this.

    Args:
        config: the content of DAM.yaml.
        directory: the folder to make.
        overwrite: replace an earlier merge or export in it.
        progress: show progress and results on stderr.
    Returns:
        exit code: 0, or 75 if a signal stopped it and the same command continues.
    Raises:
        UserError: the config, the models or the texts are wrong; nothing was written.
    """
    stop = StopRequest()
    with ExitStack() as on_exit:
        signals = on_exit.enter_context(ExitStack())
        signals.callback(stop.restore)
        prepared = prepare(config, directory, overwrite)
        ranks = mesh.start(config.parallel, prepared.plan.donor.config, config.threads, False)
        on_exit.callback(mesh.stop)
        stop.started()
        with _work_folder(prepared, ranks):
            learned = _learn(prepared, ranks, stop, progress and ranks.is_first)
            if learned is None:
                return SAVED
            signals.close()  # a signal ends the writing at once; the same command repeats it
            mesh.stop()
            if ranks.is_first:
                _write(prepared, learned, progress)
    return 0


@contextmanager
def _work_folder(prepared: Prepared, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of the work folder, on rank 0."""
    with ExitStack() as held:

        def begin() -> None:
            make_folder(prepared.work)
            try:
                held.enter_context(file_lock(prepared.work, patience=0))
            except BlockingIOError:
                raise UserError(
                    f"another process is making {prepared.directory}; wait for it, or give another folder"
                ) from None
            if not (prepared.work / _MARK).exists():
                write_json(prepared.work / _MARK, prepared.mark())

        run_on_rank0(begin)
        yield


def _check_unfinished(prepared: Prepared) -> None:
    """Refuse to continue a run of another config, or of other models or texts."""
    before, now = read_json(prepared.work / _MARK), prepared.mark()
    if before is None or before == now:
        return
    settings = before.get("settings", {})
    changed = [name for name, value in now["settings"].items() if settings.get(name) != value]
    changed += ["the models' weights"] * (before.get("identities") != now["identities"])
    changed += ["the content of a text"] * (not changed and before.get("texts") != now["texts"])
    raise UserError(
        f"{prepared.work} holds an unfinished run with other settings ({', '.join(changed)}); remove that folder to "
        "start over, or give another OUT_DIR"
    )


def _learn(prepared: Prepared, ranks: Ranks, stop: StopRequest, progress: bool) -> dict[str, Any] | None:
    """The coefficients of every tensor, on rank 0 (elsewhere empty), and their parts; None if stopped by a signal."""
    config = prepared.config
    model = build_merged_model(prepared.plan, config, ranks)
    run_on_all_ranks(load_models, model, sources_of(prepared.plan, config))
    set_coefficients(model, prepared.start)
    learner = Learner(model, config, ranks)
    checkpoints = CheckpointDirectory.at(prepared.work)
    done = checkpoints.newest_intact()
    if done:
        load(learner.state(), checkpoints.path_of(done))
        learner.set_step(done)
    if not _steps(prepared, learner, done, checkpoints, stop, progress):
        return None
    return {"values": gather_coefficients(model), "parts": parts_of(model)}


def _steps(
    prepared: Prepared, learner: Learner, done: int, checkpoints: CheckpointDirectory, stop: StopRequest, progress: bool
) -> bool:
    """Make the steps after `done`; returns whether all were made, rather than stopped by a signal."""
    config = prepared.config
    with ExitStack() as open_files:
        log = open_log(prepared.work, done, learner.ranks, open_files)
        bar = open_files.enter_context(Progress("learning", config.steps, "step", progress))
        bar.skip_to(done)
        for step in range(done, config.steps):
            batch = {number: rows.of_step(step, config.sequences) for number, rows in prepared.texts.items()}
            record = _record(step + 1, learner.step(batch), config)
            log(record)
            bar.describe(f"loss {record['loss']:.4f}")
            bar.update()
            (asked,) = all_reduce_max([int(stop.number != 0)])
            if asked or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save(learner.state(), checkpoints, step + 1, KEPT)
            if asked and step + 1 < config.steps:
                if progress:
                    say(f"saved after step {step + 1} of {config.steps}; the same command continues")
                return False
    return True


def open_log(work: Path, done: int, ranks: Ranks, stack: ExitStack) -> Callable[[dict[str, Any]], None]:
    """A function that appends a record to metrics.jsonl, on rank 0; lines after `done` are cut back."""
    if not ranks.is_first:
        return lambda record: None
    lines = JsonLines(work / METRICS, done)
    stack.callback(lines.close)
    return lines.write


def _record(step: int, figures: dict[str, Any], config: DamConfig) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    distances = {config.models[number].model: value for number, value in figures["distances"].items()}
    return {
        "step": step,
        "loss": figures["loss"],
        "distance": distances,
        "penalty": figures["penalty"],
        "grad_norm": figures["grad_norm"],
    }


def _write(prepared: Prepared, learned: dict[str, Any], progress: bool) -> None:
    """Write the folder inside of the work folder, then rename it."""
    values, parts, config = learned["values"], learned["parts"], prepared.config
    result = prepared.work / "result"
    merged = write_merged(prepared.plan, config.mixed, values, result, progress)
    kept = {name: value for name, value in values.items() if parts[name] in config.learn or name in prepared.start}
    save_coefficients(result / FILE, kept, config, prepared.identities[: len(config.mixed)])
    write_json(result / SUMMARY, summary(values, parts, config) | {"steps": config.steps})
    copy_atomically(prepared.work / METRICS, result / METRICS)
    replace_folder(result, prepared.directory)
    shutil.rmtree(prepared.work, ignore_errors=True)
    if progress:
        say(f"the merged model and its coefficients are in {prepared.directory}\n{merged}")
