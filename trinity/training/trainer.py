"""A run from its config to its exit code: lock the directory, build, resume, train, evaluate, save.

pretrain is what every process calls. Trainer.run is the training loop.

Exit codes: 0 finished; 75 stopped by a signal and saved; 3 too many bad steps in a row, too many rollbacks, or a
forgetting budget exceeded. A user's mistake is raised as
UserError, for which the command line exits with 2.
"""

import os
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trinity import STARTED
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load, model_state
from trinity.checkpoint.save import Saver, State
from trinity.config.paths import run_directory
from trinity.config.run import RunConfig
from trinity.data.stream.batch_schedule import BatchHistory, StepPlan
from trinity.data.stream.collate import Batch, count_padding
from trinity.errors import USER_MISTAKE, Failure, UserError
from trinity.hardware import device_name, memory_gib, peak_flops
from trinity.interop import export_hf, load_hf
from trinity.io.remote_path import AnyPath
from trinity.models.flops import flops_per_token
from trinity.monitor.attention_probe import probe_attention
from trinity.monitor.events import Events
from trinity.monitor.hooks import StepResult
from trinity.monitor.loggers import JsonLines, Logger, open_loggers
from trinity.monitor.monitor import SPIKES, Monitor
from trinity.monitor.param_norms import ParamNorms
from trinity.monitor.profiler import Profiler
from trinity.optim.lr_schedule import lr_fraction
from trinity.parallel import mesh
from trinity.parallel.collectives import all_reduce_max, errors_reach_all_ranks, reraise, run_on_all_ranks, run_on_rank0
from trinity.parallel.mesh import Ranks
from trinity.run_directory import RunDirectory
from trinity.terminal import say
from trinity.training.build import (
    batch_plan,
    build_model,
    make_optimizers,
    total_steps,
    trained_count,
)
from trinity.training.build_data import open_data
from trinity.training.checkpoint_average import CheckpointAverage
from trinity.training.divisibility import check_batches, check_mesh
from trinity.training.evaluator import Evaluator
from trinity.training.prerequisites import check_prerequisites
from trinity.training.resume import (
    HISTORY,
    Origin,
    check_optimizer_state,
    find_origin,
    fp32_products_of_run,
    history_tensor,
)
from trinity.training.run_summary import closing, opening
from trinity.training.run_tokenizer import keep_tokenizer, on_this_node, tokenizer_at_start, with_tokenizer
from trinity.training.signals import SAVED, StopRequest
from trinity.training.train_step import train_step

FINISHED, FAILED, TOO_MANY_BAD_STEPS = 0, 1, 3


def pretrain(config: RunConfig, accepted: list[str]) -> int:
    """Train a config to its end, or until a signal stops it; every process of the launch calls this.

    Args:
        config: the run.
        accepted: keys given with --accept-change: on resume they may differ from the checkpoint's config.
    Returns:
        the process's exit code, the same on all ranks.
    Raises:
        UserError: a user's mistake, with what to write instead.
    """
    check_mesh(config, mesh.world_size())
    if config.train.only:
        trained_count(config)  # refuses names that are nothing, before processes join a group
    stop_request = StopRequest()
    directory = trainer = None
    try:
        ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
        stop_request.started()
        path = run_directory(config)
        # before the directory is made, unless the refusal is to be recorded in it
        records_refusal = run_on_rank0(_records_refusal, path)
        if not records_refusal:
            run_on_all_ranks(check_prerequisites, config, ranks)
        directory = run_on_all_ranks(RunDirectory, path, ranks.is_first)
        linear = run_on_rank0(fp32_products_of_run, config, path, ranks.device)
        config = replace(config, kernels=replace(config.kernels, linear=linear))
        origin = find_origin(config, accepted, path, Events(path, ranks.rank).note)
        if records_refusal:
            run_on_all_ranks(check_prerequisites, config, ranks)
        tokenizer = run_on_rank0(tokenizer_at_start, config, path, resumes=origin.step > 0 and origin.own)
        trainer = Trainer(config, ranks, directory, origin, on_this_node(tokenizer, config))
        code = trainer.run(stop_request)
        trainer.saver.wait()
        dist.barrier()  # launchers end the other ranks seconds after the first exit, and rank 0 writes status.json
        trainer.say_closing(code)
        return code
    except BaseException as error:
        if directory is not None:
            with suppress(OSError):  # a full or read-only disk must not replace the error being handled
                _record_failure(error, directory, trainer)
        raise
    finally:
        if trainer is not None:
            trainer.close()
        stop_request.restore()
        if directory is not None:
            directory.release()
        mesh.stop()


