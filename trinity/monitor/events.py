"""What happened in a run besides its steps: one JSON object a line in events.jsonl, and warnings on the console.

Any rank may note something. Lines are appended in one write each, so that several processes do not mix theirs.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trinity.io.json_files import append_json_line
from trinity.terminal import say

QUIET = {"start", "resume", "checkpoint", "stop", "finish", "evaluation", "profile"}
"""Kinds that the console does not need to see, or is told of in other words."""


class Events:
    """The events of one process.

    Attributes:
        step: the step that what is noted belongs to; the loop keeps it.
        failure: why something could not be written, None while all was. Whoever notes goes on: the loop asks at the
            edge of a step, where all ranks can end together.
    """

    def __init__(self, directory: Path, rank: int, step: int = 0) -> None:
        """Note into directory/events.jsonl, which is made when there is something to note."""
        self.path, self.rank, self.step = directory / "events.jsonl", rank, step
        self.failure: OSError | None = None

    def note(self, kind: str, message: str, **more: Any) -> None:
        """Append one event, and say it on stderr unless its kind is of no concern there.

        Args:
            kind: start, resume, checkpoint, checkpoint_damaged, stop, finish, skipped, spike, rollback, collapse,
                slow_rank, heartbeat, disk, evaluation or profile.
            message: one sentence.
            more: figures that belong to it, as JSON can hold them.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"time": now, "step": self.step, "kind": kind, "rank": self.rank, "message": message, **more}
        try:
            append_json_line(self.path, event)
        except OSError as error:
            self.failure = error
        if kind not in QUIET:
            say(f"rank {self.rank}, step {self.step}: {kind}: {message}")
