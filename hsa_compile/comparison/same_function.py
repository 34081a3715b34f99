"""Functions with an op's own signature: they are bound to a case, and held to the op's definition like candidates."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hsa_compile.comparison.case import Call, Case
from hsa_compile.comparison.choices import BOTH, KINDS
from hsa_compile.comparison.contender import SAME, Contender, available
from hsa_compile.errors import WrongResult
from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.emit import KernelSource
from hsa_compile.kernels.ops import check
from hsa_compile.problem import Problem
from hsa_compile.schedules.schedule import Schedule
from hsa_compile.target import Target

Function = Callable[..., Any]


def same_function(
    name: str,
    function: Callable[[Case], Function],
    *,
    why_not: Callable[[Case], str | None] = available,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> Contender:
    """Makes a contender that claims to be the op itself.

    Args:
        name: the name that tables show.
        function: gives what computes a case, called as the op is: `hsa_attention`, `select_chunks` or `hsa_decode`.
        why_not, kinds: as in `Contender`.
    """
    return Contender(
        name=name,
        computes=SAME,
        make=lambda case: bind(function(case), case),
        check=lambda case, call: check_function(function(case), case),
        why_not=why_not,
        kinds=kinds,
    )


def bind(function: Function, case: Case) -> Call:
    """Makes a call of the function on the case's tensors, with gradients where the case asks for them."""
    tensors, options = case.inputs.call(case.problem)
    if case.kind == BOTH:
        return with_gradients(lambda leaves: function(*leaves[:3], tensors[3], leaves[3], **options), case)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = function(*tensors, **options)
        return found if isinstance(found, tuple) else (found,)

    return call


def with_gradients(forward: Callable[[list[Tensor]], Tensor], case: Case) -> Call:
    """Makes a call of `forward` on q, k, v and weights, and of its backward."""
    inputs = case.attention
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.chunk_weights)]

    def call() -> tuple[Tensor, ...]:
        o = forward(leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, inputs.grad_o))

    return call


def check_function(function: Function, case: Case) -> None:
    """Holds a function to all that a candidate of the search is held to: a small odd shape, then the case itself.

    Raises:
        WrongResult: a result is not what the op is defined to give; the message names it and the error.
    """
    for op in case.ops:
        problem = case.problem.with_op(op)
        kernel = _as_kernel(function, problem)
        check(kernel, problem, case.inputs)


def _as_kernel(function: Function, problem: Problem) -> Kernel:
    """Puts the function in the place of an emitted entry, which gets the same tensors and other keywords."""
    entries = {
        "hsa_forward": _forward_entry,
        "hsa_backward": _backward_entry,
        "select_chunks": _select_entry,
        "hsa_decode": _decode_entry,
    }
    source = KernelSource(
        problem=problem,
        schedule=Schedule.of("none"),
        target=Target.parse("cpu"),
        backend="torch",
        text="",
        entry=problem.op,
        fingerprint="",
    )
    return Kernel(source=source, path=Path(), entry=entries[problem.op](function, problem), module=SimpleNamespace())


def _forward_entry(function: Function, problem: Problem) -> Function:
    def entry(*tensors: Tensor, scale: float) -> Tensor:
        del scale  # it is the op's own default
        with torch.no_grad():
            return _tensor("o", function(*tensors, chunk_size=problem.chunk_size))

    return entry


def _backward_entry(function: Function, problem: Problem) -> Function:
    def entry(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, grad_o: Tensor, *, scale: float
    ) -> tuple[Tensor, ...]:
        del scale
        leaves = [x.detach().requires_grad_() for x in (q, k, v, weights)]
        o = _tensor("o", function(*leaves[:3], indices, leaves[3], chunk_size=problem.chunk_size))
        if not o.requires_grad:
            raise WrongResult("o has no gradient, and forward and backward are asked for")
        return torch.autograd.grad(o, leaves, grad_o, materialize_grads=True)

    return entry


def _select_entry(function: Function, problem: Problem) -> Function:
    def entry(query: Tensor, landmarks: Tensor, noise: Tensor | None, *, top_k: int, offset: int) -> Any:
        assert noise is None
        assert offset == 0
        found = function(query, landmarks, chunk_size=problem.chunk_size, top_k=top_k)
        if not isinstance(found, tuple) or len(found) != 2:
            raise WrongResult(f"the result is a {type(found).__name__}, not a pair (chunk_indices, chunk_weights)")
        expected = [*query.shape[:3], top_k]
        for name, x in zip(("chunk_indices", "chunk_weights"), found, strict=True):
            if list(_tensor(name, x).shape) != expected:
                raise WrongResult(f"{name} has shape {list(x.shape)}, not {expected}")
        return found

    return entry


def _decode_entry(function: Function, problem: Problem) -> Function:
    def entry(*tensors: Tensor, scale: float, page_table: Tensor | None = None) -> Tensor:
        del scale
        o = _tensor("o", function(*tensors, page_table=page_table))
        expected = [*tensors[0].shape[:3], problem.value_dim]
        if list(o.shape) != expected:
            raise WrongResult(f"o has shape {list(o.shape)}, not {expected}")
        return o

    return entry


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise WrongResult(f"{name} is a {type(value).__name__}, not a tensor")
    return value