def _records_refusal(path: Path) -> bool:
    """Whether a refused start is recorded in its directory: if that exists, or if the launcher restarts by itself."""
    return path.is_dir() or _launcher_restarts()


def _launcher_restarts() -> bool:
    """Whether the launcher restarts a failed run by itself."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _record_failure(error: BaseException, directory: RunDirectory, trainer: "Trainer | None") -> None:
    """Write the exit code to status.json, as launchers hide it, and STOP after a user's mistake under a launcher."""
    step = trainer.step if trainer else _newest(directory.path)
    if not isinstance(error, UserError):
        directory.set_status("stopped", FAILED, step, f"{type(error).__name__}: {error}")
        return
    directory.set_status("stopped", USER_MISTAKE, step, str(error))
    if _launcher_restarts():
        directory.forbid_restart(str(error))


def _newest(path: Path) -> int:
    """Step of the newest complete checkpoint, or 0. Best effort: runs while another error is being handled."""
    with suppress(UserError, Failure, OSError):
        return max(CheckpointDirectory.of_run(path).complete_steps(), default=0)
    return 0


class Requests(NamedTuple):
    """What happened on any rank since the last step and concerns all ranks; 0 for no.

    stop_signal: number of the signal that asks to stop.
    save: somebody touched SAVE in the run directory.
    failed_log: a record or an event could not be written.
    failed_save: a checkpoint could not be written in the background.
    """

    stop_signal: int
    save: int
    failed_log: int
    failed_save: int


