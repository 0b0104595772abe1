"""Monitor one process of a run: heartbeat, loss spikes, router health, forgetting, stragglers, goodput.

The trainer calls the monitor before and after each step. The metrics are equal on all ranks, so all ranks make the
same decision without communication.

Shapes: M MoE layers, E experts.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from trinity import balancing
from trinity.config.run import RunConfig
from trinity.models.trinity import Trinity, moe_layers
from trinity.monitor.attention_probe import ProbeResult
from trinity.monitor.events import Events
from trinity.monitor.forgetting import Forgetting
from trinity.monitor.heartbeat import Heartbeat
from trinity.monitor.hooks import StepHooks, StepResult
from trinity.monitor.loss_spikes import SpikeDetector
from trinity.monitor.router_health import CollapseDetector
from trinity.monitor.straggler import StragglerDetector
from trinity.run_directory import RunDirectory

Value = TypeVar("Value")
SPIKES = "spikes"
"""The spike detector's key in state(), which every checkpoint has; one of an older version may lack the others."""
COLLAPSE = "collapse."
"""Prefix of the collapse detector's keys in state()."""
FORGETTING = "forgetting."
"""Prefix of the keys of the losses of step 0 in state(), which only a run that `init` continues has."""
VALIDATION_LOSS = "validation_loss."
"""Prefix of the validation losses in metrics.jsonl."""


