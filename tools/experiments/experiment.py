"""The frame of an experiment: its command line, its parts, each kept in a file of its own, and its results file.

An experiment is a list of parts for each seed, made one after the other in one process. A part may read the records of
earlier parts, also those of earlier seeds. OUT/NAME.json holds all records; tables, plot and sentences are made from it
alone, so that `--draw` repeats them without training.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import file_lock
from trinity.terminal import Progress

INTERRUPTED = 130
QUICK_END = "-quick"
"""Of the output folder's name with --quick: a full run refuses the parts of a quick one."""
SEEDS = 3
PACKAGES = ("torch", "numpy", "tokenizers")
"""Whose versions a results file has."""
DAMAGED = "remove this file, and run the same command again"
"""What to do about a damaged file of a finished part."""

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

    def path(self, name: str) -> str:
        """Of a file or folder of this seed."""
        return str(self.folder / name)


class Part(NamedTuple):
    """A part of one seed: about how many optimizer steps it takes, and the function that makes its record."""

    steps: int
    make: Callable[[Lab, Done], Record]


def make_corpus(out: Path, size: Any) -> Any:
    """The corpus of domains (domains.py) with size.vocabulary tokens, from every size.every-th module."""
    from small_run import small_corpus

    return small_corpus(out, size.vocabulary, size.every)


def describe_corpus(corpus: Any) -> Record:
    """What a results file says of it."""
    from small_run import describe_corpus

    return describe_corpus(corpus)


class Experiment(NamedTuple):
    """An experiment.

    name: of its command and its results file.
    design: the command's docstring.
    claim: what the report or paper claims, in one sentence.
    full, quick: settings of the full run, and of the toy size that tests the command.
    parts: (size, seed) → the parts of a seed, by name, in order.
    report: results → tables, as Markdown.
    outcome: results → what came out, in plain sentences that name the figures.
    draw: (path of the SVG, results).
    make_texts: (folder, size) → texts and tokenizer; reuses finished ones.
    describe_texts: texts → what the results file says of them; other texts than those of a kept part are refused.
    packages: whose versions are recorded, and have to be installed.
    unit: of the progress bar, in which `Part.steps` counts.
    """

    name: str
    design: str
    claim: str
    full: Size
    quick: Size
    parts: Callable[[Any, int], dict[str, Part]]
    report: Callable[[Record], str]
    outcome: Callable[[Record], str]
    draw: Callable[[Path, Record], None]
    make_texts: Callable[[Path, Any], Any] = make_corpus
    describe_texts: Callable[[Any], Record] = describe_corpus
    packages: tuple[str, ...] = PACKAGES
    unit: str = "step"


