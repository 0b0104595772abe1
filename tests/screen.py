"""A terminal for tests: stderr is a pty of some width, and what is written to it comes back as the lines that show.

A test opens it in its own body: pytest puts its own stderr in place after a fixture's set-up.
"""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest


class Terminal:
    """The pty of a test.

    Attributes:
        raw: all that was written to it so far.
    """

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it in the place of stderr."""
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._reader, False)
        self.raw = ""
        self._writer = os.fdopen(writer, "w", buffering=1, encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", self._writer)
        monkeypatch.setenv("TERM", "xterm")

    def lines(self) -> list[str]:
        """What shows on the screen, without spaces at the ends and the empty line at the bottom."""
        self._writer.flush()
        self._read()
        return shown(self.raw)

    def echo(self, text: str) -> None:
        """Write as the terminal itself does when a key is pressed."""
        self._writer.write(text)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        os.close(self._reader)

    def _read(self) -> None:
        data = b""
        while True:
            try:
                data += os.read(self._reader, 65536)
            except BlockingIOError:
                break
        self.raw += data.decode()


def shown(text: str) -> list[str]:
    """The lines on a screen that carriage returns go back on and that ESC[K clears."""
    rows, column = [[]], 0
    for character in text.replace("\x1b[K", "\x00"):
        row = rows[-1]
        if character == "\n":
            rows.append([])
        elif character == "\r":
            column = 0
        elif character == "\x00":
            del row[column:]
        else:
            row.extend(" " * (column + 1 - len(row)))
            row[column] = character
            column += 1
    found = ["".join(row).rstrip() for row in rows]
    return found if found[-1] else found[:-1]
