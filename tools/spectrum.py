"""Find the modules of a model that have signal, and train only these (Spectrum, arXiv 2406.06623).

Scores every matrix by its singular values, of routed experts each one; a layer's stack of experts counts with its
median. The best share of the modules of each type trains, and embedding and head always.

--score mp         energy above the edge of noise by Marchenko and Pastur's law (trinity/spectrum/README.md)
--score spectrum   as the paper's script computes it
Into OUT go train_only.yaml, a section to paste into a config; axolotl.yaml, the same as unfrozen_parameters;
spectrum.json and scores.json, all scores; spectrum.html, heat maps by layer and module. The same command continues an
interrupted scan. Folders of other architectures get no train_only.yaml.

--axolotl FILE scores nothing: it translates axolotl's unfrozen_parameters into train_only.yaml.

Example: python tools/spectrum.py out/nano --top 25
         python tools/spectrum.py runs/mine --top 50 --sample 8 --device cuda --out spectrum
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch

from trinity.command_line import HelpFormatter, check_device, check_one_process, local_path
from trinity.config.run import RunConfig, TrainConfig
from trinity.errors import UserError, run_main
from trinity.io.json_files import write_json
from trinity.io.local import make_folder, write_atomically
from trinity.merging.sources import Source
from trinity.reporting.page import check_out, plotly_script
from trinity.spectrum.modules import Module, Unit, find_modules, find_units, is_trinity, open_weights, sampled, score_of
from trinity.spectrum.scan import scan
from trinity.spectrum.scores import Score
from trinity.spectrum.select import axolotl_yaml, choose, chosen_without_signal, read_axolotl, train_only_yaml

STATE = {"parameters": ("parameters",), "gradients": ("gradients",), "optimizer": ("Muon momentum", "AdamW moments")}


def main() -> None:
    """Score, choose, write and print."""
    options = parse()
    check_one_process("tools/spectrum.py")
    check_device(options.device)
    if options.sample is not None and options.sample < 1:
        raise UserError(f"--sample {options.sample} must be at least 1 expert of each stack")
    source = open_weights(options.folder)
    out = options.out or source.folder / "spectrum"
    check_out(out / "spectrum.html")
    modules = find_modules(source)
    units = find_units(source, modules)
    choose(units[:0], {}, options.score, options.top)  # refuses --top before hours of work
    if options.axolotl is not None:
        translate(options, source, units, out)
        return
    make_folder(out)
    scores = scan(source, modules, options.sample, options.device, out / "scores.json", options.force)
    trained = choose(units, scores, options.score, options.top)
    memory = memory_table(source, trained)
    write_choice(out, source, trained, f"{options.folder}: the best {options.top:g} % of each type by {options.score}")
    results = {
        "model": options.folder, "score": options.score, "top": options.top, "sample": options.sample,
        "modules": describe(modules, trained, scores, options.sample),
        "units": [{"name": unit.name, "type": unit.type, "layer": unit.layer,
                   **score_of(unit.tensors(), scores)._asdict(), "trained": unit in trained} for unit in units],
        "memory": memory,
    }  # fmt: skip
    write_json(out / "spectrum.json", results)
    ties = chosen_without_signal(trained, scores, options.score)
    print("\n".join([*summary(units, trained), *tie_note(ties), *memory]))
    write_page(out / "spectrum.html", options.folder, results)
    print(f"results   {out}")


def translate(options: argparse.Namespace, source: Source, units: list[Unit], out: Path) -> None:
    """Write train_only.yaml for axolotl's list."""
    if not is_trinity(source):
        raise UserError(f"{options.folder} is no Trinity model, so train.only has no names in it; use axolotl's YAML")
    trained = read_axolotl(options.axolotl, units)
    make_folder(out)
    # not axolotl.yaml: it may be the list that was read
    write_train_only(out, trained, f"{options.folder}: the modules of {options.axolotl}")
    print("\n".join([*summary(units, trained), *memory_table(source, trained), f"results   {out}"]))


def write_choice(out: Path, source: Source, trained: list[Unit], comment: str) -> None:
    """Write the YAML files."""
    if is_trinity(source):
        write_train_only(out, trained, comment)
    write_atomically(out / "axolotl.yaml", axolotl_yaml(trained, " ".join(comment.split())))


