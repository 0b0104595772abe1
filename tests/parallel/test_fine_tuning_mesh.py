"""Fine-tuning on a mesh equals one process: padding, masks, and weights of targets that are uneven between ranks.

In float64 to 1e-10, as test_every_mesh.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.parallel import mesh_runs
from tests.parallel.mesh_runs import assert_same, run_steps, run_steps_alone
from trinity.data.stream.collate import PADDING_ID, Batch
from trinity.training import train_step as step_module
from trinity_kernels.cross_entropy import IGNORE

WORDS = ["precision.compute=float64", "optim.muon.dtype=float64", "batch.sequences=12", "batch.ramp=[]"]
MESHES: dict[str, tuple[int, list[str]]] = {
    "shard 2": (2, ["parallel.shard=2"]),
    "shard 2, expert 2": (2, ["parallel.shard=2", "parallel.expert=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "shard 2, context 2, expert 2": (4, ["parallel.shard=2", "parallel.context=2", "parallel.expert=2"]),
    "replicate 2 × shard 2, expert 2": (4, ["parallel.replicate=2", "parallel.shard=2", "parallel.expert=2"]),
}


def as_fine_tuning(batch: Batch, weighted: bool) -> Batch:
    """Each row by its own content, so that the global batch is the same on every mesh: padding, prompts and weights.

    A row may have no target or be padding alone.
    """
    for b, tokens_S in enumerate(batch.tokens_BS):
        S, number = len(tokens_S), int(tokens_S.sum())
        padding = S if number % 11 == 0 else number % 7
        ids_S = batch.document_ids_BS[b]
        ids_S[S - padding :] = PADDING_ID
        batch.targets_BS[b, (ids_S == PADDING_ID) | (tokens_S % 3 > 0) | torch.tensor(number % 5 == 0)] = IGNORE
    if weighted:
        batch.weights_BS = torch.zeros(batch.tokens_BS.shape)
        for ids_S, targets_S, weights_S in zip(batch.document_ids_BS, batch.targets_BS, batch.weights_BS):
            for document in ids_S[targets_S != IGNORE].unique():
                places_S = (ids_S == document) & (targets_S != IGNORE)
                weights_S[places_S] = 1 / places_S.sum()
    return batch


def fine_tune(settings: dict, words: list[str], weighted: bool, wrong: str = "", alone: bool = False) -> dict[str, Any]:
    """run_steps on such batches, or with a mistake."""
    run = run_steps_alone if alone else run_steps
    with mock.patch.object(mesh_runs, "uneven_batch", lambda batch, _: as_fine_tuning(batch, weighted)):
        if wrong == "mean of each rank":
            own = lambda batch: count(batch)._replace(total=max(float(own_weight(batch)), 1.0))  # noqa: E731
            with mock.patch.object(step_module, "_count_targets", own):
                return run(settings, words, 2)
        return run(settings, words, 2)


count = step_module._count_targets


def own_weight(batch: Batch) -> torch.Tensor:
    """The sum of weights of this rank alone, times the ranks."""
    return count(batch).weight_B.sum() * torch.distributed.get_world_size()


@pytest.fixture(scope="module")
def settings(recipe: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The full recipe: clipping, SMEBU, sequence loss and z-loss, document mask."""
    return recipe(tmp_path_factory.mktemp("fine_tuning") / "run")


@pytest.fixture(scope="module")
def expected(settings: dict) -> Callable[[bool], dict[str, Any]]:
    """expected(weighted): the records of one process."""
    records: dict[bool, dict[str, Any]] = {}

    def once(weighted: bool) -> dict[str, Any]:
        if weighted not in records:
            records[weighted] = fine_tune(settings, [*WORDS, "batch.microbatch=12"], weighted, alone=True)
        return records[weighted]

    return once


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_equals_one_process(settings: dict, processes: Callable, expected: Callable, name: str, weighted: bool) -> None:
    """Raw gradients, counts, metrics and state after two steps, in microbatches of two rows or three, recomputed."""
    world, words = MESHES[name]
    words = [*WORDS, *words, f"batch.microbatch={12 // world // 2}", "recompute=block"]
    runs = processes(world).run(fine_tune, settings, words, weighted)
    reference = expected(weighted)
    assert (torch.stack(reference["counts"]).sum(dim=-1) < 12 * 24 * 2).all()
    assert_same(runs, reference)


def test_a_mean_of_each_rank_is_caught(settings: dict, processes: Callable, expected: Callable) -> None:
    """Tokens would weigh more on ranks with fewer targets."""
    world, words = MESHES["shard 2"]
    runs = processes(world).run(fine_tune, settings, [*WORDS, *words, "batch.microbatch=6"], True, "mean of each rank")
    with pytest.raises(AssertionError, match=r"raw gradient|routes"):
        assert_same(runs, expected(True))
