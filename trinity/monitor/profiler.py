"""Profile chosen steps on chosen ranks with torch's profiler: a trace, and a table of the costliest operations.

profile/step_00000010.rank0.json.gz opens in https://ui.perfetto.dev or chrome://tracing; the table is beside it as
.txt; on a GPU with profile.memory, .memory.pickle is for https://pytorch.org/memory_viz. Each step has its own files.

Other steps and other ranks run without the profiler. The profiler slows its step down, so that step_seconds is not
representative; afterwards the other ranks wait for the files, some ten seconds for a step of a hundred thousand
operations.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from trinity.config.check import check_last_step, profiled_steps
from trinity.config.run import ProfileConfig
from trinity.errors import UserError
from trinity.io.local import write_atomically
from trinity.monitor.events import Events
from trinity.parallel.mesh import Ranks
from trinity.terminal import say

TABLE_ROWS = 20
"""Operations in the table."""


class Profiler:
    """Profiles this rank's share of a run's chosen steps.

    Args:
        config: the steps and ranks to profile.
        events: of this process; the files go into profile/ beside events.jsonl.
        ranks: the mesh.
        total: number of the run's last step.
        beat: called after each file, as writing them is slow.
    Raises:
        UserError: a step or a rank that the run does not have.
    """

    def __init__(
        self, config: ProfileConfig, events: Events, ranks: Ranks, total: int, beat: Callable[[], None]
    ) -> None:
        steps = profiled_steps(config.steps)
        check_last_step(steps, total)
        absent = [rank for rank in config.ranks if rank >= ranks.world]
        if steps and absent:
            last = ranks.world - 1
            raise UserError(f"profile.ranks names rank {absent[0]} and the last one of this run is {last}; name others")
        self._steps = set(steps) if ranks.rank in config.ranks else set()
        self._prints_table = ranks.rank == min(config.ranks, default=-1)
        self._folder, self._events = events.path.parent / "profile", events
        self._rank, self._device, self._memory = ranks.rank, ranks.device, config.memory
        self._beat = beat

    def around(self, step: int) -> AbstractContextManager[None]:
        """A context manager that profiles a step, counted from 1, if it was chosen."""
        return self._profiled(step) if step in self._steps else nullcontext()

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        snapshot = self._memory and on_gpu
        if snapshot:
            torch.cuda.memory._record_memory_history()  # documented by torch, despite the underscore
        try:
            with profile(activities=activities, profile_memory=self._memory) as profiler:
                yield
                if on_gpu:
                    torch.cuda.synchronize(self._device)  # the trace must hold all of the step's kernels
            self._write(profiler, step, snapshot)
        finally:
            if snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: profile, step: int, snapshot: bool) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"step_{step:08d}.rank{self._rank}"
        profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        self._beat()
        table = costliest(profiler, self._device)
        write_atomically(self._folder / f"{name}.txt", table)
        if snapshot:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        self._beat()
        self._events.note("profile", f"profile/{name}.json.gz is written")
        if self._prints_table:
            say(f"step {step} on rank {self._rank}, costliest operations:\n{table}")


def costliest(profiler: profile, device: torch.device) -> str:
    """Table of the operations with the largest self time on the compute device, largest first."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=60)