class Monitor:
    """Monitor of one process.

    Attributes:
        events: this process's events.jsonl.
        heartbeat: every long operation beats it.
        spikes: the detector of loss spikes.
        end_reason: why the run must end after the last evaluation; "" if it need not.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory, rank: int, step: int, fingerprints: Mapping[str, str]
    ) -> None:
        """Start monitoring after `step` steps; the heartbeat's timeout runs from now on.

        Args:
            config, directory, rank, step: of this start.
            fingerprints: validation set → hash of its content.
        """
        health = config.health
        self.config, self._is_first = config, rank == 0
        self.events = Events(directory.path, rank, step)
        self.heartbeat = Heartbeat(health.heartbeat_seconds, self.events, directory.path)
        self.spikes = SpikeDetector(health.spike.window, health.spike.sigma)
        self._collapse = CollapseDetector(health.violation_factor, health.dead_steps, config.model.dense_layers)
        self._straggler = StragglerDetector(health.slow_factor)
        self._continues = bool(config.init.hf or config.init.run)
        self._forgetting = Forgetting(health.forgetting, fingerprints, config.evaluation.sequences)
        self.end_reason = ""
        self._bias_before_ME: Tensor | None = None
        self._started, self._useful_seconds = time.monotonic(), 0.0

    def before_step(self, model: Trinity, step: int) -> StepHooks:
        """Prepare for step `step`, counted from 1; return the hooks for its train_step."""
        self.events.step = step
        self._bias_before_ME = _biases(model) if self._logs_routers(step) and moe_layers(model) else None
        action = self.config.health.spike.action
        return StepHooks(
            microbatch_done=self.heartbeat.beat,
            detect_spike=None if action == "none" else self.spikes.detect,
            skip_spikes=action in ("skip", "rollback"),
        )

    def after_step(self, result: StepResult, step_seconds: float) -> dict[str, Any]:
        """Write the events of a step; return the monitor's fields of metrics.jsonl."""
        self.heartbeat.step_done()
        metrics = result.metrics
        if result.spike is not None:
            action = self.config.health.spike.action
            self.note("spike", result.spike, loss=metrics["loss"], grad_norm=metrics["grad_norm"], action=action)
        elif result.skip_reason == "not finite":
            self.note("skipped", "the loss or the gradient is not finite; nothing was changed")
        if result.counts_ME is not None:
            for message, fields in self._collapse.update(result.counts_ME):
                self.note("collapse", message, **fields)
        if result.skip_reason is None:
            self._useful_seconds += step_seconds
        goodput = self._useful_seconds / max(time.monotonic() - self._started, 1e-9)
        return {"goodput": goodput, "spike": result.spike is not None}

    def after_probe(self, probe: ProbeResult) -> dict[str, float]:
        """Write an event for each straggler; return the probe's fields of metrics.jsonl."""
        for message, fields in self._straggler.update(probe.seconds_R):
            self.note("slow_rank", message, **fields)
        spread = (max(probe.seconds_R) - min(probe.seconds_R)) / statistics.median_low(probe.seconds_R)
        return {"max_attention_logit": probe.max_logit, "rank_seconds_spread": spread}

    def after_evaluation(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Compare the validation losses with those of step 0; write an event for each forgetting budget exceeded.

        Args:
            metrics: validation_loss.NAME of every validation set, among others.
            step: steps made; 0 keeps the losses.
        Returns:
            forgetting.NAME of metrics.jsonl for each set with a budget.
        """
        losses = _below(VALIDATION_LOSS, metrics)
        if not step:
            self._forgetting.begin(losses)
        rises = self._forgetting.rises(losses)
        excesses = self._forgetting.excesses(rises)
        action = self.config.health.forgetting_action
        for excess in excesses:
            fields = {"set": excess.name, "rise": excess.rise, "budget": excess.budget}
            self.note("forgetting", excess.message, action=action, **fields)
        self.end_reason = excesses[0].message if excesses and action == "end" else ""
        return {f"forgetting.{name}": rise for name, rise in rises.items()}

    def check_baselines(self) -> None:
        """Refuse a forgetting budget whose loss of step 0 the loaded checkpoint lacks.

        Raises:
            UserError: naming the validation set.
        """
        self._forgetting.check()

    def router_record(self, result: StepResult, step: int, tokens: int, model: Trinity) -> dict[str, Any] | None:
        """The record of a step for router.jsonl, after before_step and train_step; None if none is due."""
        if self._bias_before_ME is None or result.counts_ME is None or result.router_entropy_M is None:
            return None
        bias_ME, counts_ME = _biases(model), result.counts_ME.double()
        return {
            "step": step,
            "tokens": tokens,
            "load": (counts_ME / counts_ME.sum(dim=1, keepdim=True)).tolist(),
            "max_violation": balancing.max_violation(result.counts_ME).tolist(),
            "dead": balancing.dead_share(result.counts_ME).tolist(),
            "entropy": result.router_entropy_M.tolist(),
            "bias_range": (bias_ME.amax(dim=1) - bias_ME.amin(dim=1)).tolist(),
            "bias_step_norm": (bias_ME - self._bias_before_ME).norm(dim=1).tolist(),
            "bias": bias_ME.tolist(),
        }

    def note(self, kind: str, message: str, **fields: Any) -> None:
        """Write an event that is the same on all ranks, from rank 0."""
        if self._is_first:
            self.events.note(kind, message, **fields)

    def state(self) -> dict[str, Tensor]:
        """The detectors' state by name, equal on every rank and every mesh.

        The heartbeat, goodput and the straggler detector belong to one start of the run and have no state here.
        """
        model = self.config.model
        state = {SPIKES: self.spikes.state()}
        if model.moe_layers:
            collapse = self._collapse.state(model.moe_layers, model.experts)
            state |= {f"{COLLAPSE}{name}": tensor for name, tensor in collapse.items()}
        if self._continues:
            state |= {f"{FORGETTING}{name}": tensor for name, tensor in self._forgetting.state().items()}
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what state() returned; a detector that an older checkpoint lacks starts empty."""
        self.spikes.restore(state[SPIKES])
        if collapse := _below(COLLAPSE, state):
            self._collapse.restore(collapse)
        self._forgetting.restore(_below(FORGETTING, state))

    def close(self) -> None:
        """Stop the heartbeat's thread."""
        self.heartbeat.close()

    def _logs_routers(self, step: int) -> bool:
        every = self.config.log.router_every
        return bool(every) and (step % every == 0 or step == 1) and self._is_first


def _below(prefix: str, entries: Mapping[str, Value]) -> dict[str, Value]:
    """The entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def _biases(model: Trinity) -> Tensor:
    """[M, E] fp32 on the CPU: a copy of every layer's expert bias."""
    return torch.stack([layer.expert_bias.detach() for layer in moe_layers(model)]).float().cpu().clone()
