"""Every parameter belongs to one optimizer; their state can be saved, loaded and continued bit for bit."""

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trinity.errors import UserError
from trinity.models.param_roles import Role
from trinity.optim.build import Optimizers, build_optimizers, ownership_table

FORMS = [
    ("embedding", "embedding", (11, 6), ()),
    ("attention.qkvg", "matrix", (24, 6), (10, 2, 2, 10)),
    ("norm", "gain", (6,), ()),
    ("router", "router", (3, 6), (3,)),
    ("experts.gate_up", "experts", (3, 2, 4, 6), (4,)),
    ("experts.down", "experts", (3, 6, 4), (6,)),
    ("head", "head", (11, 6), ()),
    ("frozen", "matrix", (4, 6), (4,)),
]
MUON = {"lr": 0.02, "dtype": torch.float32}
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_roles(dtype: torch.dtype = torch.float32) -> list[Role]:
    generator = torch.Generator().manual_seed(5)
    roles = []
    for name, kind, shape, rows in FORMS:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        roles.append(Role(name, parameter.requires_grad_(name != "frozen"), kind, rows))
    return roles


def build(roles: list[Role], **options: object) -> Optimizers:
    return build_optimizers(roles, [role.parameter for role in roles], muon=MUON, adamw=ADAMW, **options)


