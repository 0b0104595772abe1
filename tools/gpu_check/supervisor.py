"""Run the parts of the GPU check one after the other, each in a process with its own clock, within a total time.

A part that fails, hangs or runs out of memory ends its own process only; what it had measured is in results.jsonl. A
part that exceeds its limit gets SIGTERM, and SIGKILL five seconds later; one that even this does not end (a process
stuck in the driver) is left behind. SIGTERM, SIGINT or SIGHUP end the check: it writes its files and exits.

    python -m gpu_check.supervisor [--cpu] OUT [PART …]     by tools/gpu_check.sh, which prepares the environment
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_check import arguments
from gpu_check.packages import missing_sentence
from gpu_check.parts import Part
from gpu_check.process import GRACE, Worker
from gpu_check.results import committed_name, is_measured, judged, read_cases, write_all
from gpu_check.worker import NO_GPU

from trinity.errors import UserError, explain

RESERVE = GRACE + 4
"""Seconds kept at the end: for a part that ignores SIGTERM, and to write the files."""

TOO_LATE = ("timed out", "skipped")
"""Outcomes that are no failure of a part that is extra."""

LOOK_SECONDS = 60
"""Most seconds of the look for a GPU; without an answer the parts run, and show what is wrong."""

LACKS_GPU = "torch finds no GPU; use --cpu to try the check without one"

EARLY = 3
"""Seconds before a part's limit at which it starts no further measurement (BENCH_SECONDS)."""


class Check:
    """One run of the check.

    rows: of check.json, one for each part so far.
    stopped: set by a signal, looked at between two steps, so that no file is left half written.
    unwritten: why the files could not be written last time, such as a full disk; None if they were.
    """

    def __init__(self, out: Path, scratch: Path, cpu: bool, began: float) -> None:
        """Args: began: time.time() at the start of gpu_check.sh; CHECK_SECONDS count from there."""
        self.out, self.scratch, self.cpu, self.began = out, scratch, cpu, began
        self.logs = scratch / "logs"
        self.logs.mkdir()
        self.deadline = began + arguments.total_seconds() - RESERVE
        self.rows: list[dict[str, Any]] = []
        self.stopped = False
        self.unwritten: OSError | None = None
        self.spare: Worker | None = None
        self.workers = 0

    def finds_no_gpu(self) -> bool:
        """Whether torch says that there is no GPU; asked in a process of its own, while the first part's starts."""
        worker, self.spare = self._start(), self._start()
        limit = max(0.0, min(LOOK_SECONDS, self.deadline - time.time()))
        environment = {"BENCH_RECORD": "", "BENCH_PART": ""}
        task = {"function": "", "options": {}, "gpu": True, "environment": environment, "ends": time.time() + limit}
        worker.hand_over(task, self.logs / "gpu.log")
        code = self._code(worker, limit)
        worker.end(at_once=True)
        return code == NO_GPU

    def run(self, parts: list[Part]) -> int:
        """Run the parts.

        Returns:
            The exit code: 1 if a part failed or had no time; 2 without a GPU, or if the files are not complete.
        """
        for index, part in enumerate(parts):
            row = self._run_or_skip(part, is_last=index + 1 == len(parts))
            if row["outcome"] not in ("skipped", "left out"):
                self._write()
            why = f" ({row['why']})" if "why" in row else ""
            print(f"{row['part']}: {row['outcome']}{why} after {row['seconds']:.0f} s", flush=True)
            if row["code"] == NO_GPU:
                print(f"error: {LACKS_GPU}", file=sys.stderr)
                return 2
        self._write()
        if self.unwritten is not None:
            return 2
        measured = read_cases(self.out / "results.jsonl").values()
        if any(is_measured(case, row) for cases in measured for case, row in cases.items()):
            path = self.out / "check.json"
            print(f"to commit: {path} as tools/bench/results/{committed_name(path)}")
        good = {part.name: ("done", "left out", *(TOO_LATE if part.extra else ())) for part in parts}
        return int(self.stopped or any(row["outcome"] not in good[row["part"]] for row in self.rows))

    def close(self) -> None:
        """End the process that waits for a part."""
        if self.spare is not None:
            self.spare.end(at_once=True)

    def _run_or_skip(self, part: Part, is_last: bool) -> dict[str, Any]:
        limit = min(part.cpu_limit if self.cpu else part.limit, arguments.part_seconds())
        left = self.deadline - time.time()
        row: dict[str, Any] = {"part": part.name, "outcome": "running", "code": None, "seconds": 0.0, "limit": limit}
        self.rows.append(row)
        if self.cpu and part.cpu_options is None:
            return _set(row, outcome="left out", why="needs a GPU")
        if self.stopped:
            return _set(row, outcome="skipped", why="the check was stopped")
        if left < part.least:
            return _set(row, outcome="skipped", why=f"needs {part.least} s, {max(left, 0):.0f} s were left")
        _set(row, limit=round(min(limit, left), 1))
        self._write(archive=len(self.rows) == 1)  # shows which part was running if the check is killed
        began = time.monotonic()
        code, outcome = self._in_worker(part, row["limit"], is_last)
        _set(row, code=code, outcome=outcome, seconds=round(time.monotonic() - began, 1))
        return _set(row, **judged(read_cases(self.out / "results.jsonl").get(part.name, {}))) if code == 0 else row

    def _in_worker(self, part: Part, limit: float, is_last: bool) -> tuple[int | None, str]:
        """Exit code and outcome of a part; the next worker is started meanwhile."""
        worker = self.spare if self.spare is not None and self.spare.runs() else self._start()
        self.spare = None if is_last else self._start()
        worker.hand_over(self._task(part, limit), self.logs / f"{part.name}.log")
        code = self._code(worker, limit)
        gone = worker.end(at_once=self.stopped or code is not None)
        if code is not None:
            return code, "done" if code == 0 else "failed"
        return None, ("stopped" if self.stopped else "timed out") + ("" if gone else ", its process does not end")

    def _code(self, worker: Worker, limit: float) -> int | None:
        """Wait for a worker; its exit code, or None if it runs on after `limit` seconds or the check was stopped."""
        deadline = time.monotonic() + limit
        while worker.runs() and time.monotonic() < deadline and not self.stopped:
            time.sleep(0.05)
        return worker.code

    def _start(self) -> Worker:
        self.workers += 1
        return Worker(self.logs / f"worker_{self.workers}.log")

    def _task(self, part: Part, limit: float) -> dict[str, Any]:
        environment = {"BENCH_RECORD": str(self.out / "results.jsonl"), "BENCH_PART": part.name}
        environment |= {"CHECK_LOGS": str(self.logs), "CHECK_SCRATCH": str(self.scratch)}
        task = {"function": part.function, "options": part.cpu_options if self.cpu else part.options}
        return task | {"gpu": not self.cpu, "environment": environment, "ends": time.time() + limit - EARLY}

    def _write(self, archive: bool = True) -> None:
        """Write the files; if that fails, say so once, go on, and write them after the next part."""
        known, self.unwritten = self.unwritten, None
        try:
            write_all(self.out, self.logs, self.rows, time.time() - self.began, archive)
        except OSError as error:
            self.unwritten = error
            if known is None:
                where = f"{error.filename or self.out} cannot be written ({error.strerror})"
                print(f"error: {where}; the check goes on and tries again after each part", file=sys.stderr, flush=True)


