"""SIGTERM and SIGINT: finish the step, save, end with 75. A second SIGINT ends at once."""

import signal
from types import FrameType


class StopRequest:
    """Notes that the process was asked to stop; read at the edge of a step.

    Attributes:
        number: the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
