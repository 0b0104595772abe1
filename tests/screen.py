"""A terminal for tests: stderr becomes a pty of a given width; `lines` returns the lines that the screen shows.

Open it in the body of a test: pytest replaces stderr after the set-up of fixtures.
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
        raw: everything written to the terminal so far.
    """

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace stderr by the pty."""
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._reader, False)
        self.raw = ""
        self._writer = os.fdopen(writer, "w", buffering=1, encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", self._writer)
        monkeypatch.setenv("TERM", "xterm")

    def lines(self) -> list[str]:
        """The lines on the screen, without trailing spaces and without an empty last line."""
        self._writer.flush()
        self._read()
        return render(self.raw)

    def echo(self, text: str) -> None:
        """Echo text, as a terminal does when a key is pressed."""
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


def render(text: str) -> list[str]:
    """The lines that a screen shows after `text`, with carriage returns and ESC[K applied."""
    rows: list[list[str]] = [[]]
    column = 0
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
    lines = ["".join(row).rstrip() for row in rows]
    return lines if lines[-1] else lines[:-1]
