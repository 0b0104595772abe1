"""FP8: 8-bit matrix products in the projections of attention, dense FFN and shared experts. Off by default.

use_fp8 is applied to a finished model: each Linear keeps its weight, its name and its checkpoint key; only its forward
changes. The optimizer keeps fp32 weights, and FSDP2 gathers them in bf16. Weights, activations and gradients are
rounded to 8 bits for each product, with scales computed at that moment, so there is no state to save, and recompute
gives the same numbers. Router, routed experts, embedding, head and norms do not change.

    torchao              its Float8Linear, recipe "rowwise": e4m3 in all three products, one scale (a power of two) for
                         each row of x, of W and of dy, so that matrices stacked in one weight do not share a scale.
                         Needs an H100 or newer; on a CPU torchao emulates the rounding, to try its effect on the loss.
    transformer_engine   te.pytorch.Linear with its recipe Float8CurrentScaling: one scale per tensor. Needs an H100 or
                         newer. This project has not run it yet.

Error of a product: an e4m3 number has 3 bits after the leading one, so its rounding error is at most 2⁻⁴ and 0.026 on
average (root mean square); a product of two is off by 0.037 (measured on random numbers: 0.037 forward, dx and dW
alike).

Shapes: O and I a weight's output and input width.
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

WIDTH_MULTIPLE = 16
"""Widths of 8-bit products must be multiples of this, on every GPU."""

INSTALL = {
    "torchao": "pip install torchao",
    "transformer_engine": "pip install 'transformer-engine[pytorch,core-cu13]'",
}


def use_fp8(model: nn.Module, kind: Literal["torchao", "transformer_engine"], device: torch.device) -> None:
    """Make every Linear of a model multiply in 8 bits; call before sharding.

    Args:
        model: changed in place; its parameters and their names stay.
        kind: the package that computes the products.
        device: the device that the model will run on.
    Raises:
        UserError: the package is missing, the device does not support FP8, or a width is not a multiple of 16.
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
            if outputs % WIDTH_MULTIPLE or inputs % WIDTH_MULTIPLE:
                raise UserError(
                    f"precision.fp8={kind} takes widths of multiples of {WIDTH_MULTIPLE} and {name} is "
                    f"{outputs} × {inputs}; use precision.fp8=none"
                )
            # set on the instance, not by a wrapper module, so that parameter names stay
            module.forward = partial(_forward, module, product(outputs, inputs))  # type: ignore[method-assign]


def _forward(linear: Linear, product: Product, x: Tensor) -> Tensor:
    # read the weight at each call: FSDP2 swaps in the gathered one
    return product(x, linear.weight)


def _package(kind: str) -> ModuleType:
    name = {"torchao": "torchao.float8", "transformer_engine": "transformer_engine.pytorch"}[kind]
    try:
        return import_module(name)
    except Exception as error:  # not only ImportError: a broken installation also fails on a library or torch version
        why = str(error).partition("\n")[0]
        raise UserError(
            f"precision.fp8={kind} needs {name} ({why}); install it with {INSTALL[kind]}, or use precision.fp8=none"
        ) from error


def _torchao(package: ModuleType, device: torch.device, outputs: int, inputs: int) -> Product:
    config = package.Float8LinearConfig.from_recipe_name("rowwise")
    config = dataclasses.replace(config, emulate=device.type != "cuda")
    module = import_module("torchao.float8.float8_linear").Float8Linear
    with torch.device("meta"):
        return _functional_linear(module.from_float(nn.Linear(inputs, outputs, bias=False), config=config))


def _transformer_engine(package: ModuleType, device: torch.device, outputs: int, inputs: int) -> Product:
    recipe = import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    product = _functional_linear(
        package.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="meta")
    )

    def call(x: Tensor, weight_OI: Tensor) -> Tensor:
        with package.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return product(x, weight_OI)

    return call


def _functional_linear(shell: nn.Module) -> Product:
    """The forward of `shell`, a module on the meta device, as a function of x and of the weight to use instead."""
    return lambda x, weight_OI: torch.func.functional_call(shell, {"weight": weight_OI}, (x,))
