"""The learning-rate schedule against its pieces written out, over whole runs."""

import math

import pytest

from trinity.errors import UserError
from trinity.optim.lr_schedule import rate_scale


def plain(step: int, now: int, warmup: int, decay: str, start: int, length: int, final: float) -> float:
    """Warm-up, constant, decay and tail as separate cases; they do not overlap here."""
    if step < warmup:
        return (step + 1) / warmup
    if decay == "none" or now < start:
        return 1.0
    if now >= start + length:
        return final
    if decay == "linear":
        return 1.0 - (1.0 - final) * (now - start) / length
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * (now - start) / length)) / 2.0


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("length", [0, 1, 20])
def test_every_step_of_a_run(warmup: int, decay: str, final: float, unit: str, length: int) -> None:
    """The batch doubles at step 15, so tokens are not proportional to steps; 1e-15: two roundings of a number < 1."""
    tokens, start = 0, 12 if unit == "steps" else 1200
    scaled = length if unit == "steps" else 100 * length
    for step in range(60):
        scale = rate_scale(
            step,
            tokens,
            warmup_steps=warmup,
            decay=decay,
            decay_start=start,
            decay_length=scaled,
            final=final,
            unit=unit,
        )
        now = step if unit == "steps" else tokens
        assert scale == pytest.approx(plain(step, now, warmup, decay, start, scaled, final), rel=0, abs=1e-15)
        tokens += 100 if step < 15 else 200


def test_a_run_of_n_steps_ends_just_above_final() -> None:
    """Decay over the last 4 of 10 steps: steps are 0-based, so no step has rate 0."""
    run = [
        rate_scale(s, 0, warmup_steps=2, decay="linear", decay_start=6, decay_length=4, final=0.0, unit="steps")
        for s in range(10)
    ]
    assert run == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_large_halfway_through_its_decay() -> None:
    """Cosine to 1/10 of the peak is at (1 + 0.1)/2 halfway: 14.1T to 17T tokens."""
    decay = {"decay": "cosine", "decay_start": 14_100_000_000_000, "decay_length": 2_900_000_000_000, "final": 0.1}
    scale = rate_scale(200_000, 15_550_000_000_000, warmup_steps=2000, unit="tokens", **decay)
    assert scale == pytest.approx(0.55, abs=1e-15)


def test_wrong_values_are_refused() -> None:
    arguments = {"warmup_steps": 1, "decay_start": 1, "decay_length": 1, "final": 0.0}
    with pytest.raises(UserError, match=r"decay='step' is not known; use one of none, linear, cosine"):
        rate_scale(0, 0, decay="step", unit="steps", **arguments)
    with pytest.raises(UserError, match=r"'epochs'; use steps or tokens"):
        rate_scale(0, 0, decay="linear", unit="epochs", **arguments)
