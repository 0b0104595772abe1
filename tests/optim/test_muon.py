"""Muon against the plain reference (`muon_reference.py`, itself tested against the SVD) in float64."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trinity.errors import UserError
from trinity.models.param_roles import Role
from trinity.optim import muon as muon_module
from trinity.optim.muon import Muon, rate_factor
from trinity.optim.muon_reference import ReferenceMuon
from trinity.optim.newton_schulz import orthogonalize

# name, kind, shape, rows: every form a parameter has in the model, with tall and flat pieces
FORMS = [
    ("qkvg", "matrix", (24, 6), (10, 2, 2, 10)),
    ("o", "matrix", (6, 10), (6,)),
    ("dense_gate_up", "matrix", (20, 6), (10, 10)),
    ("gate_up", "experts", (3, 2, 4, 6), (4,)),
    ("down", "experts", (3, 6, 4), (6,)),
    ("router", "router", (3, 6), (3,)),
]
# Weights are of order 1; Newton-Schulz amplifies rounding of 2⁻⁵³ by at most its slopes, below 1e3.
FLOAT64 = {"rtol": 0, "atol": 1e-12}


def make_roles(dtype: torch.dtype = torch.float64) -> list[Role]:
    """One parameter of each form, always the same values."""
    generator = torch.Generator().manual_seed(5)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _, _, shape, _ in FORMS]
    return [Role(name, parameter, kind, rows) for (name, kind, _, rows), parameter in zip(FORMS, parameters)]


def make_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, _, shape, _ in FORMS}


def set_gradients(roles: list[Role], gradients: dict[str, Tensor]) -> None:
    for role in roles:
        gradient = gradients.get(role.name)
        role.parameter.grad = None if gradient is None else gradient.to(role.parameter.dtype)


@pytest.mark.parametrize("starved", ["decay", "full"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_the_reference(nesterov: bool, starved: str) -> None:
    """Five steps with different rates, in which parameters and experts lose their gradient and get it back."""
    roles, reference_roles = make_roles(), make_roles()
    settings = {
        "lr": 1.0, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3, "starved": starved,
        "dtype": torch.float64,
    }  # fmt: skip
    optimizer, reference = Muon(roles, **settings), ReferenceMuon(reference_roles, **settings)
    for step, lr in enumerate([0.1, 0.2, 0.05, 0.1, 0.3]):
        gradients = make_gradients(step)
        gradients["down"][0].abs_().neg_()[0, 0] = 0  # no gradient above 0 is not the same as no gradient
        gradients["down"][1].abs_()[0, 0] = 0
        expected_starved = 0
        if step in (1, 2):  # expert 2 starves twice, is fed in step 3, and starves again
            gradients["gate_up"][2] = gradients["down"][2] = 0
            expected_starved = 3
        if step in (2, 4):
            gradients["gate_up"][2, 0] = 0
            expected_starved = 3 if step == 2 else 1
        if step == 3:
            gradients["o"] = gradients["down"] = None
            expected_starved = 3
        for each, its_roles in ((optimizer, roles), (reference, reference_roles)):
            set_gradients(its_roles, gradients)
            each.param_groups[0]["lr"] = lr
            each.step()
        counters = [state["starved_steps"] for state in optimizer.state.values() if "starved_steps" in state]
        assert sum(int((counter > 0).sum()) for counter in counters) == expected_starved
        for role, reference_role in zip(roles, reference_roles):
            torch.testing.assert_close(role.parameter, reference_role.parameter, **FLOAT64)
            state, expected = optimizer.state[role.parameter], reference.state[reference_role.parameter]
            assert state.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(state[key], value, **FLOAT64)


def test_starved_update_decays_and_a_full_one_does_not() -> None:
    """The update of step k after the last gradient is μᵏ times a full one (both to 1e-12)."""
    moved = {}
    for starved in ("decay", "full"):
        roles = make_roles()
        optimizer = Muon(roles, lr=0.1, momentum=0.5, weight_decay=0.0, dtype=torch.float64, starved=starved)
        moved[starved] = []
        for step in range(5):
            gradients = make_gradients(step)
            if step:
                gradients["down"][1] = 0
            set_gradients(roles, gradients)
            before = roles[4].parameter[1].detach().clone()
            optimizer.step()
            moved[starved].append(before - roles[4].parameter[1].detach())
    for k, (decayed, full) in enumerate(zip(moved["decay"], moved["full"])):
        torch.testing.assert_close(decayed, 0.5**k * full, **FLOAT64)
        assert torch.linalg.matrix_norm(full, ord=2) > 0.09 * rate_factor(6, 4)


# Report, table 1: d, dense width, expert width, h_q, h_kv, d_h, routed experts.
NANO = (1024, 3072, 256, 8, 2, 128, 128)
MINI = (2048, 6144, 1024, 32, 4, 128, 128)
LARGE = (3072, 12288, 3072, 48, 8, 128, 256)


@pytest.mark.parametrize(
    ("size", "other_than_one"),
    [
        (NANO, {"dense gate/up": 1.7321, "expert down": 2.0}),
        (MINI, {"q, gate": 1.4142, "dense gate/up": 1.7321, "expert down": 1.4142}),
        (LARGE, {"q, gate": 1.4142, "dense gate/up": 2.0}),
    ],
)
def test_rate_factors_of_the_three_models(size: tuple[int, ...], other_than_one: dict[str, float]) -> None:
    """Eq. 41 for every matrix of Nano, Mini and Large, to four decimals; matrices that are not listed have 1."""
    d, dense, expert, hq, hkv, dh, routed = size
    shapes = {
        "q, gate": (hq * dh, d),
        "k, v": (hkv * dh, d),
        "o": (d, hq * dh),
        "dense gate/up": (dense, d),
        "dense down": (d, dense),
        "expert gate/up": (expert, d),
        "expert down": (d, expert),
        "router": (routed, d),
    }
    factors = {name: round(rate_factor(*shape), 4) for name, shape in shapes.items()}
    assert factors == {name: other_than_one.get(name, 1.0) for name in shapes}


def run_two_steps(roles: list[Role], gradients: list[dict[str, Tensor]]) -> None:
    optimizer = Muon(roles, lr=0.1, weight_decay=0.1, dtype=torch.float64)
    for step_gradients in gradients:
        set_gradients(roles, step_gradients)
        optimizer.step()


def test_a_fused_parameter_equals_separate_ones() -> None:
    fused, *_ = make_roles()
    pieces = [piece.clone() for piece in fused.parameter.detach().split(fused.rows)]
    separate = [Role(f"p{i}", torch.nn.Parameter(p), "matrix", (len(p),)) for i, p in enumerate(pieces)]
    steps = [make_gradients(step)["qkvg"] for step in range(2)]
    run_two_steps([fused], [{"qkvg": g} for g in steps])
    run_two_steps(separate, [{f"p{i}": piece for i, piece in enumerate(g.split(fused.rows))} for g in steps])
    joined = torch.cat([role.parameter.detach() for role in separate])
    torch.testing.assert_close(fused.parameter.detach(), joined, **FLOAT64)


def test_experts_in_a_batch_equal_experts_one_by_one() -> None:
    batch = make_roles()[3]
    alone = [Role(f"e{i}", torch.nn.Parameter(batch.parameter.detach()[i].clone()), "experts", (4,)) for i in range(3)]
    steps = [make_gradients(step)["gate_up"] for step in range(2)]
    run_two_steps([batch], [{"gate_up": g} for g in steps])
    run_two_steps(alone, [{f"e{i}": g[i] for i in range(3)} for g in steps])
    joined = torch.stack([role.parameter.detach() for role in alone])
    torch.testing.assert_close(batch.parameter.detach(), joined, **FLOAT64)


@pytest.mark.parametrize(
    ("bound", "batch_sizes"), [(100, [1] * 6), (192, [1] * 6), (4 * 192, [4, 2]), (5 * 192, [5, 1])]
)
def test_batch_size_is_bounded_and_changes_nothing(monkeypatch, bound: int, batch_sizes: list[int]) -> None:
    """gate_up has six matrices [4, 6] of 192 bytes each; with a smaller bound each is a batch of its own."""
    default, bounded = make_roles(), make_roles()
    gradients = [make_gradients(step) for step in range(2)]
    run_two_steps(default, gradients)
    batches: list[Tensor] = []

    def spy(x: Tensor, *arguments: object) -> Tensor:
        batches.append(x)
        return orthogonalize(x, *arguments)

    monkeypatch.setattr(muon_module, "orthogonalize", spy)
    monkeypatch.setattr(muon_module, "BATCH_BYTES", bound)
    run_two_steps(bounded, gradients)
    for x in batches:
        assert len(x) == 1 or x.numel() * x.element_size() <= bound
    assert sum(len(x) for x in batches) == 2 * (4 + 1 + 2 + 6 + 3 + 1)
    assert [len(x) for x in batches if x.shape[1:] == (4, 6)] == 2 * batch_sizes
    for one, other in zip(default, bounded):
        torch.testing.assert_close(one.parameter, other.parameter, **FLOAT64)


def test_same_shapes_of_different_parameters_share_a_batch(monkeypatch) -> None:
    """17 matrices of six shapes; the four matrices [10, 6] come from qkvg and from dense_gate_up."""
    shapes: list[torch.Size] = []
    monkeypatch.setattr(muon_module, "orthogonalize", lambda x, *a: shapes.append(x.shape) or orthogonalize(x, *a))
    roles = make_roles()
    set_gradients(roles, make_gradients(0))
    Muon(roles, lr=0.1).step()
    assert sorted(map(tuple, shapes)) == [(1, 3, 6), (1, 6, 10), (2, 2, 6), (3, 6, 4), (4, 10, 6), (6, 4, 6)]


def test_init_state_changes_nothing() -> None:
    plain, prepared = make_roles(torch.float32), make_roles(torch.float32)
    optimizers = Muon(plain, lr=0.1), Muon(prepared, lr=0.1)
    optimizers[1].init_state()
    shapes = {role.name: {k: v.shape for k, v in optimizers[1].state[role.parameter].items()} for role in prepared}
    for step in range(2):
        for roles, optimizer in zip((plain, prepared), optimizers):
            set_gradients(roles, make_gradients(step))
            optimizer.init_state()  # after the first step too, where it must not reset anything
            optimizer.step()
    for one, other in zip(plain, prepared):
        assert torch.equal(one.parameter, other.parameter)
        states = [optimizer.state[role.parameter] for optimizer, role in zip(optimizers, (one, other))]
        assert {k: v.shape for k, v in states[0].items()} == shapes[one.name]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_momentum_is_kept_in_fp32_at_least(dtype: torch.dtype) -> None:
    roles = make_roles(dtype)
    optimizer = Muon(roles, lr=0.1)
    set_gradients(roles, make_gradients(0))
    optimizer.step()
    for role in roles:
        assert role.parameter.dtype == dtype
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert optimizer.state[role.parameter]["momentum"].dtype == expected
    assert optimizer.state[roles[3].parameter]["starved_steps"].dtype == torch.float32


def test_dtensors_on_a_mesh_of_one_equal_plain_tensors(mesh) -> None:
    plain = make_roles(torch.float32)
    sharded = []
    for role in plain:
        parameter = torch.nn.Parameter(distribute_tensor(role.parameter.detach().clone(), mesh, [Shard(0)]))
        sharded.append(Role(role.name, parameter, role.kind, role.rows))
    optimizers = Muon(plain, lr=0.1), Muon(sharded, lr=0.1)
    for step in range(3):
        gradients = make_gradients(step)
        gradients["gate_up"][1] = 0
        set_gradients(plain, gradients)
        for role, one in zip(sharded, plain):
            role.parameter.grad = distribute_tensor(one.parameter.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain, sharded):
        assert torch.equal(one.parameter, other.parameter.full_tensor())
        for key, value in optimizers[1].state[other.parameter].items():
            assert isinstance(value, DTensor)
            assert value.placements == other.parameter.placements
            assert torch.equal(value.full_tensor(), optimizers[0].state[one.parameter][key])


def test_wrong_values_are_refused_before_the_first_step() -> None:
    roles = make_roles()
    with pytest.raises(UserError, match="'newton' is not a known set"):
        Muon(roles, lr=0.1, coefficients="newton")
    with pytest.raises(UserError, match="starved='off' is not known; use decay or full"):
        Muon(roles, lr=0.1, starved="off")
    with pytest.raises(UserError, match="wire='int8' is not known; use auto or bfloat16 or float32 or float64"):
        Muon(roles, lr=0.1, wire="int8")
    with pytest.raises(UserError, match="share='yes' is not known; use auto or on or off"):
        Muon(roles, lr=0.1, share="yes")
    with pytest.raises(AssertionError, match=r"o: rows \(5,\) do not add up to 6"):
        Muon([Role("o", roles[1].parameter, "matrix", (5,))], lr=0.1)
    with pytest.raises(AssertionError, match=r"gain: rows \(\) do not add up to 0"):
        Muon([Role("gain", torch.nn.Parameter(torch.ones(4)), "gain", ())], lr=0.1)
