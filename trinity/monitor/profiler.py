"""A trace of chosen steps on chosen ranks, with torch's profiler, and a table of what took the time.

profile/step_00000010.rank0.json.gz opens in https://ui.perfetto.dev or chrome://tracing; the table stands beside it as
.txt; on a GPU with profile.memory, .memory.pickle is for https://pytorch.org/memory_viz. Each step has its own files.

The other steps and the other ranks run as if there were no profiler. A profiled step is slower by the profiler's own
work, so its step_seconds says little; afterwards the other ranks wait for the files, some ten seconds for a step of a
hundred thousand operations.
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

COSTLIEST = 20
"""Rows of the table."""


class Profiler:
    """Profiles this rank's share of a run's chosen steps.

    Args:
        config: which steps and ranks.
        events: of this process; files go into profile/ beside them.
        ranks: the mesh.
        total: the run's last step.
        beat: called as the files, which take their time, are written.
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
        self._speaks = ranks.rank == min(config.ranks, default=-1)
        self._folder, self._events = events.path.parent / "profile", events
        self._rank, self._device, self._memory = ranks.rank, ranks.device, config.memory
        self._beat = beat

    def around(self, step: int) -> AbstractContextManager[None]:
        """What a step, counted from 1, is to run in: nothing, unless it was chosen."""
        return self._watched(step) if step in self._steps else nullcontext()

    @contextmanager
    def _watched(self, step: int) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        snapshot = self._memory and on_gpu
        if snapshot:
            torch.cuda.memory._record_memory_history()  # torch documents it, underscore and all
        try:
            with profile(activities=activities, profile_memory=self._memory) as seen:
                yield
                if on_gpu:
                    torch.cuda.synchronize(self._device)  # or the trace ends before the step's kernels do
            self._write(seen, step, snapshot)
        finally:
            if snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, seen: profile, step: int, snapshot: bool) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"step_{step:08d}.rank{self._rank}"
        seen.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        self._beat()
        table = costliest(seen, self._device)
        write_atomically(self._folder / f"{name}.txt", table)
        if snapshot:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        self._beat()
        self._events.note("profile", f"profile/{name}.json.gz is written")
        if self._speaks:
            say(f"step {step} on rank {self._rank}, costliest operations:\n{table}")


def costliest(seen: profile, device: torch.device) -> str:
    """The table of the operations that took most time of their own, on the device that computes, first to last."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=COSTLIEST, max_name_column_width=60)
