"""A run from its config to its exit code: take the directory, build, resume, step, save, end.

Exit codes: 0 finished, 75 saved because it was asked to stop, 3 too many bad steps in a row; user mistakes leave as
UserError (2) through the command line.
"""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist

from trinity import STARTED
from trinity.checkpoint.directory import (
    Home,
    complete_steps,
    home_of,
    home_of_run,
    newest_intact,
    pick_intact,
    step_folder,
)
from trinity.checkpoint.load import load, model_state, tensors_of
from trinity.checkpoint.save import Saver, State
from trinity.config.paths import run_directory
from trinity.config.run import RunConfig
from trinity.data.stream.batch_schedule import BatchHistory
from trinity.data.stream.collate import Batch
from trinity.data.stream.validation import validation_sequences
from trinity.errors import USER_MISTAKE, Failure, UserError
from trinity.evaluation.samples import Sampler
from trinity.evaluation.validation_loss import evaluate
from trinity.hardware import device_name, memory_gib, peak_flops
from trinity.interop import export_hf, load_hf
from trinity.models.flops import flops_per_token
from trinity.monitor.attention_probe import probe_attention
from trinity.monitor.events import Events
from trinity.monitor.loggers import JsonLines, Sink, open_sinks
from trinity.monitor.monitor import COLLAPSE, Monitor
from trinity.monitor.param_norms import ParamNorms
from trinity.monitor.profiler import Profiler
from trinity.optim.build import ownership_table
from trinity.parallel import mesh
from trinity.parallel.collectives import all_reduce_max, reraise, run_on_all_ranks, run_on_rank0
from trinity.parallel.mesh import Ranks
from trinity.run_directory import RunDirectory
from trinity.terminal import say
from trinity.training.build import (
    batch_plan,
    build_model,
    check_batches,
    check_mesh,
    make_optimizers,
    microbatch_notes,
    microbatch_size,
    total_steps,
)
from trinity.training.build_data import document_notes, open_data
from trinity.training.lr_schedule import decay_follows_length, rates_at, schedule_notes
from trinity.training.prerequisites import check_prerequisites
from trinity.training.resume import HISTORY, Origin, find_origin, history_tensor
from trinity.training.run_summary import closing
from trinity.training.run_tokenizer import keep_tokenizer, on_this_node, tokenizer_at_start, with_tokenizer
from trinity.training.signals import SAVED, StopRequest
from trinity.training.train_step import train_step

FINISHED, FAILED, TOO_MANY_BAD_STEPS = 0, 1, 3


def pretrain(config: RunConfig, accepted: list[str]) -> int:
    """Run a config to its end, or until it is asked to stop; every process of the launch calls this.

    Args:
        config: the run.
        accepted: keys whose change is meant, on resume.
    Returns:
        the process's exit code, the same on all of them.
    Raises:
        UserError: what the user must mend.
    """
    check_mesh(config, mesh.world_size())
    stop_request = StopRequest()
    directory = training = None
    try:
        ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
        stop_request.started()
        path = run_directory(config)
        keeps_refusals = run_on_rank0(lambda: _keeps_refusals(path))
        if not keeps_refusals:
            run_on_all_ranks(lambda: check_prerequisites(config, ranks))
        directory = run_on_all_ranks(lambda: RunDirectory(path, ranks.is_first))
        origin = find_origin(config, accepted, path, Events(path, ranks.rank).note)
        if keeps_refusals:
            run_on_all_ranks(lambda: check_prerequisites(config, ranks))
        tokenizer = run_on_rank0(lambda: tokenizer_at_start(config, path, resumes=origin.step > 0 and origin.own))
        training = Trainer(config, ranks, directory, origin, on_this_node(tokenizer, config))
        code = training.run(stop_request)
        training.saver.wait()
        dist.barrier()  # a launcher gives the others seconds once one has left, and the first has status.json to write
        training.say_closing(code)
        return code
    except BaseException as error:
        if directory is not None:
            with suppress(OSError):  # a disk that is full or read-only must not hide what happened
                _note_end(error, directory, training)
        raise
    finally:
        if training is not None:
            training.close()
        stop_request.restore()
        if directory is not None:
            directory.release()
        mesh.stop()


def _keeps_refusals(path: Path) -> bool:
    """Whether a run that cannot start says so in its directory: one that exists, or a launcher's that restarts."""
    return path.is_dir() or _restarts()


