"""What happened in a run besides its steps: one JSON object a line in events.jsonl, and warnings on the console.

Any rank may note something. Lines are appended in one write each, so that several processes do not mix theirs.
"""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

QUIET = {"start", "resume", "checkpoint", "finish", "evaluation", "profile"}
"""Kinds that the console does not need to see."""


class Events:
    """The events of one process.

    Attributes:
        step: the step that what is noted belongs to; the loop keeps it.
    """

    def __init__(self, directory: Path, rank: int, step: int = 0) -> None:
        """Note into directory/events.jsonl, which is made when there is something to note."""
        self.path, self.rank, self.step = directory / "events.jsonl", rank, step

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
        append_line(self.path, event)
        if kind not in QUIET:
            print(f"rank {self.rank}, step {self.step}: {kind}: {message}", file=sys.stderr, flush=True)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON object as one line, in one write."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(value) + "\n").encode())
    finally:
        os.close(descriptor)
