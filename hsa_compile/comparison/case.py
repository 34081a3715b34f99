"""What a contest is about: what is computed, on which shape and tensors, and the work that this takes at least."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsa_compile.comparison.choices import BOTH, KINDS
from hsa_compile.errors import InvalidArgument, InvalidProblem
from hsa_compile.kernels.hsa_attention.inputs import Inputs
from hsa_compile.kernels.hsa_decode.inputs import DecodeInputs
from hsa_compile.kernels.ops import OpInputs, inputs_of
from hsa_compile.problem import Problem
from hsa_compile.schedules.ops import count_work
from hsa_compile.schedules.ops.backend import Work
from hsa_compile.schedules.schedule import Schedule

Results = tuple[Tensor, ...]
Call = Callable[[], Results]

# Forward is one pass over the chunks, backward five products: that has to be done, whatever a schedule does beyond.
_LEAST = Schedule.of("chunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A problem with its tensors on a device.

    Attributes:
        kind: `forward` or `both` (forward and backward), which are hsa_attention's, `select`, or `decode`.
        problem: the problem whose op is that of the forward kernel.
        device: the device on which it runs.
        inputs: the tensors, which no contender may write to.
    """

    kind: str
    problem: Problem
    device: torch.device
    inputs: OpInputs

    def __post_init__(self) -> None:
        if KINDS.get(self.kind) != self.problem.op:
            raise InvalidArgument(f"kind = {self.kind!r} of {self.problem.op} is not one of {KINDS}")

    @staticmethod
    def of(kind: str, problem: Problem, device: torch.device, *, distribution: str = "random", seed: int = 0) -> "Case":
        """Makes a case whose tensors are those that a tuning would take."""
        inputs = inputs_of(problem, device, distribution=distribution, seed=seed)
        return Case(kind=kind, problem=problem, device=device, inputs=inputs)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops of the kernels that take part."""
        return (self.problem.op, "hsa_backward") if self.kind == BOTH else (self.problem.op,)

    @property
    def attention(self) -> Inputs:
        """The tensors of hsa_attention."""
        assert isinstance(self.inputs, Inputs)
        return self.inputs

    @property
    def decoding(self) -> DecodeInputs:
        """The tensors of hsa_decode."""
        assert isinstance(self.inputs, DecodeInputs)
        return self.inputs


def check_length(problem: Problem) -> None:
    """Checks that there is anything to compute: the last token must see a chunk, which is one that ended before it.

    Raises:
        InvalidProblem: no token sees any chunk.
    """
    if problem.kv_len <= problem.chunk_size:
        raise InvalidProblem(
            f"{problem.describe()} has {problem.kv_len} tokens; more than chunk_size = {problem.chunk_size} are "
            "needed, else no token sees a whole chunk"
        )


def sparse_work(case: Case) -> Work:
    """Counts the products of the picks that are there, with each tensor moved once; for contenders that use picks."""
    filled = case.inputs.filled()
    works = [count_work(case.problem.with_op(op), _LEAST) for op in case.ops]
    return replace(
        works[0],
        flops=filled * sum(work.flops for work in works),
        memory_bytes=sum(work.memory_bytes for work in works),
        cache_bytes=sum(work.cache_bytes for work in works),
    )


def dense_work(case: Case) -> Work:
    """Counts the products of every query with all keys before it, with each tensor moved once."""
    problem = case.problem
    D, Dv, T, S = problem.head_dim, problem.value_dim, problem.seq_len, problem.kv_len
    pairs = problem.batch * problem.num_heads * (T * (T + 1) / 2 + T * (S - T))
    queries = problem.batch * T * problem.num_heads * (D + Dv)
    keys = problem.batch * S * problem.num_kv_heads * (D + Dv)
    backward = case.kind == BOTH
    return Work(
        flops=2.0 * pairs * (4 * D + 3 * Dv if backward else D + Dv),
        memory_bytes=(queries + keys) * problem.itemsize * (3 if backward else 1),
        cache_bytes=0.0,
    )
