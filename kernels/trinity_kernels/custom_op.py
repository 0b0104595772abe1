"""custom_op: torch.library.custom_op for launchers of kernels, without its host time in eager mode.

torch calls a custom op through its dispatcher and Python wrappers, which take longer than launching a kernel. That is
needed only where something looks at operations: torch.compile, functorch, fake and meta tensors, and dispatch modes
such as selective checkpointing. Every other call goes to the launcher itself, inside an autograd.Function if a gradient
is required. Both forms share the launcher, what is saved and the backward function, so they give the same bits.

    call ─► observed? ─ yes ─► torch.library.custom_op ─► launcher
                      └ no ──► autograd.Function or nothing ─► launcher

Gradients of outputs that were not used are None, not zeros: some outputs are large and never have a gradient.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter


class CustomOp:
    """A launcher as a custom op that eager calls bypass.

    Args:
        name: "namespace::name" of the custom op.
        launcher: takes positional arguments; its annotations give the op's schema.
        mutates_args: names of the tensors that it writes to.
    Attributes:
        op: the custom op, for torch.library.opcheck.
    """

    def __init__(self, name: str, launcher: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> None:
        self.op = torch.library.custom_op(name, launcher, mutates_args=mutates_args)
        self.register_fake = self.op.register_fake
        self.__doc__ = launcher.__doc__
        self._name, self._launcher = name, launcher
        self._mutated = [place for place, word in enumerate(signature(launcher).parameters) if word in mutates_args]
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, differentiate: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Make the op differentiable, with the two functions of torch.library.custom_op's register_autograd.

        Args:
            differentiate: (ctx, *gradients of the outputs) → gradients of the inputs. A gradient may be None, of an
                output that is not differentiable or was not used, but not all of them.
            setup_context: (ctx, inputs, output); saves what `differentiate` needs.
        """

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return differentiate(ctx, *grads)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._launcher(*args)
            setup(ctx, args, output)
            return output

        self.op.register_autograd(backward, setup_context=setup)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """Call the launcher, or the custom op if something observes operations."""
        if is_observed(args):
            return self.op(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            # without a backward function, the custom op raises torch's error in backward
            return self.op(*args) if self._function is None else self._function.apply(*args)
        for place in self._mutated:
            increment_version(args[place])
        return self._launcher(*args)


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator: a launcher becomes a CustomOp."""

    def decorate(launcher: Callable[..., Any]) -> CustomOp:
        return CustomOp(name, launcher, mutates_args)

    return decorate


def is_observed(args: tuple) -> bool:
    """Whether something must see the call as an operation, or a tensor among the arguments holds no plain data."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    for x in args:  # no generator, which would take as long again
        if isinstance(x, Tensor) and ((type(x) is not Tensor and type(x) is not Parameter) or x.is_meta):
            return True
    return False