def _restarts() -> bool:
    """Whether the launcher starts a failed run again by itself; a person who mistyped just types again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _note_end(error: BaseException, directory: RunDirectory, training: "Trainer | None") -> None:
    """status.json gets the true code, which a launcher may hide."""
    step = training.step if training else _newest(directory.path)
    if not isinstance(error, UserError):
        directory.set_status("stopped", FAILED, step, f"{type(error).__name__}: {error}")
        return
    directory.set_status("stopped", USER_MISTAKE, step, str(error))
    if _restarts():
        directory.forbid_restart(str(error))


def _newest(path: Path) -> int:
    """The newest complete checkpoint as far as one can see, 0 for none; what went wrong before is what counts."""
    with suppress(UserError, Failure, OSError):
        return max(complete_steps(home_of_run(path)), default=0)
    return 0


class Trainer:
    """The state of a run in progress: what a checkpoint holds, and where figures go.

    Args:
        config: the run.
        ranks: the mesh.
        directory: its folder, held by the first rank.
        origin: the checkpoint to go on from.
        tokenizer: folder of its tokenizer (run_tokenizer.py); None without one.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, directory: RunDirectory, origin: Origin, tokenizer: Path | None = None
    ) -> None:
        self.config, self.ranks, self.directory, self.tokenizer = config, ranks, directory, tokenizer
        torch.manual_seed(config.run.seed)  # nothing here draws from it; a library might
        check_batches(config, self.ranks.data_ranks)
        self._set_plan(origin.history)
        self.data = run_on_all_ranks(
            lambda: open_data(with_tokenizer(config, tokenizer), ranks, self.plan, origin.step)
        )
        self.model = build_model(config, self.ranks)
        self.optimizers = make_optimizers(config, self.model)
        self.norms = ParamNorms(self.optimizers, ranks.copy_group)
        self.step, self.bad_steps, self.rollbacks = origin.step, 0, 0
        self._stalled: float | None = None  # by the last save, until a record has it
        self._last_record: dict[str, Any] = {}
        self._stopped_by = ""  # the signal's name
        self.watcher = Monitor(config, directory, ranks.rank, origin.step)
        beat = self.watcher.heartbeat.beat
        self.home = home_of(config.checkpoint.url, directory.path)
        self.saver = Saver(self.home, config.checkpoint, self.watcher.note, beat)
        try:
            self._open(origin)
        except BaseException:
            self.watcher.close()  # or its alarm would end whoever goes on after this mistake
            raise

    def _open(self, origin: Origin) -> None:
        """Load or begin, and open what figures are written to."""
        config, ranks = self.config, self.ranks
        resumes = origin.step > 0 and origin.own
        if origin.step:
            self._load(origin.home, origin.step)
        else:
            self._begin()
        run_on_all_ranks(lambda: self._keep_config(anew=not resumes))
        self.sinks: list[Sink] = run_on_all_ranks(self._open_sinks)
        self.routers = run_on_all_ranks(self._open_routers)
        self.sampler, self.samples = run_on_all_ranks(self._open_samples)
        events, beat = self.watcher.events, self.watcher.heartbeat.beat
        self.profiler = run_on_all_ranks(lambda: Profiler(config.profile, events, ranks, self.total, beat))
        seconds = time.monotonic() - STARTED
        told = f"{self.ranks.world} processes, ready after {seconds:.1f} s"
        machine = {"device": device_name(ranks.device), "processes": ranks.world}
        self.watcher.note("resume" if resumes else "start", told, total=self.total, seconds=seconds, **machine)
        run_on_all_ranks(lambda: reraise(self.watcher.events.failure))
        self._announce()

    def _keep_config(self, anew: bool) -> None:
        """Copy the tokenizer into the run directory, then write this start's config, which names one in any case."""
        if not self.ranks.is_first:
            return
        if self.tokenizer is not None:
            self.tokenizer = keep_tokenizer(self.tokenizer, self.directory.path, anew)
        named = self.config.data.tokenizer
        self.directory.add_config(self.config if named else with_tokenizer(self.config, self.tokenizer))

    def run(self, stop_request: StopRequest) -> int:
        """Step until the end, a stop request, or too many bad steps."""
        self.directory.set_status("running", None, self.step)
        self._evaluate_start()
        saved = self.step
        while self.step < self.total and not self._data_has_ended():
            with self.profiler.around(self.step + 1):
                record = self.one_step()
            if self.watcher.spiked and self.config.health.spike.action == "rollback":
                if not self._roll_back():
                    return self._give_up("spikes come again after every way back")
                continue
            ending = self.step == self.total or self._data_has_ended()
            every = self.config.evaluation.every
            if every and (self.step % every == 0 or ending):
                record |= self._evaluate()
                self._sample(record)
            self.log(record)
            if self.bad_steps >= self.config.health.bad_steps:
                return self._give_up(f"{self.bad_steps} steps in a row had a loss or gradient that is not finite")
            stop, asked = self._asked(stop_request)
            if ending or stop or asked or self._due(self.config.checkpoint.every):
                self.save(wait=ending or bool(stop))
                saved = self.step
            if self._due(self.config.export.every):
                self._export()
            if stop and not ending:
                self._stopped_by = Signals(stop).name
                self.watcher.note("stop", f"asked to stop by {self._stopped_by}")
                self.directory.set_status("saved", SAVED, saved, f"asked to stop by {self._stopped_by}")
                return SAVED
        reason = "" if self.step >= self.total else "a source has no more documents (data.exhausted is end)"
        self.watcher.note("finish", reason or "all steps are made")
        self.directory.set_status("finished", FINISHED, self.step, reason)
        return FINISHED

    def _asked(self, stop_request: StopRequest) -> list[int]:
        """To stop, by which signal, and to save: by any rank.

        Where a record or a checkpoint could not be written on one of them, all end here.
        """
        failure = self.watcher.events.failure
        flags = [stop_request.number, self.directory.take_save_request(), failure is not None, self.saver.failed]
        *asked, failed, unsaved = all_reduce_max(flags)
        if failed:
            run_on_all_ranks(lambda: reraise(failure))
        if unsaved:
            self.saver.wait()  # which raises, as soon as this rank knows it too
        return asked

    def _data_has_ended(self) -> bool:
        """Whether some rank lacks rows for the next step; never where sources are repeated."""
        if self.config.data.exhausted == "repeat":
            return False
        return bool(all_reduce_max([self.data.loader.ended(self._share())])[0])

    def _share(self) -> int:
        """This rank's rows of the next step."""
        return self.plan.at(self.step).sequences // self.ranks.data_ranks

    def _open_sinks(self) -> list[Sink]:
        return open_sinks(self.config, self.directory.path, self.step, self.total) if self.ranks.is_first else []

    def _open_routers(self) -> JsonLines | None:
        return JsonLines(self.directory.path / "router.jsonl", self.step) if self.ranks.is_first else None

    def _open_samples(self) -> tuple[Sampler | None, JsonLines | None]:
        """What makes samples, on every rank, and the file they go to, on the first."""
        wanted, folder = self.config.evaluation, self.tokenizer
        path = self.directory.path / "samples.jsonl"
        kept = self.ranks.is_first and (wanted.prompts or path.exists())  # an old file is cut back in any case
        file = JsonLines(path, self.step) if kept else None
        if not wanted.prompts:
            return None, file
        return Sampler(list(wanted.prompts), wanted.sample_tokens, folder, self.config.model.vocab_size), file

    def close(self) -> None:
        """End the last save, the workers and the watch, and close what figures are written to."""
        self.saver.close()
        self.watcher.close()
        self.data.loader.close()
        for sink in [*self.sinks, *filter(None, [self.samples, self.routers])]:
            sink.close()

    def state(self) -> State:
        """Everything that a resumed run needs, as one flat dictionary of tensors."""
        state = model_state(self.model)
        state |= {f"optim.{key}": value for key, value in self.optimizers.state_dict().items()}
        state |= {f"data.{key}": value for key, value in self.data.loader.state_dict().items()}
        state["run.step"] = torch.tensor(self.step)
        state[HISTORY] = history_tensor(self.plan.history(self.step))
        state["run.bad_steps"] = torch.tensor(self.bad_steps)
        state["run.rollbacks"] = torch.tensor(self.rollbacks)
        state |= {f"run.{key}": value for key, value in self.watcher.state().items()}
        state["run.random"] = torch.get_rng_state()
        return state

    def _set_plan(self, history: BatchHistory) -> None:
        """Let the config's batches begin where the steps made so far end."""
        self.plan = batch_plan(self.config, history)
        self.total = total_steps(self.config, self.plan)
        model, lengths = self.config.model, self.plan.lengths()
        self._flops = {length: flops_per_token(model, length)["training"] for length in lengths}

    def _load(self, home: Home, step: int, with_data: bool = True) -> None:
        state = self.state()  # model and optimizer tensors are filled in place
        # their sizes differ from save to save, and older checkpoints lack some
        varies = ("data.", HISTORY, f"run.{COLLAPSE}")
        saved = run_on_all_ranks(lambda: tensors_of(step_folder(home, step), varies))
        own = {key for key in state if key.startswith(varies)}
        state |= {key: tensor for key, tensor in saved.items() if key in own}
        state = {key: tensor for key, tensor in state.items() if key not in own or key in saved}
        load(state, home, step)
        if HISTORY in state:
            self._set_plan(BatchHistory.from_rows(state[HISTORY].tolist()))
        self.data.loader.stream.plan = self.plan
        if with_data:
            data = {key.removeprefix("data."): value for key, value in state.items() if key.startswith("data.")}
            self.data.loader.load_state_dict(data)
        self.step, self.bad_steps = int(state["run.step"]), int(state["run.bad_steps"])
        self.rollbacks = int(state["run.rollbacks"])
        self.watcher.restore({key.removeprefix("run."): tensor for key, tensor in state.items()})
        torch.set_rng_state(state["run.random"])

    def _begin(self) -> None:
        """Initial weights, from the seed or from where the config says."""
        init = self.config.init
        self.model.init_weights(self.config.run.seed)
        if init.hf:
            run_on_all_ranks(lambda: load_hf(init.hf, into=self.model))
        elif init.run:
            self._fork(Path(init.run))

    def _fork(self, path: Path) -> None:
        """Weights, and the optimizer's state where init.keep says so, of another run."""
        home = run_on_rank0(lambda: home_of_run(path))
        step = pick_intact(home, self.config.init.step, self.watcher.note)
        kept = ("model.",) if self.config.init.keep == "weights" else ("model.", "optim.")
        load({key: value for key, value in self.state().items() if key.startswith(kept)}, home, step)

    def one_step(self) -> dict[str, Any]:
        """Make the next step; returns its record."""
        began = time.perf_counter()
        plan = self.plan.at(self.step)
        batch = self.data.loader.take(self._share())
        waited = time.perf_counter() - began
        if not self.config.data.document_mask:
            batch.document_ids_BS = None
        rate = rates_at(self.config, self.step, plan.tokens)
        counts = torch.from_numpy(self.data.loader.stream.tokens_read())
        watch = self.watcher.of_step(self.model, self.step)
        every = self.config.log.norms_every
        if every and (self.step + 1) % every == 0:
            self.norms.remember()
        probed = self._probe(batch)
        figures = train_step(self.model, self.optimizers, batch, self.config, rate, self.ranks, counts, waited, watch)
        self.step += 1
        self.bad_steps = self.bad_steps + 1 if figures["skipped"] and not self.watcher.spiked else 0
        seconds = time.perf_counter() - began
        record = {"step": self.step, "tokens": plan.tokens_after, "sequences": plan.first + plan.sequences}
        record |= self._named_counts(figures.pop("source_counts"))
        record |= figures
        record |= {
            "step_seconds": seconds,
            "tokens_per_second": plan.sequences * plan.sequence_length / seconds,
            "memory_gib": memory_gib(self.ranks.device),
        }
        peak = peak_flops(self.ranks.device)
        if peak:
            record["mfu"] = self._flops[plan.sequence_length] * record["tokens_per_second"] / (peak * self.ranks.world)
        if self._stalled is not None:
            record["checkpoint_seconds"], self._stalled = self._stalled, None
        return record | probed | {"attempt": self.rollbacks} | self.norms.figures() | self.watcher.after_step(record)

    def _probe(self, batch: Batch) -> dict[str, float]:
        """Figures of a closer look at the model before its next step, where it is time for one."""
        every = self.config.log.probe_every
        if not every or ((self.step + 1) % every and self.step):
            return {}
        found = probe_attention(self.model, batch.tokens_BS, batch.targets_BS, batch.document_ids_BS, self.ranks)
        return self.watcher.probed(found)

    def log(self, record: dict[str, Any]) -> None:
        """Hand the record of a step to all sinks, and add a line to router.jsonl where it is time for one."""
        line = self.watcher.routers(record["step"], record["tokens"], self.model)
        self._last_record = record
        try:
            for sink in self.sinks:
                sink.write(record)
            if line is not None:
                self.routers.write(line)
        except OSError as error:
            self.watcher.events.failure = error  # for all ranks to end by

    def _roll_back(self) -> bool:
        """After a spike: go back to the newest checkpoint, but on with the data, past the batches since then.

        Returns:
            False where there is no checkpoint, or the way back was gone too often.
        """
        spiked = self.step
        self.saver.wait()  # it may be the one to go back to, and may remove the one before
        if self.rollbacks >= self.config.health.rollbacks:
            return False
        self.watcher.heartbeat.begin_long("going back")
        step = newest_intact(self.home, self.watcher.note, before=spiked)
        if not step:
            return False
        rollbacks = self.rollbacks
        self._load(self.home, step, with_data=False)
        self.rollbacks = rollbacks + 1
        self.data.loader.jump(self.plan.at(step).first)
        for sink in [*self.sinks, *filter(None, [self.samples, self.routers])]:
            sink.go_back(self.step)
        self.watcher.note("rollback", f"from step {spiked} to the checkpoint of step {self.step}, past its data")
        return True

    def _named_counts(self, read: list[float]) -> dict[str, float]:
        """Tokens read of each source since the run began, and as a share of the tokens that the source has."""
        sources = self.data.loader.stream.sources
        found = {f"source_tokens.{name}": int(tokens) for name, tokens in zip(sources, read)}
        return found | {f"epoch.{name}": tokens / sources[name].tokens for name, tokens in zip(sources, read)}

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _evaluate(self) -> dict[str, float]:
        config, found = self.config, {}
        for name, source in self.data.validation.items():
            rows = validation_sequences(
                source,
                config.data.sequence_length,
                config.evaluation.sequences,
                config.data.loss_on_document_start,
                rank=self.ranks.rank,
                ranks=self.ranks.data_ranks,
            )
            figures = evaluate(
                self.model,
                rows,
                config.batch.microbatch,
                config.data.document_mask,
                self.data.byte_lengths_V,
                self.ranks.device,
                self.watcher.heartbeat.beat,
            )
            found |= {f"validation_{figure}.{name}": value for figure, value in figures.items()}
        self.watcher.note("evaluation", f"{len(self.data.validation)} validation sets", **found)
        return found

    def _evaluate_start(self) -> None:
        """Validation of a model that is continued, before its first step: the record of step 0."""
        init = self.config.init
        if self.step or not (init.hf or init.run) or not self.config.evaluation.every:
            return
        record = {"step": 0, "tokens": 0, "sequences": 0} | self._evaluate()
        self._sample(record)
        self.log(record)

    def _sample(self, record: dict[str, Any]) -> None:
        """Continue the config's prompts, on every rank, into samples.jsonl."""
        if self.sampler is None:
            return
        for sample in self.sampler(self.model, self.ranks.device, self.watcher.heartbeat.beat):
            if self.samples is not None:
                self.samples.write({"step": record["step"], "tokens": record["tokens"], **sample})

    def save(self, wait: bool) -> float:
        """Save this step; returns the seconds that training stood still, without what a wait for the end takes."""
        self._stalled = self.saver.save(self.state(), self.step)
        if wait:
            self.saver.wait()
        return self._stalled

    def _export(self) -> None:
        self.watcher.heartbeat.begin_long("exporting")
        folder = self.directory.path / "hf" / step_folder(self.directory.path, self.step).name
        beat = partial(self.watcher.heartbeat.beat, "exporting")
        export_hf(self.model, folder, self.tokenizer, overwrite=True, beat=beat)

    def _give_up(self, reason: str) -> int:
        if self.ranks.is_first:
            say(f"error: {reason}; see {self.directory.path / 'metrics.jsonl'}")
        self.directory.set_status("stopped", TOO_MANY_BAD_STEPS, self.step, reason)
        self.directory.forbid_restart(reason)
        return TOO_MANY_BAD_STEPS

    def _announce(self) -> None:
        if not self.ranks.is_first:
            return
        if self.step >= self.total:
            done = f"{self.directory.path} has made {self.step} steps of {self.total}; nothing is left to do"
            stretches = decay_follows_length(self.config)
            accept = " with --accept-change optim.schedule, since the decay ends with the run" * stretches
            say(f"{done} (a larger run.steps or run.tokens goes on{accept})")
            return
        for note in schedule_notes(self.config, self.total, self.plan):
            say(note)
        say(ownership_table(self.optimizers))
        share = self._share()
        micro = microbatch_size(share, self.config.batch.microbatch)
        start = f"resuming after step {self.step}" if self.step else "starting"
        say(
            f"{start}: {self.total} steps on {self.ranks.world} × {self.ranks.device.type}, {share} rows a rank in "
            f"microbatches of {micro}, {torch.get_num_threads()} threads, into {self.directory.path}"
        )
        for note in [
            *microbatch_notes(self.config, self.ranks.data_ranks),
            *document_notes(self.data.loader.stream),
        ]:
            say(note)

    def say_closing(self, code: int) -> None:
        """Say on the first rank how the run ended and where its files are; nothing after bad steps."""
        if not self.ranks.is_first or code == TOO_MANY_BAD_STEPS:
            return
        seconds, saved = time.monotonic() - STARTED, step_folder(self.home, self.step)
        path, record = self.directory.path, self._last_record
        say(closing(self.config, path, saved, record, self.step, self.total, seconds, self._stopped_by))
