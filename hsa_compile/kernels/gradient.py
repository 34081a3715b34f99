"""Registers gradients of operators, as `torch.library.register_autograd` does, but a call takes half of its time.

A derivative that there is not (of a gradient, or in forward mode) is refused; PyTorch would take it for zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from hsa_compile.errors import InvalidArgument


def register_gradient(
    library: torch.library.Library,
    name: str,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., tuple[Any, ...]],
) -> None:
    """Registers the gradient of an operator without keyword-only arguments.

    What this leaves out of PyTorch's own registration (default values and keyword arguments filled in again, tensor
    lists) takes as long as the rest of a call. The dispatcher, and with it tracing, modes and profilers, sees the same.

    Args:
        library: the library that defines the operator.
        name: the operator's name, without its namespace.
        save: called as `save(ctx, inputs, output)`; it keeps what the gradient needs.
        gradient: called as `gradient(ctx, *grad_outputs)`; it returns one gradient, or None, for each input.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def run_below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            output = run_below(keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
            return (None, *gradient(ctx, *grad_outputs))

    def run(keyset: Any, *args: Any) -> Any:
        refuse_tangents(name, args)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            return Gradient.apply(keyset, *args)
        return run_below(keyset, args)

    Gradient.__name__ = Gradient.__qualname__ = f"Gradient_{name}"
    library.impl(name, run, "Autograd", with_keyset=True)


def register_no_gradient(library: torch.library.Library, name: str, why: str) -> None:
    """Registers that an operator without keyword-only arguments cannot be differentiated.

    It can be called where gradients are recorded; to differentiate what it gave raises InvalidArgument.

    Args:
        library: the library that defines the operator.
        name: the operator's name, without its namespace.
        why: one sentence for the error.
    """

    def refuse(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        raise InvalidArgument(why)

    register_gradient(library, name, lambda ctx, inputs, output: None, refuse)


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises InvalidArgument if forward-mode differentiation (`torch.func.jvp`) goes through an operator."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise InvalidArgument(f"{name} has no forward-mode derivative (jvp)")
