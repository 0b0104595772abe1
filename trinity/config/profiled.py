"""Which steps of a run are profiled, as profile.steps says it: 10, "10-12", or a list of either."""

from typing import Any

from trinity.errors import UserError

MOST = 1000
"""Steps of one range: each makes a trace of megabytes, so more are a slip of the keyboard."""


def profiled_steps(value: Any) -> list[int]:
    """The steps, each once, rising, counted from 1; none where the value is None.

    Args:
        value: a number, a text as 10 or 10-12 (first to last), or a list of them.
    Raises:
        UserError: anything else, or a step below 1.
    """
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return sorted({step for part in parts for step in _between(part)})


def check_last_step(steps: list[int], total: int) -> None:
    """Refuse steps that the run does not have.

    Raises:
        UserError: naming the first of them.
    """
    late = [step for step in steps if step > total]
    if late:
        raise UserError(f"profile.steps names step {late[0]} and the run ends with step {total}; name earlier ones")


def _between(part: Any) -> range:
    first, dash, last = str(part).partition("-")
    if (
        isinstance(part, bool)
        or len(str(part)) > 40
        or not first.strip().isdecimal()
        or (dash and not last.strip().isdecimal())
    ):
        raise UserError(f"profile.steps={part} is not a step; write 10, 10-12, or a list such as [10, 20-22]")
    begin, end = int(first), int(last if dash else first)
    if not 1 <= begin <= end:
        raise UserError(f"profile.steps={part} names no step; steps count from 1, the first one first")
    if end - begin >= MOST:
        raise UserError(f"profile.steps={part} is {end - begin + 1} steps; ask for at most {MOST}")
    return range(begin, end + 1)
