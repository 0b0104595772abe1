"""Time every candidate tile of an op's kernels on this GPU, and print a table to paste into the op's file.

An op's Triton module declares its tunable kernels in an attribute

    TUNABLE: dict[str, object]      name → an object with
        candidates                  a list of tiles, any values that repr() writes as Python
        run(candidate)              one call of the kernel with that tile, on tensors of its own on the GPU
        chosen                      the tile that the module's table picks now, or None (optional)

created on access (a module-level __getattr__), so that importing the module creates no tensors. Those of the experts
are in benchmarks/expert_tiles.py. A candidate that fails, for lack of shared memory or registers, is a row. The first
call, which compiles, is not timed; candidates take turns; a figure is a median.

    python tools/bench.py tune experts --json tiles.json
"""

import sys
from importlib import import_module
from typing import Any, Protocol

from benchmarks.timing import Marks, record, take_turns
from tqdm import tqdm

from trinity.errors import UserError

TUNABLE_MODULES = {"experts": "benchmarks.expert_tiles"}
"""Ops whose TUNABLE is not in their Triton module → the module that has it."""


KNOWN = f"ops to tune: {', '.join(TUNABLE_MODULES)}, and those whose Triton module has a TUNABLE"


class Tunable(Protocol):
    """One kernel at one size."""

    candidates: list[Any]

    def run(self, candidate: Any) -> None:
        """One call."""


def run(quick: bool, op: str) -> dict[str, Any]:
    """Time every candidate of every tunable of an op.

    Raises:
        UserError: no such op, it has nothing to tune, or no candidate runs here.
    """
    from benchmarks.step import machine

    kernels = {}
    for name, tunable in tqdm(tunables(op).items(), unit="kernel", file=sys.stderr, disable=None):
        kernels[name] = measure(tunable, rounds=2 if quick else 7, title=name)
    if not any(kernel["best"] for kernel in kernels.values()):
        why = next((entry["failed"] for kernel in kernels.values() for entry in kernel["tiles"].values()), "none")
        raise UserError(f"no candidate of {op} runs here ({why}); run it on a machine with an NVIDIA GPU")
    return {"on": machine(), "op": op, "kernels": kernels}


def tunables(op: str) -> dict[str, Tunable]:
    """The tunable kernels of an op, by name.

    Raises:
        UserError: no such op, or it has nothing to tune.
    """
    module = TUNABLE_MODULES.get(op, f"trinity_kernels.{op}_triton")
    try:
        return import_module(module).TUNABLE
    except ModuleNotFoundError as error:
        raise UserError(f"tune {op} needs the module {module}: {error}; {KNOWN}") from error
    except AttributeError as error:
        raise UserError(f"{module} has no TUNABLE, so there is nothing to tune; {KNOWN}") from error


def measure(tunable: Tunable, rounds: int, title: str = "") -> dict[str, Any]:
    """Seconds or failure of each candidate, by its repr; the fastest; and what the module picks now."""

    def call(candidate: Any) -> Any:
        def timed(_: Marks) -> None:
            tunable.run(candidate)

        return timed

    by_name = {repr(candidate): candidate for candidate in tunable.candidates}
    calls = {name: call(candidate) for name, candidate in by_name.items()}
    figures = take_turns(calls, rounds, lambda name, row: record(f"{title}: {name}", row))
    tiles = {name: {"seconds": f["seconds"][0]} if "seconds" in f else f for name, f in figures.items()}
    good = [name for name in tiles if "seconds" in tiles[name]]
    best = min(good, key=lambda name: tiles[name]["seconds"], default=None)
    chosen = getattr(tunable, "chosen", None)
    return {"tiles": tiles, "best": best, "chosen": None if chosen is None else repr(chosen)}


def table(results: dict[str, Any]) -> str:
    """Every candidate, fastest first, then the Python literal of the best ones."""
    lines = [results["on"], "", f"| {results['op']} | tile | ms | against the best |", "|---|---|---|---|"]
    for name, kernel in results["kernels"].items():
        best = kernel["tiles"][kernel["best"]]["seconds"] if kernel["best"] else None
        for tile, entry in sorted(kernel["tiles"].items(), key=lambda item: item[1].get("seconds", float("inf"))):
            mark = " (now)" if tile == kernel["chosen"] else ""
            if "failed" in entry:
                lines.append(f"| {name} | {tile}{mark} | {entry['failed']} | |")
            else:
                seconds = entry["seconds"]
                lines.append(f"| {name} | {tile}{mark} | {1000 * seconds:.3f} | {seconds / best:.2f} |")
    return "\n".join([*lines, "", literal(results)])


def literal(results: dict[str, Any]) -> str:
    """The best tiles as a Python dict literal."""
    lines = [f"    {name!r}: {kernel['best']}," for name, kernel in results["kernels"].items() if kernel["best"]]
    return "\n".join([f"BEST = {{  # {results['op']}, {results['on']}", *lines, "}"])
