"""SIGTERM and SIGINT: finish the step, save, end with 75. A second SIGINT ends at once, and so does any while starting.

While the ranks look for each other, Python runs no handler: a rank whose neighbour was killed would sit there until its
launcher loses patience, half a minute of every restart. So a thread hears of signals too, and ends a process that has
nothing to save yet.
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
    """Notes that the process was asked to stop; read at the edge of a step.

    Attributes:
        number: the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._starting = True
        self._heard, heard = os.pipe()
        os.set_blocking(heard, False)
        self._written, self._wakeup_before = heard, signal.set_wakeup_fd(heard, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def started(self) -> None:
        """From now on a step's edge will come, where the request is seen."""
        self._starting = False

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        self._starting = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._written)  # which ends the thread

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _listen(self) -> None:
        """The interpreter writes each signal's number as it arrives, whatever the main thread is doing."""
        told = os.environ.get("RANK", "0") != "0"  # one process of the run says it
        while numbers := os.read(self._heard, 16):
            asked = {signal.SIGTERM, signal.SIGINT} & set(numbers)
            if asked and not told:
                say(NOTHING_TO_SAVE if self._starting else SAVING)
                told = True
            if asked and self._starting:
                os._exit(SAVED)  # the newest checkpoint is all there is
        os.close(self._heard)
