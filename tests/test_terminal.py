"""Messages and progress: a bar on a terminal, plain lines in pipes and files, and Ctrl-C without a traceback."""

import io
import sys

import pytest

from tests.screen import Terminal, render
from trinity import terminal
from trinity.errors import run_main
from trinity.terminal import Progress, format_duration, say


class Clock:
    """Replaces time.monotonic by a value that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(terminal.time, "monotonic", lambda: self.now)


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar stays when done; a message is printed above it."""
    with Terminal(60, monkeypatch) as screen:
        with Progress("reading", 4, "file") as progress:
            progress.update()
            say("a message")
            message, bar = screen.lines()
            assert message == "a message"
            assert bar.startswith("reading:")
            progress.update_to(4)
        assert screen.lines()[0] == "a message"
        assert "4/4" in screen.lines()[1]


def test_progress_is_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line every 30 s, in a pipe and on a terminal without a width; no control characters."""
    expected = [
        "reading: 8%, 300 of 4,000 documents, 0:06:10 left",
        "reading: 15%, 600 of 4,000 documents, 0:05:40 left",
    ]
    now = Clock(monkeypatch)

    def read() -> None:
        now.now = 0
        with Progress("reading", 4000, "document") as progress:
            for second in range(1, 66):
                now.now = second
                progress.update(10)

    with Terminal(0, monkeypatch) as screen:
        read()
        assert screen.lines() == expected
        assert screen.raw == "".join(f"{line}\r\n" for line in expected)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    read()
    assert pipe.getvalue() == "".join(f"{line}\n" for line in expected)


def test_progress_of_a_resumed_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Units of an earlier process do not count for the speed: 1 GB in 40 s leaves 80 s for 2 GB."""
    now = Clock(monkeypatch)
    with Progress("preparing", 5e9, "B", scaled=True) as progress:
        progress.skip_to(2e9)
        progress.describe("5 tokens/s")
        now.now = 40
        progress.update_to(3e9)
    assert capsys.readouterr().err == "preparing: 60%, 3.00GB of 5.00GB, 0:01:20 left, 5 tokens/s\n"


def test_progress_of_unknown_length(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """It counts units; with show=False it prints nothing."""
    now = Clock(monkeypatch)
    for show in (True, False):
        now.now = 0
        with Progress("perplexity", None, "row", show) as progress:
            now.now = 40
            assert list(progress.over("ab")) == ["a", "b"]
            assert progress.n == 2
    assert capsys.readouterr().err == "perplexity: 1 rows\n"


def test_another_rank_clears_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of another rank replaces the first rank's bar."""
    with Terminal(60, monkeypatch) as screen:
        screen.echo("step 3/9 |####     |")
        say("rank 3: lost")
        assert screen.lines() == ["rank 3: lost"]


def test_a_closed_stderr_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """say() raises nothing."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    say("a message")


def test_ctrl_c_without_traceback(capsys: pytest.CaptureFixture) -> None:
    """One word on stderr, and exit code 130."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_main(interrupted)
    assert (end.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_format_duration() -> None:
    """Hours, minutes, seconds; rounded, not truncated."""
    expected = {0.4: "0:00:00", 59.6: "0:01:00", 3725: "1:02:05", 360_000: "100:00:00"}
    assert {seconds: format_duration(seconds) for seconds in expected} == expected


def test_render() -> None:
    """Overwritten characters are replaced, the others stay."""
    assert render("one\r\nabcdef\rxy\r\n12345\r\x1b[Kz") == ["one", "xycdef", "z"]
