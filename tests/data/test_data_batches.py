"""The batch plan against a plain loop over the steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.data.batches import BatchPlan
from trinity.errors import UserError


def loop(sequences: int, ramp: list[tuple[int, int]], length: int, steps: int) -> list[tuple[int, int]]:
    """(first sequence, sequences) of each step: at every step, the last entry whose tokens have been seen."""
    plan, first = [], 0
    for _ in range(steps):
        size = sequences
        for tokens, larger in ramp:
            if first * length >= tokens:
                size = larger
        plan.append((first, size))
        first += size
    return plan


RAMPS = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 40)), max_size=4, unique_by=lambda entry: entry[0])


@settings(deadline=None, max_examples=150)
@given(sequences=st.integers(1, 40), ramp=RAMPS.map(sorted), length=st.integers(1, 50), tokens=st.integers(-5, 5000))
def test_against_a_loop(sequences: int, ramp: list[tuple[int, int]], length: int, tokens: int) -> None:
    plan, steps = BatchPlan(sequences, ramp, length), loop(sequences, ramp, length, 400)
    assert [plan.at(step) for step in range(400)] == steps
    enough = [step for step, (first, _) in enumerate(steps) if first * length >= tokens]
    if enough:
        assert plan.steps_for_tokens(tokens) == enough[0]


def test_the_large_run() -> None:
    """The report's Large: 12288 sequences of 8192, 16384 after 4.9T tokens; whole numbers to 17T."""
    plan = BatchPlan(12288, [(4_900_000_000_000, 16384)], 8192)
    change = -(-4_900_000_000_000 // (12288 * 8192))
    assert plan.at(change - 1) == ((change - 1) * 12288, 12288)
    assert plan.at(change) == (change * 12288, 16384)
    assert plan.at(change + 10) == (change * 12288 + 10 * 16384, 16384)
    steps = plan.steps_for_tokens(17_000_000_000_000)
    assert plan.at(steps)[0] * 8192 >= 17_000_000_000_000 > plan.at(steps - 1)[0] * 8192


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, [], 8), r"batch\.sequences=0 must be at least 1"),
        ((4, [], 0), r"data\.sequence_length=0 must be at least 1"),
        ((4, [(10, 0)], 8), "has 0 sequences from 10 tokens on"),
        ((4, [(10, 8), (10, 16)], 8), "from 10 tokens on, after 10 tokens"),
    ],
)
def test_mistakes_are_named(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchPlan(*arguments)