def train(roles: list[Role], optimizers: Optimizers, steps: range) -> None:
    """Steps with gradients that depend on the step only; an expert starves in odd steps."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for role in roles:
            if role.parameter.requires_grad:
                gradient = torch.randn(role.parameter.shape, generator=generator).to(role.parameter.dtype)
                if role.kind == "experts" and step % 2:
                    gradient[1] = 0
                role.parameter.grad = gradient
        optimizers.set_rates(1.0 / (1 + step))
        optimizers.step()
        optimizers.zero_grad()


def equal(some: list[Role], others: list[Role]) -> bool:
    return all(torch.equal(one.parameter, other.parameter) for one, other in zip(some, others))


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_the_optimizers_partition_the_trained_parameters(router: str) -> None:
    roles = make_roles()
    optimizers = build(roles, router=router)
    owned = [p for o in (optimizers.muon, optimizers.adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(id(r.parameter) for r in roles if r.name != "frozen")
    muon = {"attention.qkvg", "experts.gate_up", "experts.down"} | ({"router"} if router == "muon" else set())
    assert {role.name for role in optimizers.muon_roles} == muon
    muon_parameters = {id(role.parameter) for role in roles if role.name in muon}
    assert {id(p) for p in optimizers.muon.param_groups[0]["params"]} == muon_parameters


@pytest.mark.parametrize(("decay_gains", "decay"), [(False, 0.0), (True, 0.1)])
def test_gains_have_weight_decay_only_with_decay_gains(decay_gains: bool, decay: float) -> None:
    roles = make_roles()
    groups = build(roles, decay_gains=decay_gains).adamw.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {r.name: decays[id(r.parameter)] for r in roles if id(r.parameter) in decays} == {
        "embedding": 0.1,
        "head": 0.1,
        "norm": decay,
    }


def test_missing_and_double_roles_are_caught() -> None:
    roles = make_roles()
    parameters = [role.parameter for role in roles]
    with pytest.raises(AssertionError, match=r"shape \[11, 6\] has no role"):
        build_optimizers(roles[1:], parameters, muon=MUON, adamw=ADAMW)
    with pytest.raises(AssertionError, match="tied has two roles: it is embedding as well"):
        build([*roles, Role("tied", roles[0].parameter, "head", ())])
    with pytest.raises(AssertionError, match="two parameters are called head"):
        build([*roles, Role("head", torch.nn.Parameter(torch.ones(2)), "gain", ())])
    build_optimizers(roles[:-1], parameters, muon=MUON, adamw=ADAMW)  # a frozen parameter needs no role
    with pytest.raises(UserError, match="router='sgd' is not known; use muon or adamw"):
        build(roles, router="sgd")


def test_frozen_parameters_do_not_change() -> None:
    roles = make_roles()
    before = roles[-1].parameter.detach().clone()
    train(roles, build(roles), range(2))
    assert torch.equal(roles[-1].parameter, before)


def test_zero_grad_drops_every_gradient() -> None:
    roles = make_roles()
    train(roles, build(roles), range(1))
    assert all(role.parameter.grad is None for role in roles)


def test_adamw_equals_its_equations() -> None:
    """Decoupled decay, both moments corrected for their zero start (arXiv 1711.05101); float64: a few roundings."""
    roles = make_roles(torch.float64)
    plain = {role.name: role.parameter.detach().clone() for role in roles}
    moments = {role.name: [torch.zeros_like(role.parameter), torch.zeros_like(role.parameter)] for role in roles}
    optimizers = build(roles)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for role in roles:
            gradient = torch.randn(role.parameter.shape, generator=generator).double()
            role.parameter.grad = gradient if role.name != "frozen" else None
            first, second = moments[role.name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            lr, decay = 0.01 / (step + 1), 0.0 if role.kind == "gain" else 0.1
            corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            plain[role.name] -= lr * decay * plain[role.name]
            plain[role.name] -= lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
        optimizers.set_rates(1 / (step + 1))
        optimizers.step()
    for role in optimizers.adamw_roles:
        torch.testing.assert_close(role.parameter.detach(), plain[role.name], rtol=0, atol=1e-13)
    assert {role.name for role in optimizers.adamw_roles} == {"embedding", "norm", "head"}


def test_set_rates_scales_both_peaks() -> None:
    optimizers = build(make_roles())
    optimizers.set_rates(0.5)
    optimizers.set_rates(0.25)  # of the peak, not of the last rate
    assert [group["lr"] for group in optimizers.muon.param_groups] == [0.005]
    assert [group["lr"] for group in optimizers.adamw.param_groups] == [0.0025, 0.0025]


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_state_is_flat_and_complete_before_the_first_step(router: str) -> None:
    roles = make_roles()
    optimizers = build(roles, router=router)
    early = optimizers.state_dict()
    adamw = ["embedding", "head", "norm"] + (["router"] if router == "adamw" else [])
    muon = ["attention.qkvg", "experts.down", "experts.gate_up"] + (["router"] if router == "muon" else [])
    assert set(early) == {
        *(f"adamw.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in adamw),
        *(f"muon.momentum.{name}" for name in muon),
        "muon.starved_steps.experts.down",
        "muon.starved_steps.experts.gate_up",
    }
    assert all(type(value) is torch.Tensor and not value.any() for value in early.values())
    shapes = {key: (value.shape, value.dtype) for key, value in early.items()}
    train(roles, optimizers, range(1))
    assert {key: (value.shape, value.dtype) for key, value in optimizers.state_dict().items()} == shapes


def test_init_state_changes_nothing() -> None:
    plain, prepared = make_roles(), make_roles()
    optimizers = build(plain), build(prepared)
    optimizers[1].init_state()
    train(plain, optimizers[0], range(3))
    train(prepared, optimizers[1], range(3))
    assert equal(plain, prepared)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0]["adamw.step.norm"].item() == 3


@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_continuing_from_a_saved_state_equals_an_uninterrupted_run(stop: int) -> None:
    whole, first, second = make_roles(), make_roles(), make_roles()
    train(whole, build(whole), range(6))
    optimizers = build(first)
    train(first, optimizers, range(stop))
    saved = {key: value.clone() for key, value in optimizers.state_dict().items()}
    for role, trained in zip(second, first):
        role.parameter.data.copy_(trained.parameter)
    fresh = build(second)
    own = fresh.state_dict()
    fresh.load_state_dict(saved)
    assert all(own[key] is value for key, value in fresh.state_dict().items())  # in place
    train(second, fresh, range(stop, 6))
    assert equal(whole, second)


def test_the_state_of_another_model_is_refused() -> None:
    optimizers = build(make_roles())
    with pytest.raises(UserError, match=r"lacks adamw.exp_avg.router \(4 keys differ\)"):
        build(make_roles(), router="adamw").load_state_dict(optimizers.state_dict())
    with pytest.raises(UserError, match=r"has a surplus more \(1 keys differ\)"):
        optimizers.load_state_dict({**optimizers.state_dict(), "more": torch.zeros(1)})
    smaller = {**optimizers.state_dict(), "adamw.exp_avg.norm": torch.zeros(1)}  # copy_ would broadcast it
    with pytest.raises(UserError, match=r"exp_avg.norm has shape \[1\], the model's has \[6\]"):
        optimizers.load_state_dict(smaller)


def test_dtensors_on_a_mesh_of_one_equal_plain_tensors(mesh) -> None:
    plain, sharded = make_roles(), []
    for role in plain:
        parameter = torch.nn.Parameter(distribute_tensor(role.parameter.detach().clone(), mesh, [Shard(0)]))
        sharded.append(Role(role.name, parameter.requires_grad_(role.name != "frozen"), role.kind, role.rows))
    optimizers = build(plain), build(sharded)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(plain, sharded):
            gradient = torch.randn(one.parameter.shape, generator=generator)
            if one.name != "frozen":
                one.parameter.grad = gradient
                other.parameter.grad = distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain, sharded):
        assert torch.equal(one.parameter, other.parameter.full_tensor())
    assert isinstance(optimizers[1].state_dict()["adamw.exp_avg.head"], DTensor)
    assert isinstance(optimizers[1].state_dict()["muon.starved_steps.experts.gate_up"], DTensor)


def test_table_counts_tensors_matrices_and_parameters() -> None:
    lines = ownership_table(build(make_roles())).splitlines()
    assert [line.split() for line in lines] == [
        ["group", "optimizer", "tensors", "matrices", "parameters"],
        ["matrix", "Muon", "1", "4", "144"],
        ["router", "Muon", "1", "1", "18"],
        ["experts", "Muon", "2", "9", str(math.prod((3, 2, 4, 6)) + math.prod((3, 6, 4)))],
        ["embedding", "AdamW", "1", "0", "66"],
        ["gain", "AdamW", "1", "0", "6"],
        ["head", "AdamW", "1", "0", "66"],
        ["total", "7", "14", "516"],
    ]
