"""A plan against a real step: memory and collectives of rank 0 of four processes.

A plan assumes even routing. Here every token goes to all experts, so that plan and run must agree to the byte. Some
sizes do not divide by the ranks: rank 0 has whole chunks, the last ranks less.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.mesh_runs import config_of
from trinity.config.run import RunConfig
from trinity.data.stream.collate import Batch
from trinity.parallel import mesh
from trinity.parallel.comm_counter import count_collectives
from trinity.parallel.mesh import check_parallel
from trinity.planning.activations import block_activations
from trinity.planning.communication import communication_flows
from trinity.planning.fake_rank import fake_rank, state_bytes
from trinity.planning.schedule_segments import rank_load, schedule_segments
from trinity.training.build import build_model, make_optimizers
from trinity.training.train_step import train_step

MODEL = {
    "vocab_size": 50, "width": 24, "layers": 3, "dense_layers": 1, "dense_width": 36, "heads": 2, "kv_heads": 1,
    "head_dim": 8, "window": 6, "global_every": 2, "experts": 4, "active_experts": 4, "expert_width": 12,
}  # fmt: skip
SETTINGS = {
    "model": MODEL,
    "run": {"steps": 1},
    "data": {"sequence_length": 12},
    "batch": {"sequences": 8, "microbatch": 1},
    "optim": {"muon": {"dtype": "float32", "wire": "bfloat16", "share": "on"}},
    "precision": {"compute": "float32"},
    "parallel": {"defer_reduce": "off"},
    "balancing": {"sequence_loss": 1e-4},
}
CASES = [
    pytest.param(["parallel.shard=4", "parallel.expert=2"], marks=pytest.mark.slow),
    ["parallel.replicate=2", "parallel.shard=2", "parallel.expert=2"],
    ["parallel.shard=4", "precision.compute=bfloat16", "precision.reduce=bfloat16", "recompute=block"],
    ["parallel.replicate=2", "parallel.shard=2", "parallel.defer_reduce=on", "optim.muon.share=off"],
    ["parallel.shard=4", "parallel.expert=2", "recompute=selective", "batch.microbatch=2", "optim.router=adamw"],
    ["parallel.shard=4", "model.experts=2", "model.active_experts=2"],  # more ranks than experts: sharded by width
]


def one_step(words: list[str]) -> dict[str, Any]:
    """Bytes memory and collectives made by this rank in the first step of a run."""
    config = config_of(SETTINGS, words)
    ranks = mesh.start(config.parallel, config.model, 1, False)
    model = build_model(config, ranks)
    model.init_weights(0)
    optimizers = make_optimizers(config, model)
    update, memory = optimizers.step, {}

    def record_gradients_and_step() -> None:
        memory["gradients"] = storage_bytes([p.grad for p in model.parameters()])
        update()

    optimizers.step = record_gradients_and_step
    tokens = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(ranks.rank))
    with count_collectives() as collected:
        train_step(model, optimizers, Batch(tokens[:, :-1], tokens[:, 1:], None), config, 1.0, ranks)
    memory["parameters"] = storage_bytes(list(model.parameters()))
    for name, optimizer in (("Muon momentum", optimizers.muon), ("AdamW moments", optimizers.adamw)):
        memory[name] = storage_bytes([x for state in optimizer.state.values() for x in state.values()])
    memory["expert biases"] = storage_bytes(list(model.buffers()))
    return {"memory": memory, "traffic": {key: tuple(value) for key, value in collected.items() if key[1] > 1}}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    parts = [getattr(x, "_local_tensor", x.detach()).untyped_storage() for x in tensors]
    return sum({part.data_ptr(): part.nbytes() for part in parts if part.nbytes()}.values())


def planned_step(config: RunConfig) -> dict[str, Any]:
    """The same values from the plan."""
    load = rank_load(config, schedule_segments(config)[0], 4)
    with fake_rank(config, check_parallel(config.parallel, config.model, 4)) as rank:
        exchanged = [block.exchange for block in block_activations(config, rank.ranks, load.microbatch)]
        traffic: dict[tuple[str, int], tuple[int, float]] = {}
        for flow in communication_flows(config, rank, load, exchanged, config.parallel.defer_reduce == "on"):
            calls, size = traffic.get((flow.kind, flow.ranks), (0, 0))
            traffic[flow.kind, flow.ranks] = calls + flow.calls, size + flow.bytes
        return {"memory": state_bytes(rank.model, rank.optimizers), "traffic": traffic}


@pytest.mark.parametrize("words", CASES, ids=lambda words: " ".join(words))
def test_memory_and_collectives_of_rank_0(processes: Callable, words: list[str]) -> None:
    """Bytes and calls are equal; no rank holds more than rank 0."""
    expected = planned_step(config_of(SETTINGS, words))
    runs = processes(4).run(one_step, words)
    assert all(run["memory"][part] <= size for run in runs for part, size in expected["memory"].items())
    assert runs[0]["memory"] == expected["memory"]
    assert runs[0]["traffic"] == expected["traffic"]
