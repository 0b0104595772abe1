"""The frame of an experiment: its command line, its parts, each kept in a file of its own, and its results file.

An experiment is a list of parts for each seed, made one after the other in one process. A part may read the records of
earlier parts, also those of earlier seeds. OUT/NAME.json holds all records; tables, plot and sentences are made from it
alone, so that `--draw` repeats them without training.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import file_lock
from trinity.terminal import Progress

INTERRUPTED = 130
SEEDS = 3

Record = dict[str, Any]
Done = Mapping[tuple[int, str], Record]
"""(seed, part) → the record of each part made so far."""


class Size(Protocol):
    """All settings of an experiment that are not in its code: a NamedTuple of JSON values."""

    def _asdict(self) -> dict[str, Any]: ...


class Lab(NamedTuple):
    """What a part works with.

    size: the experiment's settings.
    seed: of initial weights, order of text, and random choices.
    texts: what `make_texts` returned.
    folder: for files that later parts of the seed need.
    after_step: to be called after each optimizer step, for the progress bar.
    """

    size: Any
    seed: int
    texts: Any
    folder: Path
    after_step: Callable[[], Any]


class Part(NamedTuple):
    """A part of one seed: about how many optimizer steps it takes, and the function that makes its record."""

    steps: int
    make: Callable[[Lab, Done], Record]


class Experiment(NamedTuple):
    """An experiment.

    name: of its command and its results file.
    design: the command's docstring.
    claim: what the report or paper claims, in one sentence.
    full, quick: settings of the full run, and of the toy size that tests the command.
    make_texts: (folder, size) → texts and tokenizer; reuses finished ones.
    describe_texts: texts → what the results file says of them; other texts than those of a kept part are refused.
    parts: (size, seed) → the parts of a seed, by name, in order.
    report: results → tables, as Markdown.
    outcome: results → what came out, in plain sentences that name the figures.
    draw: (path of the SVG, results).
    packages: whose versions are recorded, and have to be installed.
    """

    name: str
    design: str
    claim: str
    full: Size
    quick: Size
    make_texts: Callable[[Path, Any], Any]
    describe_texts: Callable[[Any], Record]
    parts: Callable[[Any, int], dict[str, Part]]
    report: Callable[[Record], str]
    outcome: Callable[[Record], str]
    draw: Callable[[Path, Record], None]
    packages: tuple[str, ...] = ("torch", "numpy", "tokenizers")


def command_line(name: str, design: str) -> argparse.ArgumentParser:
    """The parser of an experiment's command, without arguments of its own."""
    parser = argparse.ArgumentParser(description=design, formatter_class=HelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds (%(default)s)")
    parser.add_argument("--out", type=local_path, default=Path("runs") / name, help="output folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy size, to test the command")
    parser.add_argument(
        "--draw", type=local_path, metavar="FILE", help="train nothing: print the tables of a results file, and plot it"
    )
    return parser


def run_experiment(experiment: Experiment, arguments: argparse.Namespace | None = None) -> int | None:
    """The command: make the missing parts, write the results, print their tables, and plot them beside the file.

    Args:
        arguments: those of command_line; None: parse them.
    """
    if arguments is None:
        arguments = command_line(experiment.name, experiment.design).parse_args()
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    path = arguments.draw or arguments.out / f"{experiment.name}.json"
    if arguments.draw is None:
        try:
            make_results(experiment, arguments.out, arguments.seeds, arguments.quick)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return INTERRUPTED
    results = read_results(experiment.name, path)
    print(experiment.report(results))
    print(f"\n{experiment.outcome(results)}")
    experiment.draw(path.with_suffix(".svg"), results)
    return None


def make_results(experiment: Experiment, out: Path, seeds: int, quick: bool) -> None:
    """Make all parts, except those finished by an earlier call, and write OUT/NAME.json.

    Raises:
        UserError: `out` has results of other settings, another process is writing there, or a package is missing.
    """
    size: Any = experiment.quick if quick else experiment.full
    versions = package_versions(experiment.packages)  # refuses before any work
    out.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(out, patience=1):
            texts = experiment.make_texts(out, size)
            head = {"size": size._asdict(), "versions": versions, "texts": experiment.describe_texts(texts)}
            settings = json.loads(to_json(head))
            parts = {(seed, name): part for seed in range(seeds) for name, part in experiment.parts(size, seed).items()}
            with Progress(experiment.name, sum(part.steps for part in parts.values()), "step") as bar:
                records = _make_parts(experiment.name, parts, size, texts, settings, out, bar)
            head = {"experiment": experiment.name, "settings": settings, "parts": records}
            write_json(out / f"{experiment.name}.json", head, indent=None)
    except BlockingIOError:
        raise UserError(f"--out {out} is being written by another process; wait for it, or end it") from None


def _make_parts(
    name: str, parts: dict[tuple[int, str], Part], size: Any, texts: Any, settings: Record, out: Path, bar: Progress
) -> list[Record]:
    """The records of all parts: those kept in OUT/parts, and the missing ones, which are made."""
    folder = out / "parts"
    folder.mkdir(exist_ok=True)
    done: dict[tuple[int, str], Record] = {}
    before = 0
    for (seed, part_name), part in parts.items():
        path = folder / f"{seed}-{part_name}.json"
        kept = read_json(path)
        before += part.steps
        if kept is None:
            bar.describe(f"seed {seed}, {part_name}")
            lab = Lab(size, seed, texts, (out / f"seed-{seed}").resolve(), bar.update)
            lab.folder.mkdir(exist_ok=True)
            began = time.process_time()
            record = part.make(lab, done)
            record = {"seed": seed, "part": part_name, "seconds": time.process_time() - began} | record
            write_json(path, {"settings": settings, "record": record}, indent=None)
            done[seed, part_name] = json.loads(to_json(record))
            bar.update_to(before)
        elif kept.get("settings") != settings:
            raise UserError(
                f"{path} has other settings, or was made by other versions of Python or packages; give another "
                f"--out, or remove {folder}"
            )
        else:
            done[seed, part_name] = kept["record"]
            bar.skip_to(before)
    return list(done.values())


def package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of the packages that results may depend on.

    Raises:
        UserError: one is missing.
    """
    try:
        return {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        raise UserError(f"the experiment needs {error.name}; install it (pip install {error.name})") from None


def read_results(name: str, path: Path) -> Record:
    """Read a results file.

    Raises:
        UserError: it does not exist, or is not one of the experiment `name`.
    """
    results = read_json(path)
    if results is None:
        raise UserError(f"{path} does not exist; give the JSON file of a finished experiment")
    if not isinstance(results, dict) or results.get("experiment") != name:
        raise UserError(f"{path} is not a results file of the experiment {name}; give the {name}.json of its --out")
    return results


def records_of(results: Record, part: str) -> list[Record]:
    """The records of a part, one for each seed that has it, by seed."""
    return sorted((record for record in results["parts"] if record["part"] == part), key=lambda record: record["seed"])


def cost(results: Record) -> str:
    """The CPU time of all parts, and the number of seeds, as a clause."""
    seconds = sum(record["seconds"] for record in results["parts"])
    seeds = len({record["seed"] for record in results["parts"]})
    return f"{seconds / 60:.0f} minutes of one core, {seeds} {'seed' if seeds == 1 else 'seeds'}"