class Trainer:
    """A run in progress: model, optimizers, data, monitor and loggers.

    Args:
        config: the run.
        ranks: the mesh.
        directory: the run directory, locked by rank 0.
        origin: the checkpoint to continue from.
        tokenizer: folder of the run's tokenizer (run_tokenizer.py); None without one.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, directory: RunDirectory, origin: Origin, tokenizer: Path | None = None
    ) -> None:
        self.config, self.ranks, self.directory, self.tokenizer = config, ranks, directory, tokenizer
        torch.manual_seed(config.run.seed)  # nothing here draws from it; a library might
        check_batches(config, self.ranks.data_ranks)
        self._set_plan(origin.history)
        with errors_reach_all_ranks():
            self.data = open_data(with_tokenizer(config, tokenizer), ranks, self.plan, origin.step)
        self.model = build_model(config, self.ranks)
        self.optimizers = make_optimizers(config, self.model)
        self.norms = ParamNorms(self.optimizers, ranks.shard_group)
        self.step, self.bad_steps, self.rollbacks = origin.step, 0, 0
        self._checkpoint_seconds: float | None = None  # that the last save stalled training; logged with the next step
        self._last_record: dict[str, Any] = {}
        self._router_record: dict[str, Any] | None = None
        self._stop_signal = ""  # name of the signal that stopped the run
        fingerprints = {name: source.fingerprint for name, source in self.data.validation.items()}
        self.monitor = Monitor(config, directory, ranks.rank, origin.step, fingerprints)
        beat = self.monitor.heartbeat.beat
        self.checkpoints = CheckpointDirectory.at(directory.path, config.checkpoint.url)
        self.saver = Saver(self.checkpoints, config.checkpoint, self.monitor.note, beat)
        self.average = CheckpointAverage(config.checkpoint.average, self.checkpoints, self.saver, self.monitor.note)
        try:
            self._start(origin)
        except BaseException:
            self.monitor.close()  # a heartbeat left behind would end this process later
            raise

    def _start(self, origin: Origin) -> None:
        """Load a checkpoint or initialise the weights; then open the loggers and announce the run."""
        config, ranks, path = self.config, self.ranks, self.directory.path
        resumes = origin.step > 0 and origin.own
        if origin.step:
            self._load(origin.checkpoints.path_of(origin.step))
            self.monitor.check_baselines()
        else:
            self._initialise()
        run_on_all_ranks(self._keep_config, replace_tokenizer=not resumes)
        events, beat = self.monitor.events, self.monitor.heartbeat.beat
        with errors_reach_all_ranks():
            self.loggers: list[Logger] = open_loggers(config, path, self.step, self.total) if ranks.is_first else []
        with errors_reach_all_ranks():
            self.router_log = JsonLines(path / "router.jsonl", self.step) if ranks.is_first else None
        self.evaluator = run_on_all_ranks(Evaluator, config, ranks, self.data, path, self.step, self.tokenizer, beat)
        self.profiler = run_on_all_ranks(Profiler, config.profile, events, ranks, self.total, beat)
        seconds = time.monotonic() - STARTED
        message = f"{ranks.world} {'process' if ranks.world == 1 else 'processes'}, ready after {seconds:.1f} s"
        machine = {"device": device_name(ranks.device), "processes": ranks.world}
        self.monitor.note("resume" if resumes else "start", message, total=self.total, seconds=seconds, **machine)
        run_on_all_ranks(reraise, events.failure)
        if ranks.is_first:
            for line in opening(config, self.plan, self.optimizers, self.data.loader.stream, ranks, path, self.step):
                say(line)

    def _keep_config(self, replace_tokenizer: bool) -> None:
        """Copy the tokenizer into the run directory, then write this start's config, which always names a tokenizer."""
        if not self.ranks.is_first:
            return
        if self.tokenizer is not None:
            self.tokenizer = keep_tokenizer(self.tokenizer, self.directory.path, replace_tokenizer)
        named = self.config.data.tokenizer
        self.directory.add_config(self.config if named else with_tokenizer(self.config, self.tokenizer))

    def run(self, stop_request: StopRequest) -> int:
        """Train until the last step, a stop signal, or a health limit; return the exit code."""
        config = self.config
        self.directory.set_status("running", None, self.step)
        self._evaluate_initial_model()
        while not self._is_finished():
            with self.profiler.around(self.step + 1):
                record = self.one_step()
            if record["spike"] and config.health.spike.action == "rollback":
                if not self._roll_back():
                    used = (
                        f"all health.rollbacks={config.health.rollbacks} are used, or there is no checkpoint before it"
                    )
                    return self._give_up(f"a loss spike cannot be rolled back: {used}")
                continue  # the step is undone, so it is not logged
            is_last = self._is_finished()
            if self._is_due(config.evaluation.every) or (is_last and config.evaluation.every):
                record |= self._validate()
                self.evaluator.write_samples(self.model, record)
            self.log(record)
            if self.bad_steps >= config.health.bad_steps:
                return self._give_up(f"{self.bad_steps} steps in a row had a loss or gradient that is not finite")
            if self.monitor.end_reason:
                self.save(wait=True)
                return self._give_up(f"{self.monitor.end_reason}; step {self.step} is saved")
            requests = self._gather_requests(stop_request)
            if is_last or requests.stop_signal or requests.save or self._is_due(config.checkpoint.every):
                self.save(wait=is_last or bool(requests.stop_signal))
            if self._is_due(config.export.every):
                self._export()
            if requests.stop_signal and not is_last:
                return self._stop(Signals(requests.stop_signal).name)
        return self._finish()

    def one_step(self) -> dict[str, Any]:
        """Train one step; return its record for metrics.jsonl."""
        start = time.perf_counter()
        plan = self.plan.at(self.step)
        batch = self.data.loader.take(self._rows_per_rank())
        data_seconds = time.perf_counter() - start
        if not self.config.data.document_mask:
            batch.document_ids_BS = None
        rate = lr_fraction(self.config, self.step, plan.tokens)
        source_counts = torch.from_numpy(self.data.loader.stream.tokens_read())
        if self.config.data.packing == "best_fit":
            source_counts = torch.cat([source_counts, count_padding(batch).sum()[None]])
        hooks = self.monitor.before_step(self.model, self.step + 1)
        every = self.config.log.norms_every
        if every and (self.step + 1) % every == 0:
            self.norms.snapshot()
        probe_metrics = self._probe(batch)
        result = train_step(
            self.model, self.optimizers, batch, self.config, rate, self.ranks, source_counts, data_seconds, hooks
        )
        self.step += 1
        self.bad_steps = self.bad_steps + 1 if result.skip_reason == "not finite" else 0
        record = self._record(plan, result, seconds=time.perf_counter() - start)
        record |= probe_metrics | {"attempt": self.rollbacks} | self.norms.metrics()
        record |= self.monitor.after_step(result, record["step_seconds"])
        self._router_record = self.monitor.router_record(result, self.step, record["tokens"], self.model)
        return record

    def _probe(self, batch: Batch) -> dict[str, float]:
        """Probe the attention before the next step, if a probe is due; return its metrics."""
        every = self.config.log.probe_every
        if not every or ((self.step + 1) % every and self.step):
            return {}
        probe = probe_attention(self.model, batch.tokens_BS, batch.targets_BS, batch.document_ids_BS, self.ranks)
        return self.monitor.after_probe(probe)

    def _record(self, plan: StepPlan, result: StepResult, seconds: float) -> dict[str, Any]:
        """The step's position in the data, its metrics and its speed, in the order of metrics.jsonl."""
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": plan.tokens_after,
            "sequences": plan.first + plan.sequences,
        }
        sources, counts = self.data.loader.stream.sources, result.source_counts or []
        record |= {f"source_tokens.{name}": int(tokens) for name, tokens in zip(sources, counts)}
        record |= {f"epoch.{name}": tokens / sources[name].tokens for name, tokens in zip(sources, counts)}
        if self.config.data.packing == "best_fit":
            record["padding_share"] = counts[-1] / (plan.sequences * plan.sequence_length)
        record |= result.metrics
        record |= {} if result.attention_spread is None else {"attention_spread": result.attention_spread}
        tokens_per_second = plan.sequences * plan.sequence_length / seconds
        record |= {
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "memory_gib": memory_gib(self.ranks.device),
        }
        peak = peak_flops(self.ranks.device)
        if peak:
            record["mfu"] = self._flops[plan.sequence_length] * tokens_per_second / (peak * self.ranks.world)
        if self._checkpoint_seconds is not None:
            record["checkpoint_seconds"], self._checkpoint_seconds = self._checkpoint_seconds, None
        return record

    def log(self, record: dict[str, Any]) -> None:
        """Pass a step's record to all loggers, and add its line to router.jsonl if one is due."""
        self._last_record = record
        try:
            for logger in self.loggers:
                logger.write(record)
            if self._router_record is not None and self.router_log is not None:
                self.router_log.write(self._router_record)
        except OSError as error:
            self.monitor.events.failure = error  # _gather_requests ends all ranks

    def _gather_requests(self, stop_request: StopRequest) -> Requests:
        """Agree over all ranks on what is requested; end all ranks if one could not write."""
        failure = self.monitor.events.failure
        local = Requests(
            stop_signal=stop_request.number,
            save=self.directory.take_save_request(),
            failed_log=failure is not None,
            failed_save=self.saver.failed,
        )
        requests = Requests(*all_reduce_max(list(local)))
        if requests.failed_log:
            run_on_all_ranks(reraise, failure)
        if requests.failed_save:
            self.saver.wait()  # raises the error, once the save has failed on this rank too
        return requests

    def _is_finished(self) -> bool:
        """Whether all steps are made, or the data has ended on some rank; every rank calls this."""
        if self.step >= self.total:
            return True
        if self.config.data.exhausted == "repeat":  # the data never ends
            return False
        return bool(all_reduce_max([self.data.loader.ended(self._rows_per_rank())])[0])

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _rows_per_rank(self) -> int:
        """Rows of the next step on each rank."""
        return self.plan.at(self.step).sequences // self.ranks.data_ranks

    def _evaluate_initial_model(self) -> None:
        """Log the validation of a model that `init` continues, before its first step, as the record of step 0."""
        init = self.config.init
        if self.step or not (init.hf or init.run) or not self.config.evaluation.every:
            return
        record = {"step": 0, "tokens": 0, "sequences": 0} | self._validate()
        self.evaluator.write_samples(self.model, record)
        self.log(record)

    def _validate(self) -> dict[str, float]:
        metrics = self.evaluator.validate(self.model)
        if self.config.checkpoint.average.every is not None:
            self.monitor.heartbeat.begin_long("averaging checkpoints")
            measure = partial(self.evaluator.validate_average, self.model)
            metrics |= self.average.evaluate(self.model, self.step, measure)
        self.monitor.note("evaluation", f"{len(self.data.validation)} validation sets", **metrics)
        return metrics | self.monitor.after_evaluation(metrics, self.step)

    def save(self, wait: bool) -> float:
        """Save this step; return the seconds that training stood still, without those of `wait`."""
        stalled = self._checkpoint_seconds = self.saver.save(self.state(), self.step)
        if wait:
            self.saver.wait()
        return stalled

    def _export(self) -> None:
        self.monitor.heartbeat.begin_long("exporting")
        folder = self.directory.path / "hf" / self.checkpoints.path_of(self.step).name
        beat = partial(self.monitor.heartbeat.beat, "exporting")
        export_hf(self.model, folder, self.tokenizer, overwrite=True, beat=beat)

    def _roll_back(self) -> bool:
        """After a spike, load the newest checkpoint, but skip the data read since then.

        Returns:
            False if there is no checkpoint or the rollback limit is reached.
        """
        spiked = self.step
        self.saver.wait()  # the save in flight may be the checkpoint to load, and may delete the one before
        if self.rollbacks >= self.config.health.rollbacks:
            return False
        self.monitor.heartbeat.begin_long("going back")
        step = self.checkpoints.newest_intact(self.monitor.note, before=spiked)
        if not step:
            return False
        rollbacks = self.rollbacks
        self._load(self.checkpoints.path_of(step), with_data=False)
        self.rollbacks = rollbacks + 1
        self.data.loader.jump(self.plan.at(step).first)
        for log in self._logs():
            log.rewind(self.step)
        self.monitor.note("rollback", f"from step {spiked} to the checkpoint of step {self.step}, past its data")
        return True

    def _give_up(self, reason: str) -> int:
        if self.ranks.is_first:
            say(f"error: {reason}; see {self.directory.path / 'metrics.jsonl'}")
        self.directory.set_status("stopped", TOO_MANY_BAD_STEPS, self.step, reason)
        self.directory.forbid_restart(reason)
        return TOO_MANY_BAD_STEPS

    def _stop(self, signal_name: str) -> int:
        self._stop_signal = signal_name
        self.monitor.note("stop", f"asked to stop by {signal_name}")
        self.directory.set_status("saved", SAVED, self.step, f"asked to stop by {signal_name}")
        return SAVED

    def _finish(self) -> int:
        reason = "" if self.step >= self.total else "a source has no more documents (data.exhausted is end)"
        self.monitor.note("finish", reason or "all steps are made")
        self.directory.set_status("finished", FINISHED, self.step, reason)
        return FINISHED

    def say_closing(self, code: int) -> None:
        """Print on rank 0 how the run ended and where its files are; nothing after bad steps."""
        if not self.ranks.is_first or code == TOO_MANY_BAD_STEPS:
            return
        seconds, saved = time.monotonic() - STARTED, self.checkpoints.path_of(self.step)
        path, record = self.directory.path, self._last_record
        say(closing(self.config, path, saved, record, self.step, self.total, seconds, self._stop_signal))

    def close(self) -> None:
        """End the last save, the data workers and the monitor, and close the logs."""
        self.saver.close()
        self.monitor.close()
        self.data.loader.close()
        for log in self._logs():
            log.close()

    def _logs(self) -> list[Logger | Evaluator]:
        """Everything that writes step by step, for rewind and close."""
        return [*self.loggers, self.evaluator, *filter(None, [self.router_log])]

    def state(self) -> State:
        """Everything that a resumed run needs, as one flat dictionary of tensors."""
        state = model_state(self.model)
        state |= {f"optim.{key}": value for key, value in self.optimizers.state_dict().items()}
        state |= {f"data.{key}": value for key, value in self.data.loader.state_dict().items()}
        state["run.step"] = torch.tensor(self.step)
        state[HISTORY] = history_tensor(self.plan.history(self.step))
        state["run.bad_steps"] = torch.tensor(self.bad_steps)
        state["run.rollbacks"] = torch.tensor(self.rollbacks)
        state |= {f"run.{key}": value for key, value in self.monitor.state().items()}
        state["run.random"] = torch.get_rng_state()
        return state

    def _set_plan(self, history: BatchHistory) -> None:
        """Plan the batches of all steps: those of `history` are made, the config's follow."""
        self.plan = batch_plan(self.config, history)
        self.total = total_steps(self.config, self.plan)
        model, lengths = self.config.model, self.plan.lengths()
        self._flops = {length: flops_per_token(model, length)["training"] for length in lengths}

    def _load(self, path: AnyPath, with_data: bool = True) -> None:
        """Load a checkpoint of a run; without its place in the data for a rollback."""
        state = self.state()  # model and optimizer tensors are filled in place
        # their sizes differ from save to save, and checkpoints of older versions lack some
        varies = ("data.", HISTORY, *(f"run.{name}" for name in self.monitor.state() if name != SPIKES))
        saved = run_on_all_ranks(empty_tensors, path, varies)
        own = {key for key in state if key.startswith(varies)}
        state |= {key: tensor for key, tensor in saved.items() if key in own}
        state = {key: tensor for key, tensor in state.items() if key not in own or key in saved}
        load(state, path)
        if HISTORY in state:
            self._set_plan(BatchHistory.from_rows(state[HISTORY].tolist()))
        self.data.loader.stream.plan = self.plan
        if with_data:
            data = {key.removeprefix("data."): value for key, value in state.items() if key.startswith("data.")}
            self.data.loader.load_state_dict(data)
        self.step, self.bad_steps = int(state["run.step"]), int(state["run.bad_steps"])
        self.rollbacks = int(state["run.rollbacks"])
        self.monitor.restore({key.removeprefix("run."): tensor for key, tensor in state.items()})
        torch.set_rng_state(state["run.random"])

    def _initialise(self) -> None:
        """Initialise the weights from the seed, or load those that `init` names."""
        init = self.config.init
        self.model.init_weights(self.config.run.seed)
        if init.hf:
            run_on_all_ranks(load_hf, init.hf, into=self.model)
        elif init.run:
            self._fork(Path(init.run))

    def _fork(self, path: Path) -> None:
        """Load the weights of another run, and its optimizer state unless init.keep=weights."""
        checkpoints = run_on_rank0(CheckpointDirectory.of_run, path)
        step = checkpoints.pick_intact(self.config.init.step, self.monitor.note)
        kept = ("model.",) if self.config.init.keep == "weights" else ("model.", "optim.")
        state = {key: value for key, value in self.state().items() if key.startswith(kept)}
        if self.config.init.keep != "weights":
            own = {key: value for key, value in state.items() if key.startswith("optim.")}
            run_on_rank0(check_optimizer_state, own, checkpoints.path_of(step), str(path), bool(self.config.train.only))
        load(state, checkpoints.path_of(step))
