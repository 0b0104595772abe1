"""`--dry-run` of launch/pretrain.py: print the config and its plan on this machine."""

import os

from trinity.config.paths import check_paths
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import this_machine
from trinity.parallel.mesh import world_size
from trinity.planning.mesh_search import min_gpus
from trinity.planning.tables import describe


def dry_run(config: RunConfig, text: str) -> None:
    """Print the verdict as YAML comments, then the config, then the plan's tables; only rank 0 prints.

    The plan is for the processes that the launcher started, or with one process for the product of the mesh's fixed
    sizes.

    Args:
        text: the config as YAML.
    Raises:
        UserError: the config does not run on the processes that were started.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    world, machine = world_size(), this_machine()
    gpus = world if world > 1 else min_gpus(config)
    verdict, details = describe(config, gpus, machine).split("\n\n", 1)
    lines = [*verdict.splitlines(), f"this machine   {machine.name}, {machine.origin}"]
    if gpus != world:
        lines.append(f"note           the mesh needs {gpus} processes and one was started: planned for {gpus} like it")
    lines += _missing_inputs(config)
    print("\n".join(f"# {line}" for line in lines))
    print(text)
    print(details)


def _missing_inputs(config: RunConfig) -> list[str]:
    """A note if data, tokenizer or init are not on this machine. A plan needs none of them, so it is no error."""
    try:
        check_paths(config, fresh=True)
    except UserError as error:
        return [f"note           missing here, needed to train: {error}"]
    return []
