"""Evaluate the average of a run's last checkpoints beside its own weights (checkpoint.average).

The average after step t is Σ c_i θ_i over the checkpoints of the last `window` multiples of `every` up to t, with the
weights of trinity.optim.decay_weights. It is made anew for each evaluation from the checkpoints on disk: so it has no
state of its own, and a resumed run has the average of the uninterrupted one. Step t itself is not saved yet when it is
evaluated: its weights are those of the model. Every rank reads and averages its own shards.

    step t ──[copy to host]──[average into the model]──evaluate──[copy back]──step t + 1

Sums are those of `linear` in trinity.merging.methods, newest checkpoint first, so tools/average.py gives the same bits.
"""

import math
from collections.abc import Callable

import torch

from trinity.checkpoint.directory import CheckpointDirectory, Note, averaged_steps
from trinity.checkpoint.load import load, model_state
from trinity.checkpoint.save import Saver, State, copy_to_host, local_shard
from trinity.config.run import AverageConfig
from trinity.errors import Failure, UserError
from trinity.models.trinity import Trinity
from trinity.optim.decay_weights import decay_weights
from trinity.parallel.collectives import run_on_rank0

NOT_AVERAGED = "expert_momentum"
"""The balancing rule's momentum, which no forward pass reads."""


class CheckpointAverage:
    """The average of one run's checkpoints; every rank has one and calls it at the same steps.

    Args:
        settings: checkpoint.average.
        checkpoints: the run's.
        saver: of these checkpoints; its host copy holds the run's weights while the average is in the model.
        note: called on every rank when a checkpoint cannot be read.
    """

    def __init__(self, settings: AverageConfig, checkpoints: CheckpointDirectory, saver: Saver, note: Note) -> None:
        self._settings, self._checkpoints, self._saver, self._note = settings, checkpoints, saver, note

    @torch.no_grad()
    def evaluate(self, model: Trinity, step: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Call `measure` with the average in the model, which then has its own weights again, bit for bit.

        Args:
            model: after `step` steps.
            step: the steps made so far.
            measure: evaluates the model.
        Returns:
            what `measure` returns; nothing before the window is full, and where a checkpoint is missing or unreadable.
        Raises:
            Failure, UserError: the save in flight failed.
        """
        steps = averaged_steps(self._settings, step)
        if len(steps) < self._settings.window:
            return {}
        buffers = self._saver.idle_buffers()  # waits: the save in flight may be of one of these steps
        if not run_on_rank0(self._are_complete, [saved for saved in steps if saved != step]):
            return {}
        state = _averaged_tensors(model)
        own = copy_to_host(state, buffers)
        try:
            return measure() if self._average_into(state, steps, step) else {}
        finally:
            _averaged_tensors(model)  # frees what FSDP gathered of the average
            for name, tensor in state.items():
                local_shard(tensor).copy_(local_shard(own[name]))

    def _are_complete(self, steps: list[int]) -> bool:
        return all(self._checkpoints.checkpoint(step).is_complete() for step in steps)

    def _average_into(self, state: State, steps: list[int], step: int) -> bool:
        """Replace the tensors, which are those after `step` steps, by the average.

        Returns:
            False if a checkpoint cannot be read, which is noted; the same on all ranks.
        """
        weights = decay_weights(steps, self._settings.decay)
        total = math.fsum(weights)
        read: State = {name: torch.empty_like(tensor, device="cpu") for name, tensor in state.items()}
        for saved, weight in zip(reversed(steps), reversed(weights)):
            if saved != step:
                try:
                    load(read, self._checkpoints.path_of(saved))
                except (UserError, Failure) as error:
                    self._note("checkpoint_damaged", f"the average is not evaluated: {error}")
                    return False
            for name, tensor in state.items():
                part = local_shard(tensor)
                value = part if saved == step else local_shard(read[name]).to(part.device)
                if saved == steps[-1]:
                    part.copy_(value).mul_(weight / total)
                else:
                    part.add_(value, alpha=weight / total)
        return True


def _averaged_tensors(model: Trinity) -> State:
    """The model's parameters and expert biases; FSDP frees what it has gathered of them."""
    return {name: tensor for name, tensor in model_state(model).items() if not name.endswith(NOT_AVERAGED)}