def command_line(name: str, design: str) -> argparse.ArgumentParser:
    """The parser of an experiment's command, without arguments of its own."""
    parser = argparse.ArgumentParser(description=design, formatter_class=HelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds (%(default)s)")
    parser.add_argument(
        "--out", type=local_path, help=f"output folder (runs/{name}; with --quick runs/{name}{QUICK_END})"
    )
    parser.add_argument("--quick", action="store_true", help="toy size, to test the command; its figures mean nothing")
    parser.add_argument(
        "--draw", type=local_path, metavar="FILE",
        help="train nothing: print the tables of a results file, and write its plot beside it, as .svg",
    )  # fmt: skip
    return parser


def run_experiment(experiment: Experiment, arguments: argparse.Namespace | None = None) -> int | None:
    """The command: make the missing parts, write the results, print their tables, and plot them beside the file.

    Args:
        arguments: those of command_line; None: parse them.
    """
    if arguments is None:
        arguments = command_line(experiment.name, experiment.design).parse_args()
    size = experiment.quick if arguments.quick else experiment.full

    def show(path: Path) -> None:
        results = read_results(experiment.name, path)
        print(experiment.report(results))
        print(f"\n{experiment.outcome(results)}")
        experiment.draw(path.with_suffix(".svg"), results)

    return run_command(
        experiment.name, arguments, lambda: make_results(experiment, size, arguments.out, arguments.seeds), show
    )


def run_command(
    name: str, arguments: argparse.Namespace, make: Callable[[], object], show: Callable[[Path], None]
) -> int | None:
    """Make the results, unless --draw is given, show them, and print the paths of results and plot.

    Args:
        arguments: of command_line.
        make: writes OUT/NAME.json; only one process at a time does in OUT.
        show: prints and plots what is in a results file.
    Raises:
        UserError: --seeds is below 1, --draw is a plot, another process is writing in --out, or the results cannot be
            shown.
    """
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    if arguments.draw is not None and arguments.draw.suffix == ".svg":
        raise UserError(f"--draw {arguments.draw} would be overwritten by the plot; give the JSON file of the results")
    if arguments.out is None:
        arguments.out = Path("runs") / f"{name}{QUICK_END if arguments.quick else ''}"
    if arguments.draw is None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(arguments.out, patience=1):
                make()
        except BlockingIOError:
            raise UserError(
                f"--out {arguments.out} is being written by another process; wait for it, or end it"
            ) from None
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return INTERRUPTED
    results = arguments.draw or arguments.out / f"{name}.json"
    with whole_results(name, results):
        show(results)
    if arguments.quick:
        print("toy size: the figures mean nothing", file=sys.stderr)
    print(f"written: {results.with_suffix('.svg')}, from {results}", file=sys.stderr)
    return None


@contextmanager
def whole_results(name: str, path: Path) -> Iterator[None]:
    """Explain what goes wrong while results are read that lack a part, or have a value that is no number.

    Raises:
        UserError: in place of such an error.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be shown ({type(error).__name__}: {error}): a part is missing, a run diverged, or it is "
            f"not the whole {name}.json of an --out"
        ) from error


def make_results(experiment: Experiment, size: Size, out: Path, seeds: int) -> None:
    """Make all parts, except those finished by an earlier call, and write OUT/NAME.json after each seed.

    A file there with the same settings and more seeds stays as it is.

    Raises:
        UserError: `out` has results of other settings, or a package is missing.
    """
    import trinity  # noqa: F401  # before torch, for the policy of its threads

    # isort: split
    import torch

    versions = package_versions(experiment.packages)  # refuses before any work
    texts = experiment.make_texts(out, size)
    head = {"size": size._asdict(), "versions": versions, "texts": experiment.describe_texts(texts)}
    settings = json.loads(to_json(head))
    parts = [experiment.parts(size, seed) for seed in range(seeds)]
    torch.set_num_threads(1)  # the number of threads changes the bits of sums
    done: dict[tuple[int, str], Record] = {}
    path = out / f"{experiment.name}.json"
    before = read_json(path, DAMAGED) or {}
    seeds_before = {record["seed"] for record in before["parts"]} if before.get("settings") == settings else set()
    with Progress(experiment.name, sum(p.steps for of_seed in parts for p in of_seed.values()), experiment.unit) as bar:
        for seed, of_seed in enumerate(parts):
            lab = Lab(size, seed, texts, (out / f"seed-{seed}").resolve(), bar.update)
            make_seed(lab, of_seed, done, Kept(out / "parts", settings), bar)
            if len(seeds_before) <= seed + 1:  # results of more seeds stay
                head = {"experiment": experiment.name, "settings": settings, "parts": list(done.values())}
                write_json(path, head, indent=None)


def make_seed(
    lab: Lab, parts: dict[str, Part], done: dict[tuple[int, str], Record], kept: "Kept", bar: Progress
) -> None:
    """Add to `done` the records of all parts of a seed: those that are kept, and the missing ones, which are made."""
    lab.folder.mkdir(exist_ok=True)
    before = bar.n
    for name, part in parts.items():
        before += part.steps
        record = kept.read(lab.seed, name)
        if record is None:
            bar.describe(f"seed {lab.seed}, {name}")
            began = time.process_time()
            made = part.make(lab, done)
            seconds = time.process_time() - began
            record = kept.write({"seed": lab.seed, "part": name, "seconds": seconds} | made)
            bar.update_to(before)
        else:
            bar.skip_to(before)
        done[lab.seed, name] = record


class Kept:
    """Finished parts, a file each.

    Args:
        folder: of the files.
        settings: in every file; a part of other settings is refused.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        self._folder, self._settings = folder, settings
        folder.mkdir(exist_ok=True)

    def _path(self, seed: int, name: str) -> Path:
        return self._folder / f"{seed}-{name}.json"

    def read(self, seed: int, name: str) -> Record | None:
        """The record of a part; None if it is not finished.

        Raises:
            UserError: it has other settings.
        """
        path = self._path(seed, name)
        kept = read_json(path, DAMAGED)
        if kept is not None and "record" not in kept:
            raise UserError(f"{path} is not a whole part; {DAMAGED}")
        if kept is not None and kept.get("settings") != self._settings:
            raise UserError(
                f"{path} has other settings, or was made by other versions of Python or packages; give another "
                f"--out, or remove {self._folder}"
            )
        return None if kept is None else kept["record"]

    def write(self, record: Record) -> Record:
        """Keep a record; returns it as it will be read."""
        content = {"settings": self._settings, "record": record}
        write_json(self._path(record["seed"], record["part"]), content, indent=None)
        return json.loads(to_json(record))


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
    results = read_json(path, f"give the {name}.json of a finished experiment's --out")
    if results is None:
        raise UserError(f"{path} does not exist; give the JSON file of a finished experiment")
    if results.get("experiment") != name:
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
