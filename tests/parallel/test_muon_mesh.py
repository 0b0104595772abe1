"""Muon and clipping on meshes of 2 and 4 ranks, in float64; collectives and their bytes are counted.

Muon is compared with `muon_reference.ReferenceMuon` on one process, clipping with its own formula on whole tensors.
Parameters are sharded by FSDP2 itself, as in trinity/parallel/fsdp.py. Newton-Schulz amplifies rounding of 2⁻⁵³ by
less than 1e3 a step, on weights of order 1: hence 1e-10.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.models.param_roles import Role
from trinity.optim import muon as muon_module
from trinity.optim.build import Optimizers, build_optimizers, ownership_table
from trinity.optim.grad_clip import clip_, global_norm
from trinity.optim.muon import Muon
from trinity.optim.muon_reference import ReferenceMuon
from trinity.parallel.mesh import Ranks, Sizes, join_meshes

# name, kind, shape, rows. Sharded over 4 ranks, the packed matrices of qkvg lie on 2, 1, 2 and 2 of them; o and router
# leave ranks without a row, and one, a single row, leaves all but the first.
FORMS = [
    ("qkvg", "matrix", (23, 6), (9, 2, 3, 9)),
    ("o", "matrix", (6, 10), (6,)),
    ("dense_gate_up", "matrix", (20, 6), (10, 10)),
    ("router", "router", (3, 6), (3,)),
    ("one", "matrix", (1, 6), (1,)),
    ("gate_up", "experts", (8, 2, 4, 6), (4,)),
    ("down", "experts", (8, 6, 4), (6,)),
]
OTHERS = [("embedding", "embedding", (5, 6), ()), ("norm", "gain", (6,), ()), ("head", "head", (11, 6), ())]
FLOAT64 = {"momentum": 0.9, "weight_decay": 0.3, "dtype": torch.float64}


class Mesh(NamedTuple):
    """Mesh sizes, and the dimension that expert_shard shards: 0 the experts, 2 their width."""

    replicate: int
    expert_shard: int
    expert: int
    dim: int

    @property
    def world(self) -> int:
        return self.replicate * self.expert_shard * self.expert


MESHES = {
    "shard 2": Mesh(1, 2, 1, 0),
    "shard 2, expert 2": Mesh(1, 1, 2, 0),
    "shard 4": Mesh(1, 4, 1, 0),
    "shard 4, expert 2": Mesh(1, 2, 2, 0),
    "shard 4, expert 4": Mesh(1, 1, 4, 0),
    "shard 4, width by 4": Mesh(1, 4, 1, 2),
    "shard 4, expert 2, width by 2": Mesh(1, 2, 2, 2),
    "replicate 2, shard 2": Mesh(2, 2, 1, 0),
    "replicate 2, shard 2, expert 2": Mesh(2, 1, 2, 0),
    "replicate 2, shard 2, width by 2": Mesh(2, 2, 1, 2),
    "replicate 4": Mesh(4, 1, 1, 0),
}


def meshes(mesh: Mesh) -> Ranks:
    sizes = Sizes(mesh.replicate, mesh.expert_shard * mesh.expert, mesh.expert, mesh.expert_shard, "")
    return join_meshes(sizes, torch.device("cpu"))


def place(whole: Tensor, kind: str, mesh: Mesh | None) -> nn.Parameter:
    """A new parameter, sharded by FSDP2; unsharded if `mesh` is None."""
    holder = nn.Module()
    holder.x = nn.Parameter(whole.clone())
    if mesh is None:
        return holder.x
    ranks = meshes(mesh)
    device_mesh, name = (ranks.experts, "expert_shard") if kind == "experts" else (ranks.dense, "shard")
    if kind == "experts" and mesh.expert > 1:
        part = whole.chunk(mesh.expert)[device_mesh.get_local_rank("expert")].clone()
        holder.x = nn.Parameter(DTensor.from_local(part, device_mesh["expert"], [Shard(0)], run_check=False))
    fully_shard(
        holder,
        mesh=device_mesh[name] if mesh.replicate == 1 else device_mesh["replicate", name],
        shard_placement_fn=(lambda _: Shard(mesh.dim)) if kind == "experts" and mesh.dim else None,
    )
    return holder.x


def make_roles(mesh: Mesh | None, forms: list[tuple] = FORMS) -> list[Role]:
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for _, _, shape, _ in forms]
    return [Role(name, place(x, kind, mesh), kind, rows) for x, (name, kind, _, rows) in zip(whole, forms)]


def make_gradients(step: int, forms: list[tuple] = FORMS) -> dict[str, Tensor | None]:
    """Expert 2 has no gradient in steps 1 and 2, expert 5 only in the last part of its width; in 3, two are missing."""
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, _, shape, _ in forms}
    if "gate_up" in gradients and step in (1, 2):
        gradients["gate_up"][2] = gradients["down"][2] = 0
        gradients["gate_up"][5, 0, :-1] = 0
        gradients["down"][5, :, :-1] = 0
    if step == 3:
        gradients |= {"o": None, "down": None}
    return gradients


def set_gradients(roles: list[Role], gradients: dict[str, Tensor | None], mesh: Mesh | None) -> None:
    for role in roles:
        whole = gradients.get(role.name)
        role.parameter.grad = None if whole is None else place(whole, role.kind, mesh).detach()


def full_copy(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def local_copy(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


def train(mesh: Mesh | None, steps: int = 5, options: dict[str, Any] = FLOAT64) -> dict[str, Any]:
    """Run Muon, or the reference if `mesh` is None: whole tensors, this rank's parts, starved matrices by step."""
    roles = make_roles(mesh)
    optimizer = (Muon if mesh else ReferenceMuon)(roles, lr=0.1, **options)
    counts = []
    for step in range(steps):
        set_gradients(roles, make_gradients(step), mesh)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
        counters = [full_copy(state["starved_steps"]) for state in optimizer.state.values() if "starved_steps" in state]
        counts.append(sum(int((counter > 0).sum()) for counter in counters))
    tensors = {(role.name, "weight"): role.parameter for role in roles}
    tensors |= {(role.name, key): x for role in roles for key, x in optimizer.state[role.parameter].items()}
    return {
        "full": {key: full_copy(x) for key, x in tensors.items()},
        "local": {key: local_copy(x) for key, x in tensors.items()},
        "counts": counts,
    }


