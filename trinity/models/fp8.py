"""8-bit matrix products in the projections: attention, dense FFN and shared experts. Off by default, as in the report.

Applied to a model from outside: each Linear keeps its weight, its name and its place in the checkpoint, and only its
forward changes. Weights stay fp32 in the optimizer and arrive in bf16, gathered by FSDP2; they, the activations and the
gradients are rounded to 8 bits for each product, with scales made there and then, so that there is no state to save and
recompute gives the same numbers. Router, routed experts, embedding, head and norms are not touched.

    torchao              its Float8Linear, recipe "rowwise": e4m3 in all three products, one scale (a power of two) for
                         each row of x, of W and of dy; so that matrices stacked in one weight do not share scales.
                         Needs an H100 or newer; on a CPU torchao emulates the rounding, to try what it does to a loss.
    transformer_engine   te.pytorch.Linear with its recipe Float8CurrentScaling: one scale a tensor. An H100 or newer.
                         Not run by this project yet.

The product of two e4m3 numbers: each has 3 bits after the leading one, so a rounding error of at most 2⁻⁴ and 0.026 on
average (root mean square); a product of two is 0.037 off (measured on random numbers: 0.037 forward, dx and dW alike).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from trinity.errors import UserError
from trinity.models.layers import Linear

Product = Callable[[Tensor, Tensor], Tensor]
"""(x, weight_OI) → x·Wᵀ in 8 bits, differentiable in both."""

MULTIPLE = 16
"""Widths of 8-bit products are multiples of it, on every GPU."""

INSTALL = {
    "torchao": "pip install torchao",
    "transformer_engine": "pip install 'transformer-engine[pytorch,core-cu13]'",
}


def use_fp8(model: nn.Module, kind: Literal["torchao", "transformer_engine"], device: torch.device) -> None:
    """Make every Linear of a model multiply in 8 bits; apply before sharding.

    Args:
        model: changes in place; parameters and their names do not.
        kind: whose products.
        device: that it will run on.
    Raises:
        UserError: the package is missing, the device cannot do it, or a width is not a multiple of 16.
    """
    package = _package(kind)
    if kind == "transformer_engine" and device.type != "cuda":
        raise UserError("precision.fp8=transformer_engine needs an NVIDIA GPU; use torchao, which emulates, or none")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(f"precision.fp8={kind} needs an H100 or a newer GPU; use precision.fp8=none")
    product = partial({"torchao": _torchao, "transformer_engine": _transformer_engine}[kind], package, device)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            outputs, inputs = module.weight.shape
            if outputs % MULTIPLE or inputs % MULTIPLE:
                raise UserError(
                    f"precision.fp8={kind} takes widths of multiples of {MULTIPLE} and {name} is {outputs} × {inputs}; "
                    "use precision.fp8=none"
                )
            # on the instance: names of parameters stay as they are
            module.forward = partial(_forward, module, product(outputs, inputs))


def _forward(linear: Linear, product: Product, x: Tensor) -> Tensor:
    # looked up at each call: FSDP2 puts the gathered weight there
    return product(x, linear.weight)


def _package(kind: str) -> ModuleType:
    name = {"torchao": "torchao.float8", "transformer_engine": "transformer_engine.pytorch"}[kind]
    try:
        return import_module(name)
    except Exception as error:  # a package half installed fails in its own way: a missing library, a version of torch
        why = str(error).partition("\n")[0]
        raise UserError(
            f"precision.fp8={kind} needs {name} ({why}); install it with {INSTALL[kind]}, or use precision.fp8=none"
        ) from error


def _torchao(package: ModuleType, device: torch.device, outputs: int, inputs: int) -> Product:
    config = package.Float8LinearConfig.from_recipe_name("rowwise")
    config = dataclasses.replace(config, emulate=device.type != "cuda")
    module = import_module("torchao.float8.float8_linear").Float8Linear
    with torch.device("meta"):
        return _in_place_of(module.from_float(nn.Linear(inputs, outputs, bias=False), config=config))


def _transformer_engine(package: ModuleType, device: torch.device, outputs: int, inputs: int) -> Product:
    recipe = import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    product = _in_place_of(package.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="meta"))

    def call(x: Tensor, weight_OI: Tensor) -> Tensor:
        with package.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return product(x, weight_OI)

    return call


def _in_place_of(shell: nn.Module) -> Product:
    """A module without memory as a function of x and the weight that takes the place of its own."""
    return lambda x, weight_OI: torch.func.functional_call(shell, {"weight": weight_OI}, (x,))
