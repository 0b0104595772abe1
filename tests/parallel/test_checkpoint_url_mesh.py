"""Two processes whose checkpoints lie elsewhere, where nothing can be renamed: the same files, and one voice."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from tests.parallel.test_checkpoint_mesh import MESH, WORDS, contents, plain_run, slow_run
from tests.url_stores import failing, register
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.errors import Failure
from trinity.parallel import mesh

TWO = [*WORDS, *MESH[2]]
register()


def plain_there(settings: dict, words: list[str]) -> int:
    """A run as it is, with the store known."""
    register()
    return plain_run(settings, words)


def slow_there(settings: dict, words: list[str]) -> int:
    """A run in which training goes on while each checkpoint is being written, with the store known."""
    register()
    return slow_run(settings, words)


def test_two_processes_write_there(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """In the training's time and behind its back, every tensor is that of a run with its checkpoints beside it."""
    waits = "checkpoint.asynchronous=false"
    assert processes(2).run(plain_run, recipe(tmp_path / "here"), [*TWO, waits]) == [0, 0]
    expected = contents(CheckpointDirectory.at(tmp_path / "here"))
    assert list(expected) == [2, 4, 6]
    for name, case, words in (("waits", plain_there, [waits]), ("goes_on", slow_there, [])):
        url = f"checkpoint.url=norename://{tmp_path}/store/{name}"
        assert processes(2).run(case, recipe(tmp_path / name), [*TWO, *words, url]) == [0, 0]
        assert contents(CheckpointDirectory.of_run(tmp_path / name)) == expected
        assert not (tmp_path / name / "checkpoints").exists()


def loaded(run: str, broken_rank: int) -> str:
    """What this rank says where the store answers all but one when the newest checkpoint is to be loaded."""
    register()
    checkpoints = CheckpointDirectory.of_run(Path(run))
    step = checkpoints.newest_intact(lambda *_, **__: None)
    state = empty_tensors(checkpoints.path_of(step), "")
    here = dist.get_rank() == broken_rank
    with failing(lambda asked, path: OSError("late") if here and asked == "read" and "/__" in path else None):
        try:
            load(state, checkpoints.path_of(step))
        except Failure as failure:
            return str(failure)
    return "no failure"


def broken_for(rank: int, settings: dict, words: list[str], verb: str, name: str) -> str:
    """A run whose store does not answer one rank about a file; what it says on this rank."""
    register()
    here = dist.get_rank() == rank

    def fail(asked: str, path: str) -> Exception | None:
        return ConnectionError("no route to host") if here and asked == verb and name in path else None

    with failing(fail), mock.patch.object(mesh, "stop"):
        try:
            plain_run(settings, words)
        except Failure as failure:
            return str(failure)
    return "no failure"


def test_a_store_that_fails_for_one_rank(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Writing, checking or loading: all ranks end with its sentence, and the same command goes on to the end."""
    url, settings = f"norename://{tmp_path}/store", recipe(tmp_path / "run")
    words = [*TWO, f"checkpoint.url={url}"]
    # rank 1 writes its own file, and checks the second of the three: .metadata, __0_0, __1_0
    for verb, name, did in (("write", "step_00000004/__1_0", "written"), ("read", "step_00000002/__0_0", "read")):
        said = processes(2).run(broken_for, 1, settings, words, verb, name)
        gone = f"{name}.distcp cannot be {did} (no route to host); run the same command again to go on"
        assert said == [f"rank 1: {url}/{gone}"] * 2
        assert CheckpointDirectory.of_run(tmp_path / "run").complete_steps() == [2]
    assert processes(2).run(plain_there, settings, words) == [0, 0]
    assert CheckpointDirectory.of_run(tmp_path / "run").complete_steps() == [2, 4, 6]
    said = processes(2).run(loaded, str(tmp_path / "run"), 1)
    assert said[0] == said[1]
    assert said[0].startswith(f"rank 1: {url}/step_00000006/__")
    assert said[0].endswith("_0.distcp cannot be read (late); run the same command again to go on")
