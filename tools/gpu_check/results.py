"""What the check leaves in its folder: four files, complete after every part and readable after a kill at any time.

results.jsonl   every case as soon as it is measured, appended by the process that measures (benchmarks.timing.record)
check.json      the machine, versions and date, each part's outcome and its cases: the file to commit
summary.md      the same to read
results.tar.gz  the three above, each part's log, tables and JSON

Only the standard library is imported: the supervisor must start at once, also where torch is broken.
"""

import datetime
import json
import re
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_check.packages import missing_in

from trinity.io.json_files import to_json, write_json
from trinity.io.local import atomic_file, write_atomically

FILES = ("check.json", "results.jsonl", "summary.md", "results.tar.gz")

LARGEST = 8 * 2**20
"""Bytes of a file in the archive; a larger one is cut to its end."""

VERSIONS = ("torch", "triton", "transformers", "liger_kernel")


Cases = dict[str, dict[str, dict[str, Any]]]
"""part → case → figures."""


def read_cases(path: Path) -> Cases:
    """part → case → figures, from results.jsonl; a later line replaces an earlier one, a torn line is left out.

    A case that failed because its package is missing did not fail: it has "skipped" in place of "failed".
    """
    found: Cases = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            package = missing_in(str(row.get("failed")))
            if package:
                del row["failed"]
                row["skipped"] = f"needs the package {package}"
            found.setdefault(row.pop("part"), {})[row.pop("case")] = row
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
    return found


def is_measured(case: str, row: dict[str, Any]) -> bool:
    """Whether a case has figures; rows that describe the machine or the settings have none."""
    return not ({"failed", "skipped"} & row.keys() or case == "machine" or case.endswith(": settings"))


def judged(cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Outcome, and why if it is not "done", of a part that ended without an error, by its cases."""
    if any(is_measured(case, row) for case, row in cases.items()):
        return {"outcome": "done"}
    if any("failed" in row for row in cases.values()):
        return {"outcome": "failed", "why": "every case failed"}
    lacking = [str(row.get("skipped")) for row in cases.values()]
    if lacking and all(why.startswith("needs the package ") for why in lacking):
        return {"outcome": "left out", "why": lacking[0]}
    return {"outcome": "done"}


def check_of(parts: list[dict[str, Any]], cases: Cases, seconds: float) -> dict[str, Any]:
    """The content of check.json: gpu, versions and date first, so that a figure is never without its machine."""
    machine = cases.get("ceilings", {}).get("machine", {})
    versions = {name: machine.get(name) or _version(name) for name in VERSIONS}
    for part in parts:
        rows = cases.get(part["part"], {}).values()
        part |= {"cases": len(rows), "failed_cases": sum("failed" in row for row in rows)}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = {"gpu": machine.get("gpu"), "date": date, "versions": versions, "machine": machine}
    return head | {"seconds": round(seconds, 1), "parts": parts, "results": cases}


def summary_of(check: dict[str, Any], logs: Path) -> str:
    """Markdown: the parts, then each part's table if it wrote one, else its cases one by one."""
    versions = ", ".join(f"{name} {number}" for name, number in check["versions"].items() if number)
    lines = [f"# {check['gpu'] or 'CPU'}, {check['date']}", "", f"{versions}; {check['seconds']:.0f} s", ""]
    lines += ["| part | outcome | s | of at most | cases | failed |", "|---|---|---|---|---|---|"]
    for part in check["parts"]:
        why = f": {part['why']}" if part.get("why") else ""
        lines.append(
            f"| {part['part']} | {part['outcome']}{why} | {part['seconds']:.0f} | {part['limit']:.0f} "
            f"| {part['cases']} | {part['failed_cases'] or ''} |"
        )
    for part in check["parts"]:
        cases, table = check["results"].get(part["part"], {}), logs / f"{part['part']}.table.md"
        if table.exists():
            lines += ["", f"## {part['part']}", "", table.read_text(encoding="utf-8").strip()]
        elif cases:
            lines += ["", f"## {part['part']}", ""]
            lines += [f"- {name}: {_figures(row)}" for name, row in cases.items()]
    return "\n".join(lines) + "\n"


def write_all(out: Path, logs: Path, parts: list[dict[str, Any]], seconds: float, archive: bool = True) -> None:
    """Rewrite check.json, summary.md and the archive; each is replaced whole, so that none is ever half written.

    Args:
        archive: False: not the archive, whose compression takes up to half a second.
    """
    check = check_of(parts, read_cases(out / "results.jsonl"), seconds)
    write_json(out / "check.json", check)
    write_atomically(out / "summary.md", summary_of(check, logs))
    if not archive:
        return
    with (
        atomic_file(out / "results.tar.gz") as archive_file,
        tarfile.open(fileobj=archive_file, mode="w:gz", compresslevel=1) as file,
    ):
        for path in sorted(logs.iterdir()):
            _shorten(path)
            file.add(path, f"logs/{path.name}")
        for name in ("check.json", "summary.md", "results.jsonl"):
            if (out / name).exists():
                file.add(out / name, name)


def committed_name(check: Path) -> str:
    """DATE-DEVICE-check.json, for tools/bench/results."""
    found = json.loads(check.read_text(encoding="utf-8"))
    device = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or "cpu").lower().removeprefix("nvidia ")).strip("-")
    return f"{found['date']}-{device}-check.json"


def _figures(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"**{row['failed']}**"
    return ", ".join(f"{key} {_short(value)}" for key, value in row.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return to_json(value) if isinstance(value, dict) else str(value)


def _shorten(path: Path) -> None:
    """Keep the end of a log that is too large; another large file is emptied."""
    if path.stat().st_size > LARGEST:
        write_atomically(path, path.read_bytes()[-LARGEST // 8 :] if path.suffix == ".log" else b"")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
