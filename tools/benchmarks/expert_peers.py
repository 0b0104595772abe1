"""Contenders of the suite `experts`: trinity_kernels, its engines, transformers, Liger, SonicMoE.

Each contender is a function of the inputs that returns its forward; it raises, with the reason, if it cannot run.

Shapes: T tokens, D width, F expert width, E experts, K active experts.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from benchmarks.experts import Case, Forward, Inputs
from torch import Tensor

Make = Callable[[Inputs], Forward]


def contenders(case: Case) -> dict[str, Make]:
    """Name → its maker; trinity_kernels first, so that a suite cut short contains it."""
    from trinity_kernels.expert_engines import ENGINES

    makers: dict[str, Make] = {}
    if torch.cuda.is_available():
        makers["trinity triton"] = lambda _: _trinity("triton")
    makers["trinity reference"] = lambda _: _trinity("reference")
    for name in ENGINES:
        makers[f"trinity's engine {name}"] = lambda inputs, name=name: _engine(name, inputs)
    for name in ("eager", "batched_mm", "grouped_mm"):
        makers[f"transformers {name}"] = lambda inputs, name=name: _transformers(name, case, inputs)
    makers["Liger fused MoE"] = _liger
    makers["SonicMoE"] = _sonic
    return makers


def _trinity(kernel: str) -> Forward:
    from trinity_kernels import expert_mlp

    return lambda inputs: expert_mlp(*inputs[:5], kernel=kernel)


def _engine(name: str, inputs: Inputs) -> Forward:
    from trinity_kernels.expert_engines import check_engine, engine

    check_engine(name, inputs.x_TD.device.type)
    run = engine(name)
    return lambda inputs: run(*inputs[:5])


def _transformers(name: str, case: Case, inputs: Inputs) -> Forward:
    """AfmoeExperts with the inputs' weights; batched_mm copies a weight for every row."""
    from transformers import AfmoeConfig
    from transformers.models.afmoe.modeling_afmoe import AfmoeExperts

    if name == "batched_mm":
        copies = 3 * case.T * case.K * case.F * case.D * inputs.x_TD.element_size() / 2**30
        if copies > 24:
            raise MemoryError(f"copies {copies:,.0f} GiB of weights")
    config = AfmoeConfig(
        hidden_size=case.D, moe_intermediate_size=case.F, num_experts=case.E, num_experts_per_tok=case.K
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = AfmoeExperts(config)
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = inputs.gate_up_E2FD.flatten(1, 2), inputs.down_EDF

    def forward(inputs: Inputs) -> Tensor:
        module.gate_up_proj = inputs.gate_up_E2FD.flatten(1, 2)
        return module(inputs.x_TD, inputs.indices_TK, inputs.s_TK.to(inputs.x_TD.dtype))

    return forward


def _liger(inputs: Inputs) -> Forward:
    if not inputs.x_TD.is_cuda:
        raise ValueError("needs a GPU")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    choices_TK = inputs.indices_TK.int()
    return lambda i: LigerFusedMoEFunction.apply(i.x_TD, i.gate_up_E2FD.flatten(1, 2), i.down_EDF, choices_TK, i.s_TK)


def _sonic(inputs: Inputs) -> Forward:
    """SonicMoE with general routing, which takes choices and gates as inputs; it needs gate and up in alternating rows.

    That copy of W1 is made before timing; its gradient is computed and discarded.
    """
    if not inputs.x_TD.is_cuda:
        raise ValueError("needs a GPU")
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    (T, active), experts = inputs.indices_TK.shape, len(inputs.down_EDF)
    fixed = SimpleNamespace(
        tokens=torch.arange(T, device=inputs.x_TD.device, dtype=torch.int32).repeat_interleave(active),
        choices=inputs.indices_TK.flatten().int(),
        w1=inputs.gate_up_E2FD.detach().transpose(1, 2).flatten(1, 2).contiguous().requires_grad_(),
        stream=torch.cuda.current_stream().cuda_stream,
    )

    def forward(i: Inputs) -> Tensor:
        w1 = fixed.w1.permute(1, 2, 0)
        out, _ = moe_general_routing_inputs(
            i.x_TD, i.s_TK.flatten(), fixed.tokens, fixed.choices, w1, None, i.down_EDF.permute(1, 2, 0), None,
            experts, fixed.stream, ActivationType.SWIGLU, False,
        )  # fmt: skip
        return out

    return forward