def _set(row: dict[str, Any], **values: Any) -> dict[str, Any]:
    row |= values
    return row


def main() -> int:
    """Run with a temporary folder, which is removed in the end; returns the exit code."""
    scratch = Path(os.environ.get("CHECK_SCRATCH") or tempfile.mkdtemp())
    try:
        return _run(sys.argv[1:], scratch)
    except (OSError, UserError) as error:  # a mistake in the call; OUT or the temporary folder cannot be written at all
        explained = explain(error)
        if explained is None:
            raise
        print(f"error: {explained[1]}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(words: list[str], scratch: Path) -> int:
    """Refuse what is wrong before OUT is touched, then run the parts."""
    cpu = words[:1] == ["--cpu"]
    out, *names = words[1:] if cpu else words
    parts, folder = arguments.chosen(names), Path(out).resolve()
    arguments.part_seconds()  # refuses a wrong value; Check itself does so for the total
    arguments.refuse_out(folder)
    sentence = missing_sentence()
    if sentence:
        raise UserError(sentence)
    check = Check(folder, scratch, cpu, float(os.environ.get("CHECK_BEGAN") or time.time()))

    def stop(*_: object) -> None:
        check.stopped = True

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, stop)
    try:
        if not cpu and check.finds_no_gpu():
            raise UserError(LACKS_GPU)
        if check.stopped:
            print("error: stopped before the first part", file=sys.stderr)
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        return check.run(parts)
    finally:
        check.close()


if __name__ == "__main__":
    sys.exit(main())
