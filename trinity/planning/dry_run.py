"""What `--dry-run` of launch/pretrain.py prints: the config, and its plan on the machine it runs on."""

import os

from trinity.config.paths import check_paths
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import this_machine
from trinity.parallel.mesh import world_size
from trinity.planning.gpus import gpus_needed
from trinity.planning.tables import describe


def _missing(config: RunConfig) -> list[str]:
    """A line where data, tokenizer or init are not on this machine, which is no mistake: a plan needs none of them."""
    try:
        check_paths(config, fresh=True)
    except UserError as error:
        return [f"note           not here, and needed to train: {error}"]
    return []


def dry_run(config: RunConfig, text: str) -> None:
    """Print the verdict as comments of the YAML that follows, then the plan's tables; the first process alone prints.

    Planned are the processes that the launcher started, or where there is one, those that the mesh's fixed sizes make.

    Args:
        text: the config as YAML.
    Raises:
        UserError: the config does not run on the processes that were started.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    world, machine = world_size(), this_machine()
    gpus = world if world > 1 else gpus_needed(config)
    verdict, details = describe(config, gpus, machine).split("\n\n", 1)
    lines = [*verdict.splitlines(), f"this machine   {machine.name}, {machine.origin}"]
    if gpus != world:
        lines.append(f"note           the mesh needs {gpus} processes and one was started: planned for {gpus} like it")
    lines += _missing(config)
    print("\n".join(f"# {line}" for line in lines))
    print(text)
    print(details)
