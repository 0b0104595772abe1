"""Events of a run besides its steps: one JSON object a line in events.jsonl, and warnings on the console.

Any rank may write events. Each line is appended in one write, so lines of several processes do not mix.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trinity.io.json_files import append_json_line
from trinity.terminal import say

QUIET = {"start", "resume", "checkpoint", "stop", "finish", "evaluation", "profile"}
"""Kinds that are not printed: the console does not need them, or has a line of its own for them."""


class Events:
    """The events of one process.

    Attributes:
        step: the step that new events belong to; the monitor sets it.
        failure: the last error while writing, None if there was none. note() does not raise it: the trainer checks it
            between steps, where all ranks can end together.
    """

    def __init__(self, directory: Path, rank: int, step: int = 0) -> None:
        """Append to directory/events.jsonl, which the first event creates."""
        self.path, self.rank, self.step = directory / "events.jsonl", rank, step
        self.failure: OSError | None = None

    def note(self, kind: str, message: str, **fields: Any) -> None:
        """Append one event, and print it on stderr unless its kind is in QUIET.

        Args:
            kind: start, resume, checkpoint, checkpoint_damaged, stop, finish, skipped, spike, rollback, collapse,
                forgetting, slow_rank, heartbeat, disk, evaluation or profile.
            message: one sentence.
            fields: further fields of the event, as JSON can hold them.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"time": now, "step": self.step, "kind": kind, "rank": self.rank, "message": message, **fields}
        try:
            append_json_line(self.path, event)
        except OSError as error:
            self.failure = error
        if kind not in QUIET:
            say(f"rank {self.rank}, step {self.step}: {kind}: {message}")
