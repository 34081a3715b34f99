"""The table of the ops' kernels: for each op the tensors that it is tuned on, and the check that a kernel must pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hsa_compile.kernels.compile import Kernel
from hsa_compile.kernels.hsa_attention.check import check_attention
from hsa_compile.kernels.hsa_attention.inputs import Inputs, make_inputs, pick_chunks
from hsa_compile.kernels.hsa_decode.check import check_decode
from hsa_compile.kernels.hsa_decode.inputs import make_decode_inputs
from hsa_compile.kernels.select_chunks.check import check_select
from hsa_compile.kernels.select_chunks.inputs import make_select_inputs
from hsa_compile.problem import Problem


class OpInputs(Protocol):
    """The tensors of one problem."""

    def arguments(self, op: str) -> tuple[Tensor | None, ...]:
        """Returns the positional arguments of the emitted entry of `op`."""

    def options(self, op: str) -> Mapping[str, Any]:
        """Returns the keyword arguments of the emitted entry of `op`."""

    def call(self, problem: Problem) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments of the public function."""

    def filled(self) -> float:
        """Returns the share of the slots that hold a pick, 0 … 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpKernels:
    """The two functions that tuning one op needs: one makes its tensors, one checks its kernels.

    Attributes:
        make_inputs: `(problem, device, *, distribution, seed)` gives random tensors of the problem's shapes.
        check: `(kernel, problem, inputs)` compares a kernel with the float64 reference, on a small odd shape and on
            a sample of the inputs, and raises WrongResult.
    """

    make_inputs: Callable[..., Any]
    check: Callable[[Kernel, Problem, Any], None]


_ATTENTION = OpKernels(make_inputs=make_inputs, check=check_attention)
_SELECT = OpKernels(make_inputs=make_select_inputs, check=check_select)
_DECODE = OpKernels(make_inputs=make_decode_inputs, check=check_decode)

OP_KERNELS: dict[str, OpKernels] = {
    "hsa_forward": _ATTENTION,
    "hsa_backward": _ATTENTION,
    "select_chunks": _SELECT,
    "select_chunks_backward": _SELECT,
    "hsa_decode": _DECODE,
}


def inputs_of(problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0) -> OpInputs:
    """Makes random tensors of a problem's shapes, for any op.

    Raises:
        InvalidArgument: the distribution is unknown.
    """
    made: OpInputs = OP_KERNELS[problem.op].make_inputs(problem, device, distribution=distribution, seed=seed)
    return made


def all_inputs_of(
    problem: Problem, device: torch.device, *, distributions: Sequence[str], seed: int = 0
) -> dict[str, OpInputs]:
    """Makes tensors of a problem's shapes for each distribution; those of `hsa_attention` differ in the picks alone.

    Raises:
        InvalidArgument: a distribution is unknown.
    """
    first, *others = distributions
    made = {first: inputs_of(problem, device, distribution=first, seed=seed)}
    for name in others:
        known = made[first]
        if isinstance(known, Inputs):
            made[name] = known.with_indices(pick_chunks(problem, name, torch.Generator(device).manual_seed(seed)))
        else:
            made[name] = inputs_of(problem, device, distribution=name, seed=seed)
    return made


def check(kernel: Kernel, problem: Problem, inputs: OpInputs) -> None:
    """Compares a kernel of any op with the float64 reference.

    Args:
        kernel: what is checked; it computes `problem.op`.
        problem: what it is to be timed on.
        inputs: the tensors it is to be timed on, as `inputs_of` makes them.

    Raises:
        WrongResult: a result is not finite or too far off; the message names it and the error.
    """
    OP_KERNELS[problem.op].check(kernel, problem, inputs)
