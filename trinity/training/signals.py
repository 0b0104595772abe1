"""Stop on SIGTERM or SIGINT: finish the step, save, exit with 75. A second SIGINT exits at once, as does any signal
while the run starts.

Python runs no signal handler while the ranks connect to each other: a rank whose peer was killed would wait until its
launcher kills it, half a minute of every restart. So a thread receives signals too, and ends a process that has nothing
to save yet.
"""

import os
import signal
import threading
from types import FrameType

from trinity.terminal import say

SAVED = 75
NOTHING_TO_SAVE = "stopped before a step was made; the same command starts again"
SAVING = "asked to stop: the step is finished and saved first (a second Ctrl-C ends at once, without saving)"


class StopRequest:
    """Records a signal that asks the process to stop; the trainer reads it between steps.

    Attributes:
        number: of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._starting = True
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def started(self) -> None:
        """Record that the process group exists: from now on a stop request waits for the end of a step."""
        self._starting = False

    def restore(self) -> None:
        """Restore the previous handlers."""
        self._starting = False
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self._write_end)  # ends the thread

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _listen(self) -> None:
        """Read signal numbers from the pipe: Python writes each on arrival, even while the main thread blocks."""
        printed = os.environ.get("RANK", "0") != "0"  # rank 0 prints the message
        while numbers := os.read(self._read_end, 16):
            stops = {signal.SIGTERM, signal.SIGINT} & set(numbers)
            if stops and not printed:
                say(NOTHING_TO_SAVE if self._starting else SAVING)
                printed = True
            if stops and self._starting:
                os._exit(SAVED)  # no step was made since the newest checkpoint
        os.close(self._read_end)
