"""The batch schedule against a plain loop over the steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.data.stream.batch_schedule import BatchHistory, BatchPlan
from trinity.errors import UserError


def plan_by_loop(
    sequences: int,
    ramp: list[tuple[int, int]],
    length: int,
    phases: list[tuple[int, int]],
    steps: int,
    first: int = 0,
    tokens_seen: int = 0,
) -> list[tuple[int, int, int, int, int]]:
    """The plan of each step: at every step, the last entries whose tokens have been seen apply."""
    plan = []
    for _ in range(steps):
        size = [sequences, *(larger for tokens, larger in ramp if tokens_seen >= tokens)][-1]
        phase, long = [
            (0, length),
            *((i, long) for i, (tokens, long) in enumerate(phases, 1) if tokens_seen >= tokens),
        ][-1]
        plan.append((first, size, long, tokens_seen, phase))
        first += size
        tokens_seen += size * long
    return plan


def entries(largest: int) -> st.SearchStrategy:
    entry = st.tuples(st.integers(1, 3000), st.integers(1, largest))
    return st.lists(entry, max_size=4, unique_by=lambda entry: entry[0]).map(sorted)


@settings(deadline=None, max_examples=150)
@given(
    sequences=st.integers(1, 40), ramp=entries(40), length=st.integers(1, 50), phases=entries(50),
    tokens=st.integers(-5, 5000),
)  # fmt: skip
def test_against_a_loop(sequences: int, ramp: list, length: int, phases: list, tokens: int) -> None:
    plan, steps = BatchPlan(sequences, ramp, length, phases), plan_by_loop(sequences, ramp, length, phases, 400)
    assert [plan.at(step) for step in range(400)] == steps
    enough = [step for step, (_, _, _, tokens_seen, _) in enumerate(steps) if tokens_seen >= tokens]
    if enough:
        assert plan.steps_for_tokens(tokens) == enough[0]
    for first, size, long, _, phase in steps:
        for k in (first, first + size - 1):
            assert (plan.at_sequence(k).sequence_length, plan.at_sequence(k).phase) == (long, phase)
    assert plan.at(3).tokens_after == plan.at(4).tokens
    assert set(plan.lengths()) >= {long for _, _, long, _, _ in steps}


def test_the_large_run() -> None:
    """The report's Large: 12288 sequences of 8192, 16384 after 4.9T tokens; whole numbers to 17T."""
    plan = BatchPlan(12288, [(4_900_000_000_000, 16384)], 8192)
    change = -(-4_900_000_000_000 // (12288 * 8192))
    assert plan.at(change - 1)[:2] == ((change - 1) * 12288, 12288)
    assert plan.at(change)[:2] == (change * 12288, 16384)
    assert plan.at(change + 10)[:2] == (change * 12288 + 10 * 16384, 16384)
    steps = plan.steps_for_tokens(17_000_000_000_000)
    assert plan.at(steps).tokens >= 17_000_000_000_000 > plan.at(steps - 1).tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, [], 8), r"batch\.sequences=0 must be at least 1"),
        ((4, [], 0), r"data\.sequence_length=0 must be at least 1"),
        ((4, [(10, 0)], 8), "has 0 sequences from 10 tokens on"),
        ((4, [(10, 8), (10, 16)], 8), "from 10 tokens on, after 10 tokens"),
        ((4, [], 8, [(10, 16), (5, 8)]), r"data\.phases has 8 tokens a sequence from 5 tokens on, after 10 tokens"),
    ],
)
def test_mistakes_are_named(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchPlan(*arguments)


@settings(deadline=None, max_examples=150)
@given(
    first=st.tuples(st.integers(1, 40), entries(40), st.integers(1, 50), entries(50)), done=st.integers(0, 60),
    then=st.tuples(st.integers(1, 40), entries(40), st.integers(1, 50), entries(50)),
)  # fmt: skip
def test_another_schedule_continues_a_history(first: tuple, done: int, then: tuple) -> None:
    """Steps of the history stay; later ones are those of a loop from its end."""
    made = plan_by_loop(*first, done + 1)
    history = BatchPlan(*first).history(done)
    assert (history.step, history.sequences, history.tokens) == (done, made[done][0], made[done][3])
    history = BatchHistory.from_rows(history.rows())
    plan = BatchPlan(*then, history)
    steps = [*made[:done], *plan_by_loop(*then, 300, made[done][0], made[done][3])]
    assert [plan.at(step) for step in range(len(steps))] == steps
    for k, size, long, _, phase in steps:
        for at in (k, k + size - 1):
            assert (plan.at_sequence(at).sequence_length, plan.at_sequence(at).phase) == (long, phase)
    again = plan.history(done + 100)
    assert BatchPlan(*then, again).history(done + 200) == plan.history(done + 200)  # a stop in between leaves no trace