def assert_equal(results: list[dict[str, Any]], expected: dict[str, Any], mesh: Mesh) -> None:
    """Assert that every rank's gathered tensors equal those of one process, and that replicas hold the same bits."""
    ranks_of_a_replica = mesh.world // mesh.replicate
    for rank, result in enumerate(results):
        assert result["full"].keys() == expected["full"].keys()
        for key, x in result["full"].items():
            torch.testing.assert_close(x, expected["full"][key], rtol=0, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
        for key, x in result["local"].items():
            assert torch.equal(x, results[rank % ranks_of_a_replica]["local"][key]), key
        assert result["counts"] == expected["counts"]


@pytest.mark.parametrize("name", MESHES)
def test_steps_equal_one_process(processes: Callable, name: str) -> None:
    """Weights, momentum and starved_steps after five steps, with starved experts and missing gradients."""
    mesh = MESHES[name]
    expected = train(None)
    assert expected["counts"] == [0, 3, 3, 8, 0]  # by hand: gate, up and down of one expert; all downs; none
    for share in ("on", "off") if mesh.replicate > 1 else ("auto",):
        assert_equal(processes(mesh.world).run(train, mesh, 5, FLOAT64 | {"share": share}), expected, mesh)


@pytest.mark.parametrize("name", ["shard 4, expert 2", "shard 4, width by 4", "replicate 2, shard 2"])
def test_small_batches_change_nothing(processes: Callable, name: str) -> None:
    """One matrix per batch on each owner: some ranks own a matrix of a batch, others none."""
    options = FLOAT64 | {"share": "on"}
    results = processes(MESHES[name].world).run(train_in_small_batches, MESHES[name], options)
    assert_equal(results, train(None), MESHES[name])


def train_in_small_batches(mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
    with mock.patch.object(muon_module, "BATCH_BYTES", 1):
        return train(mesh, 5, options)


def test_sharing_changes_bits_only_by_batch_size(processes: Callable) -> None:
    """Sharing sends float64 unrounded, so only smaller batches may round differently; momentum does not change.

    1e-12: some roundings of 2⁻⁵³, times Newton-Schulz's slope of less than 1e3 at the smallest singular values.
    """
    mesh = MESHES["replicate 2, shard 2, expert 2"]
    on, off = (processes(4).run(train, mesh, 3, FLOAT64 | {"share": share})[0]["local"] for share in ("on", "off"))
    for key, x in on.items():
        torch.testing.assert_close(x, off[key], rtol=0, atol=1e-12 if key[1] == "weight" else 0)


def test_a_bf16_wire_rounds_only_what_is_sent(processes: Callable) -> None:
    """One step from gradients with equal singular values: experts are not sent (1e-10), the rest is rounded.

    bf16 rounds each element by up to 2⁻⁹ of it, and so U, scaled to norm 1 for Newton-Schulz, by 2⁻⁹ in norm. UΣVᵀ maps
    to U p(Σ)Vᵀ, which amplifies an error by at most the larger of |p'| and p(σ)/σ: 4 at σ = 1/√k, the value of k equal
    singular values, for k = 2, 3, 4, 6 (for k = 1 the scaling removes the error). The result, of norm √6·1.03, is
    rounded once more.
    """
    results = processes(4).run(one_even_step, MESHES["shard 4, expert 2"], FLOAT64 | {"wire": "bfloat16"})
    exact = one_even_step(None, FLOAT64)
    for name, kind, _, rows in FORMS:
        for actual, expected in zip(results[0][name].split(rows, dim=-2), exact[name].split(rows, dim=-2)):
            error = torch.linalg.matrix_norm(actual - expected).max().item() / (
                0.1 * muon_module.rate_factor(*actual.shape[-2:])
            )
            if kind == "experts":
                assert error < 1e-10
            else:
                assert 1e-6 < error < 2**-9 * (4 + 2.6)


def one_even_step(mesh: Mesh | None, options: dict[str, Any]) -> dict[str, Tensor]:
    roles = make_roles(mesh)
    gradients = {name: [] for name, *_ in FORMS}
    for name, _, shape, rows in FORMS:
        generator = torch.Generator().manual_seed(0)
        for m in rows:
            piece = torch.randn(*shape[:-2], m, shape[-1], generator=generator, dtype=torch.float64)
            u, _, vh = torch.linalg.svd(piece, full_matrices=False)
            gradients[name].append(u @ vh)
    set_gradients(roles, {name: torch.cat(pieces, dim=-2) for name, pieces in gradients.items()}, mesh)
    (Muon if mesh else ReferenceMuon)(roles, lr=0.1, **options).step()
    return {role.name: full_copy(role.parameter) for role in roles}


def test_a_gradient_missing_on_one_rank_is_zero_there(processes: Callable) -> None:
    """In the second step only rank 0 has a gradient, and no rank hangs. qkvg's 23 rows are 12 and 11."""
    role = make_roles(None, FORMS[:1])[0]
    optimizer = ReferenceMuon([role], lr=0.1, **FLOAT64)
    for step in range(2):
        role.parameter.grad = make_gradients(step)["qkvg"]
        role.parameter.grad[12 if step else 23 :] = 0
        optimizer.step()
    for result in processes(2).run(two_steps_with_a_missing_gradient):
        torch.testing.assert_close(result, role.parameter.detach(), rtol=0, atol=1e-10)


def two_steps_with_a_missing_gradient() -> Tensor:
    """qkvg after two steps; rank 1 has no gradient in the second."""
    mesh = MESHES["shard 2"]
    roles = make_roles(mesh, FORMS[:1])
    optimizer = Muon(roles, lr=0.1, **FLOAT64)
    for step in range(2):
        set_gradients(roles, make_gradients(step), mesh)
        if step and meshes(mesh).rank == 1:
            roles[0].parameter.grad = None
        optimizer.step()
    return full_copy(roles[0].parameter)


@pytest.mark.parametrize("name", ["shard 4, expert 2", "shard 4, expert 2, width by 2", "replicate 2, shard 2"])
def test_state_is_placed_as_its_parameter(processes: Callable, name: str) -> None:
    """Except starved_steps, replicated where the width is sharded: a checkpoint can be loaded on another mesh."""
    for placements in processes(4).run(state_placements, MESHES[name]):
        for key, (of_parameter, of_state) in placements.items():
            cut_width = "starved_steps" in key and "width" in name
            assert of_state == [Replicate() if cut_width and p == Shard(2) else p for p in of_parameter]


def state_placements(mesh: Mesh) -> dict[str, tuple[list, list]]:
    roles = make_roles(mesh)
    optimizer = Muon(roles, lr=0.1)
    optimizer.init_state()
    return {
        f"{role.name}.{key}": (list(role.parameter.placements), list(x.placements))
        for role in roles
        for key, x in optimizer.state[role.parameter].items()
    }


class Recorder(TorchDispatchMode):
    """Records collectives (name, bytes sent) and batched matrix products, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            sent = args[0][0] if function._opname == "allreduce_" else args[1]
            self.calls.append((function._opname, sent.nbytes))
        elif function._opname == "baddbmm":
            self.calls.append(("baddbmm", 0))
        return function(*args, **(kwargs or {}))


def recorded_step(mesh: Mesh, names: list[str], options: dict[str, Any]) -> list[tuple[str, int]]:
    """The calls of one step of Muon over the named parameters, on this rank."""
    forms = [form for form in FORMS if form[0] in names]
    roles = make_roles(mesh, forms)
    optimizer = Muon(roles, lr=0.1, **options)
    set_gradients(roles, make_gradients(0, forms), mesh)
    with Recorder() as recorder:
        optimizer.step()
    return recorder.calls


EXPERTS = ["gate_up", "down"]


@pytest.mark.parametrize("name", ["shard 2", "shard 2, expert 2", "shard 4, expert 2", "shard 4, expert 4"])
def test_experts_need_no_collective(processes: Callable, name: str) -> None:
    """No collective passes the dispatcher where each expert is whole on a rank."""
    for calls in processes(MESHES[name].world).run(recorded_step, MESHES[name], EXPERTS, FLOAT64):
        assert {name for name, _ in calls} == {"baddbmm"}


def test_dense_matrices_are_sent_once_each_way_by_shape(processes: Callable) -> None:
    """Two all-to-alls per batch: [9, 6], [2, 6], [3, 6], [6, 10], [10, 6] and [1, 6]. Each element is sent once to its
    owner and once back, in bf16 here; the experts' products run while the first all-to-all is in flight.
    """
    everything = [name for name, *_ in FORMS]
    results = processes(4).run(recorded_step, MESHES["shard 4, expert 2"], everything, FLOAT64 | {"wire": "bfloat16"})
    elements = 23 * 6 + 60 + 20 * 6 + 18 + 6
    for calls in results:
        assert [name for name, _ in calls if name != "baddbmm"] == ["alltoall_base_"] * 12
        first = [name for name, _ in calls].index("alltoall_base_")
        assert calls[first + 1][0] == "baddbmm"
    assert sum(size for calls in results for _, size in calls) == 2 * 2 * elements


def test_experts_sharded_by_width_are_sent(processes: Callable) -> None:
    """Two all-to-alls for each of two shapes, and one byte per matrix to find those without gradient on any rank."""
    for calls in processes(4).run(recorded_step, MESHES["shard 4, width by 4"], EXPERTS, FLOAT64):
        assert sorted(name for name, _ in calls if name != "baddbmm") == ["allreduce_"] + ["alltoall_base_"] * 4
        assert dict(calls)["allreduce_"] == 8 * 2 + 8


@pytest.mark.parametrize(("share", "gathers"), [("on", 2), ("off", 0), ("auto", 0)])
def test_replicas_share_as_configured(processes: Callable, share: str, gathers: int) -> None:
    """Two shapes of experts, one all-gather each; for matrices of 24 elements sharing does not pay."""
    mesh = MESHES["replicate 2, shard 2, expert 2"]
    for calls in processes(4).run(recorded_step, mesh, EXPERTS, FLOAT64 | {"share": share}):
        assert [name for name, _ in calls if name != "baddbmm"] == ["_allgather_base_"] * gathers


@pytest.mark.parametrize("name", MESHES)
def test_norm_and_clip_equal_one_process(processes: Callable, name: str) -> None:
    """Every element counts once, and each rank has the same norm: 1e-14 relative in float64, a few roundings.

    fp32 within 1e-6: rows sharded over several ranks are summed in another order.
    """
    mesh = MESHES[name]
    grads = list(make_gradients(0).values())
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    clipped = [grad * (1.5 / norm) for grad in grads]
    for dtype, rel in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for actual, parts in processes(mesh.world).run(clipped_gradients, mesh, dtype):
            assert actual.dtype == dtype
            assert actual.item() == pytest.approx(norm.item(), rel=rel)
            for part, expected in zip(parts, clipped):
                torch.testing.assert_close(part.double(), expected, rtol=0, atol=10 * rel)


def clipped_gradients(mesh: Mesh, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    gradients = zip(make_gradients(0).values(), FORMS)
    grads = [place(grad.to(dtype), kind, mesh).detach() for grad, (_, kind, _, _) in gradients]
    norm = global_norm(grads, meshes(mesh).shard_group)
    clip_(grads, norm, 1.5)
    return norm, [full_copy(grad) for grad in grads]


def test_the_norm_of_a_replicated_tensor_is_refused(processes: Callable) -> None:
    """Its squares would count twice."""
    assert all("each but replicate must cut" in reason for reason in processes(2).run(norm_of_a_replicated_tensor))


def norm_of_a_replicated_tensor() -> str:
    shard = meshes(MESHES["shard 2"]).dense["shard"]
    with pytest.raises(AssertionError) as refusal:
        global_norm([DTensor.from_local(torch.ones(2, 4), shard, [Replicate()], run_check=False)])
    return str(refusal.value)


@pytest.mark.parametrize("name", ["shard 4, expert 2", "shard 4, width by 4", "replicate 2, shard 2, expert 2"])
def test_both_optimizers_continue_from_saved_state(processes: Callable, name: str) -> None:
    """AdamW too equals one process; a new pair of optimizers continues from saved state bit for bit."""
    whole, _, table = train_both(None)
    for tensors, bits, text in processes(4).run(train_both, MESHES[name]):
        assert bits
        assert text == table
        for key, x in tensors.items():
            torch.testing.assert_close(x, whole[key], rtol=0, atol=1e-10)


def train_both(mesh: Mesh | None) -> tuple[dict[str, Tensor], bool, str]:
    """Gathered tensors after 4 steps; whether continuing from the state after 2 gave the same bits; the table."""
    forms = [*FORMS, *OTHERS]
    roles, again = make_roles(mesh, forms), make_roles(mesh, forms)
    optimizers, fresh = both(roles), both(again)
    advance(roles, optimizers, range(2), mesh)
    saved = {key: x.clone() for key, x in optimizers.state_dict().items()}
    fresh.load_state_dict(saved)
    for role, trained in zip(again, roles):
        local_part(role.parameter).copy_(local_part(trained.parameter))
    advance(roles, optimizers, range(2, 4), mesh)
    advance(again, fresh, range(2, 4), mesh)
    tensors, others = optimizers.state_dict(), fresh.state_dict()
    tensors |= {role.name: role.parameter for role in roles}
    others |= {role.name: role.parameter for role in again}
    bits = all(torch.equal(local_copy(x), local_copy(others[key])) for key, x in tensors.items())
    return {key: full_copy(x) for key, x in tensors.items()}, bits, ownership_table(optimizers)


def both(roles: list[Role]) -> Optimizers:
    adamw = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return build_optimizers(roles, [role.parameter for role in roles], muon={"lr": 0.1, **FLOAT64}, adamw=adamw)


def advance(roles: list[Role], optimizers: Optimizers, steps: range, mesh: Mesh | None) -> None:
    for step in steps:
        set_gradients(roles, make_gradients(step, [*FORMS, *OTHERS]), mesh)
        optimizers.step()


@torch.no_grad()
def local_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x.data