def write_train_only(out: Path, trained: list[Unit], comment: str) -> None:
    """Write train_only.yaml."""
    write_atomically(out / "train_only.yaml", train_only_yaml(trained, " ".join(comment.split())))


def write_page(path: Path, model: str, results: dict[str, Any]) -> None:
    """Write the heat maps."""
    plotly_script()  # refuses where plotly is missing; all else is written by now
    from trinity.reporting.spectrum import spectrum_page

    write_atomically(path, spectrum_page(f"Spectrum: {model}", results))


def describe(
    modules: list[Module], trained: list[Unit], scores: dict[str, Score], sample: int | None
) -> list[dict[str, Any]]:
    """The modules for JSON, and whether each is trained."""
    names = {module.name for unit in trained for module in unit.modules}
    return [
        {
            "module": module.name, "type": module.type, "layer": module.layer, "shape": list(module.shape),
            "matrices": len(module.tensors), "scored": len(sampled(module, sample)),
            **score_of(module.tensors, scores)._asdict(), "trained": module.name in names,
        }
        for module in modules
    ]  # fmt: skip


def summary(units: list[Unit], trained: list[Unit]) -> list[str]:
    """A line for each type: how many units there are, and the layers of those that train."""
    lines = [("type", "units", "trained", "layers")]
    for kind in dict.fromkeys(unit.type for unit in units):
        members = [unit for unit in units if unit.type == kind]
        chosen = [unit for unit in members if unit in trained]
        layers = ", ".join(str(unit.layer) for unit in chosen if unit.layer is not None)
        lines.append((kind, str(len(members)), str(len(chosen)), layers))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return ["  ".join([a.ljust(widths[0]), b.rjust(widths[1]), c.rjust(widths[2]), d]).rstrip() for a, b, c, d in lines]


def tie_note(ties: dict[str, int]) -> list[str]:
    """A line on the modules that train without signal; none if there are none."""
    if not ties:
        return []
    counts = ", ".join(f"{kind} {count}" for kind, count in ties.items())
    return [
        f"note: chosen by layer alone, the first ones, as their score is 0: {counts}; a smaller --top chooses fewer"
    ]


def memory_table(source: Source, trained: list[Unit]) -> list[str]:
    """GB of parameters, gradients and optimizer state on one GPU, with everything trained and with `trained`."""
    if not is_trinity(source):
        return []
    from trinity.planning.fake_rank import fake_rank, state_bytes
    from trinity.planning.mesh_search import check_gpus

    states: list[dict[str, int]] = []
    for train in (TrainConfig(), TrainConfig([unit.name for unit in trained])):
        config = RunConfig(model=source.config, train=train)
        with fake_rank(config, check_gpus(config, 1)) as rank:
            state = state_bytes(rank.model, rank.optimizers)
        states.append({name: sum(state[part] for part in parts) for name, parts in STATE.items()})
    lines = [f"{'GB in all shards':<16}{'all trained':>12}{'train.only':>12}"]
    for name in STATE:
        lines.append(f"{name:<16}" + "".join(f"{state[name] / 1e9:>12.3f}" for state in states))
    lines.append(f"{'in all':<16}" + "".join(f"{sum(state.values()) / 1e9:>12.3f}" for state in states))
    return ["", *lines]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    text, example = __doc__.strip().rsplit("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=example, formatter_class=HelpFormatter)
    parser.add_argument("folder", metavar="HF_DIR", help="Hugging Face folder, run directory, or RUN_DIR@step")
    parser.add_argument("--top", type=float, default=25.0, metavar="PERCENT", help="of each type that train")
    parser.add_argument("--score", choices=("mp", "spectrum"), default="mp", help="to rank by; both are computed")
    parser.add_argument("--sample", type=int, metavar="N", help="experts of each stack to score (by default all)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for the singular values"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder for the results (default: HF_DIR/spectrum)"
    )
    parser.add_argument("--axolotl", type=local_path, metavar="FILE", help="list of axolotl's to translate (see above)")
    parser.add_argument("--force", action="store_true", help="write over scores of another model in OUT")
    return parser.parse_args(words)


if __name__ == "__main__":
    run_main(main)
