"""What watches over a run: heartbeat, spikes, routers, goodput. The loop tells it of each step, and asks what to do.

All ranks see the same figures, so they come to the same judgement without asking each other.

Shapes: M MoE layers, E experts.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.models.trinity import Trinity, moe_layers
from trinity.monitor.attention_probe import ProbeResult
from trinity.monitor.events import Events
from trinity.monitor.heartbeat import Heartbeat
from trinity.monitor.hooks import StepHooks
from trinity.monitor.loss_spikes import SpikeDetector
from trinity.monitor.router_health import CollapseDetector
from trinity.monitor.straggler import StragglerDetector
from trinity.run_directory import RunDirectory

COLLAPSE = "collapse."
"""How the names of that watch's state begin."""


class Monitor:
    """Watches one process of a run.

    Attributes:
        events: where it notes what it sees.
        heartbeat: to be told of whatever takes long.
        spiked: what was out of the ordinary in the last step, None for nothing.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, rank: int, step: int) -> None:
        """Begin to watch; the heartbeat beats from now on."""
        health = config.health
        self.config, self._first = config, rank == 0
        self.events = Events(directory.path, rank, step)
        self.heartbeat = Heartbeat(health.heartbeat_seconds, self.events, directory.path)
        self.spikes = SpikeDetector(health.spike.window, health.spike.sigma)
        self.spiked: str | None = None
        self._collapse = CollapseDetector(health.violation_factor, health.dead_steps, config.model.dense_layers)
        self._slow = StragglerDetector(health.slow_factor)
        self._counts_ME: Tensor | None = None
        self._entropy_M: Tensor | None = None
        self._bias_before_ME: Tensor | None = None
        self._began, self._useful = time.monotonic(), 0.0

    def of_step(self, model: Trinity, step: int) -> StepHooks:
        """What train_step is to tell of the step that comes after `step`, and to ask."""
        self.events.step, self.spiked, self._counts_ME = step + 1, None, None
        self._bias_before_ME = _biases(model) if self._logs_routers(step + 1) and moe_layers(model) else None
        action = self.config.health.spike.action
        return StepHooks(
            beat=self.heartbeat.beat,
            judge=None if action == "none" else self._judge,
            skips=action in ("skip", "rollback"),
            routed=self._take_routing,
        )

    def after_step(self, record: dict[str, Any]) -> dict[str, Any]:
        """Note what the step showed.

        Returns:
            Figures that the record lacks.
        """
        self.heartbeat.step_done()
        if self.spiked:
            action = self.config.health.spike.action
            self.note("spike", self.spiked, loss=record["loss"], grad_norm=record["grad_norm"], action=action)
        elif record["skipped"]:
            self.note("skipped", "the loss or the gradient is not finite; nothing was changed")
        if self._counts_ME is not None:
            for sentence, figures in self._collapse.look(self._counts_ME):
                self.note("collapse", sentence, **figures)
        if not record["skipped"]:
            self._useful += record["step_seconds"]
        return {"goodput": self._useful / max(time.monotonic() - self._began, 1e-9), "spike": self.spiked is not None}

    def probed(self, found: ProbeResult) -> dict[str, float]:
        """Note what a probe showed; returns its figures for the record."""
        for sentence, figures in self._slow.look(found.seconds_R):
            self.note("slow_rank", sentence, **figures)
        spread = (max(found.seconds_R) - min(found.seconds_R)) / statistics.median_low(found.seconds_R)
        return {"max_attention_logit": found.max_logit, "rank_seconds_spread": spread}

    def routers(self, step: int, tokens: int, model: Trinity) -> dict[str, Any] | None:
        """What router.jsonl says of a step, where it is one that is logged."""
        if self._bias_before_ME is None or self._counts_ME is None:
            return None
        bias_ME, counts_ME = _biases(model), self._counts_ME.double()
        return {
            "step": step,
            "tokens": tokens,
            "load": (counts_ME / counts_ME.sum(dim=1, keepdim=True)).tolist(),
            "max_violation": balancing.max_violation(self._counts_ME).tolist(),
            "dead": balancing.dead_share(self._counts_ME).tolist(),
            "entropy": self._entropy_M.tolist(),
            "bias_range": (bias_ME.amax(dim=1) - bias_ME.amin(dim=1)).tolist(),
            "bias_step_norm": (bias_ME - self._bias_before_ME).norm(dim=1).tolist(),
            "bias": bias_ME.tolist(),
        }

    def note(self, kind: str, message: str, **more: Any) -> None:
        """Note what all ranks see alike: the first does."""
        if self._first:
            self.events.note(kind, message, **more)

    def state(self) -> dict[str, Tensor]:
        """What the watches remember, equal on every rank and every mesh, by name; without what belongs to one start."""
        model = self.config.model
        found = {"spikes": self.spikes.state()}
        if model.moe_layers:
            collapse = self._collapse.state(model.moe_layers, model.experts)
            found |= {f"{COLLAPSE}{name}": tensor for name, tensor in collapse.items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Remember what state() held; a watch that an older checkpoint does not know begins anew."""
        self.spikes.restore(state["spikes"])
        collapse = {key.removeprefix(COLLAPSE): value for key, value in state.items() if key.startswith(COLLAPSE)}
        if collapse:
            self._collapse.restore(collapse)

    def close(self) -> None:
        """Watch no more."""
        self.heartbeat.close()

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        self.spiked = self.spikes.judge(loss, grad_norm)
        return self.spiked

    def _take_routing(self, counts_ME: Tensor, entropy_M: Tensor) -> None:
        self._counts_ME, self._entropy_M = counts_ME, entropy_M

    def _logs_routers(self, step: int) -> bool:
        every = self.config.log.router_every
        return bool(every) and (step % every == 0 or step == 1) and self._first


def _biases(model: Trinity) -> Tensor:
    """[M, E] fp32 on the CPU: a copy of every layer's expert bias."""
    return torch.stack([layer.expert_bias.detach() for layer in moe_layers(model)]).float().cpu().clone()
