"""Two processes with checkpoint.url on a store without rename: the same tensors, and one error on all ranks."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from tests.parallel.saving_runs import MESH, WORDS, bytes_by_step, plain_run, slow_run
from tests.url_stores import failing, register
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.errors import Failure
from trinity.parallel import mesh

TWO = [*WORDS, *MESH[2]]
register()


def plain_remote_run(settings: dict, words: list[str]) -> int:
    """plain_run, with the store registered in this process."""
    register()
    return plain_run(settings, words)


def slow_remote_run(settings: dict, words: list[str]) -> int:
    """slow_run, with the store registered in this process."""
    register()
    return slow_run(settings, words)


def test_two_processes_save_remotely(
    recipe: Callable, processes: Callable, synchronous_checkpoints: Callable, tmp_path: Path
) -> None:
    """Synchronous and asynchronous: every tensor equals that of a run with local checkpoints."""
    waits, expected = "checkpoint.asynchronous=false", synchronous_checkpoints(2)
    assert list(expected) == [2, 4, 6]
    for name, case, words in (("waits", plain_remote_run, [waits]), ("goes_on", slow_remote_run, [])):
        url = f"checkpoint.url=norename://{tmp_path}/store/{name}"
        assert processes(2).run(case, recipe(tmp_path / name), [*TWO, *words, url]) == [0, 0]
        assert bytes_by_step(CheckpointDirectory.of_run(tmp_path / name)) == expected
        assert not (tmp_path / name / "checkpoints").exists()


def load_newest(run: str, broken_rank: int) -> str:
    """Load the newest checkpoint while the store fails for one rank; returns this rank's error."""
    register()
    checkpoints = CheckpointDirectory.of_run(Path(run))
    step = checkpoints.newest_intact(lambda *_, **__: None)
    state = empty_tensors(checkpoints.path_of(step), "")
    is_broken = dist.get_rank() == broken_rank
    with failing(lambda request, path: OSError("late") if is_broken and request == "read" and "/__" in path else None):
        try:
            load(state, checkpoints.path_of(step))
        except Failure as failure:
            return str(failure)
    return "no failure"


def run_with_failing_store(rank: int, settings: dict, words: list[str], verb: str, name: str) -> str:
    """Run with a store that fails for one rank and one file; returns this rank's error."""
    register()
    is_broken = dist.get_rank() == rank

    def fail(request: str, path: str) -> Exception | None:
        return ConnectionError("no route to host") if is_broken and request == verb and name in path else None

    with failing(fail), mock.patch.object(mesh, "stop"):
        try:
            plain_run(settings, words)
        except Failure as failure:
            return str(failure)
    return "no failure"


def test_store_fails_for_one_rank(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """During a write, a check or a load: all ranks end with that rank's error, and the same command resumes."""
    url, settings = f"norename://{tmp_path}/store", recipe(tmp_path / "run")
    words = [*TWO, f"checkpoint.url={url}"]
    # rank 1 writes its own file, and checks the second of the three: .metadata, __0_0, __1_0
    for verb, name, did in (("write", "step_00000004/__1_0", "written"), ("read", "step_00000002/__0_0", "read")):
        errors = processes(2).run(run_with_failing_store, 1, settings, words, verb, name)
        message = f"{name}.distcp cannot be {did} (no route to host); run the same command again to continue"
        assert errors == [f"rank 1: {url}/{message}"] * 2
        assert CheckpointDirectory.of_run(tmp_path / "run").complete_steps() == [2]
    assert processes(2).run(plain_remote_run, settings, words) == [0, 0]
    assert CheckpointDirectory.of_run(tmp_path / "run").complete_steps() == [2, 4, 6]
    errors = processes(2).run(load_newest, str(tmp_path / "run"), 1)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"rank 1: {url}/step_00000006/__")
    assert errors[0].endswith("_0.distcp cannot be read (late); run the same command again to continue")
